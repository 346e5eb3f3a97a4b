// The folded encoder's stages from F to the tokens: emotions (19)-(21), routing and gates (22)-(27), Attn_d (29).
#pragma once

#include "folded_block.cuh"

namespace evc::folded {

template <class S>
struct Tokens : Block<S> {
  typedef FoldedCudaWeight Weight;
  using Block<S>::Block, Block<S>::p, Block<S>::floats, Block<S>::operands, Block<S>::partials, Block<S>::lane, Block<S>::warp;
  using Block<S>::g, Block<S>::t, Block<S>::for_units, Block<S>::groups, Block<S>::packed, Block<S>::exchange;
  using Block<S>::rows_of, Block<S>::multiply_packed, Block<S>::expect_packed, Block<S>::remember;

  // ---- 8 columns of a video: the attended emotions, routed and pooled ----

  __device__ void context_of_frames() const {  // emotions first
    for_units(p.B * (p.by_head / kColumns), [&](int unit) { route(unit % p.B, unit / p.B, true); });
  }
  __device__ void routing() const {
    const int of_facts = p.width / kColumns, of_context = p.augments ? p.by_head / kColumns : 0;
    for_units(p.B * (of_facts + of_context), [&](int unit) {
      const int b = unit % p.B, tile = unit / p.B;
      if (tile < of_context) route(b, tile, true);
      else route(b, tile - of_context, false);
    });
  }
  // (22), (23) and the sums of (27) of columns [8 tile, 8 tile + 8) of b's facts or context.
  __device__ void route(int b, int tile, bool of_context) const {
    const bool once = of_context && p.emotion_first;  // E is the same for all triplets, whose weights sum to 1
    const int c = threadIdx.x % kColumns, first = threadIdx.x / kColumns, apart = kThreads / kColumns, column = tile * kColumns + c;
    const int K = once ? 1 : p.K;
    const float* weights = p.weights + int64_t(b) * p.N * p.K;
    float *routed = floats(p.shared.routed), *context = floats(p.shared.context);
    float all = 0, routed_sum = 0;
    if (of_context && !once) expect(weights, int64_t(p.N) * p.K * 4);
    const auto gather = [&](int begin, int count, const float* values, int64_t of_frame, int64_t of_triplet) {
#pragma unroll 1
      for (int n = first; n < p.N; n += apart) {
        float sum = begin == 0 ? 0 : routed[n * kColumns + c];
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
          const float x = values[k * of_triplet + n * of_frame];
          sum = fmaf(once ? 1.0f : weights[n * p.K + begin + k], x, sum);
          all += x;
        }
        routed[n * kColumns + c] = sum;
      }
    };
    if (!of_context) {
      gather(0, K, p.facts + int64_t(b) * K * p.frames * p.width + column, p.width, int64_t(p.frames) * p.width);
    } else {
#pragma unroll 1
      for (int begin = 0; begin < K; begin += p.together) {
        const int count = least(p.together, K - begin);
        const int64_t row = (int64_t(b) * K + begin) * p.frames;
#pragma unroll 1
        for (int m = warp; m < count * p.row_tiles; m += kWarps) {
          expect(p.gate_scores + (row + m * kRows) * p.frames_deep, kRows * int64_t(p.frames_deep) * 4);
          attend_to_words(row, m, tile);
        }
        __syncthreads();
#pragma unroll 1
        for (int m = warp; m < count * p.row_tiles; m += kWarps) attend_to_frames(row, m);
        __syncthreads();
        gather(begin, count, context + c, kColumns, p.frames * kColumns);
      }
    }
#pragma unroll 1
    for (int n = first; n < p.N; n += apart) {
      const float x = routed[n * kColumns + c];
      const int64_t to = int64_t(b) * p.frames + n;
      routed_sum += x;
      if (of_context) p.routed_context[to * p.by_head + column] = narrow<S>(x);
      else p.routed_facts[to * p.width + column] = x;
    }
    // Four of a warp's lanes have the same column.
#pragma unroll
    for (int step = kColumns; step < kWarp; step *= 2) {
      all += __shfl_xor_sync(kAllLanes, all, step);
      routed_sum += __shfl_xor_sync(kAllLanes, routed_sum, step);
    }
    float* sums = floats(p.shared.sums);
    if (lane < kColumns) {
      sums[warp * 2 * kColumns + c] = all;
      sums[(warp * 2 + 1) * kColumns + c] = routed_sum;
    }
    __syncthreads();
    if (threadIdx.x >= 2 * kColumns) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w * 2 * kColumns + threadIdx.x];
    if (threadIdx.x < kColumns)
      p.pooled[int64_t(b) * p.gate_depth() + (of_context ? p.width : 0) + column] = narrow<S>(sum / float(K * p.N));
    else if (of_context)
      p.mean_context[int64_t(b) * p.by_head + column] = narrow<S>(sum / static_cast<float>(p.N));
  }
  // A warp's tile of (19): the candidates of row tile m after `row`, as a right operand.
  __device__ void attend_to_words(int64_t row, int m, int tile) const {
    const int stride = p.heads * p.words, of_head = tile * kColumns / p.head_width, h = of_head < p.heads ? of_head : p.heads - 1;
    const float* scores = p.word_scores + (row + m * kRows + g) * stride + h * p.words;
    float x[1][4];
    attend<3>(x, {{scores, scores + 8 * int64_t(stride)}}, packed(Weight::kValue, tile), 0, 1, p.words / kDeep, exchange());
    const int k = m / p.row_tiles, deep = shared_stride<S>(p.frames_deep);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = m % p.row_tiles * kRows + g + i / 2 * 8;
      S* to = operands(p.shared.candidates) + (k * kColumns + t * 2 + i % 2) * deep + n;
      *to = narrow<S>(n < p.N ? x[0][i] : 0.0f);
      if (n + kRows >= p.frames && n + kRows < p.frames_deep) to[kRows] = narrow<S>(0.0f);
    }
  }
  // A warp's tile of (20), (21): the candidates gathered by the gate.
  __device__ void attend_to_frames(int64_t row, int m) const {
    const int deep = shared_stride<S>(p.frames_deep);
    const float* scores = p.gate_scores + (row + m * kRows + g) * p.frames_deep;
    const S* candidates = operands(p.shared.candidates) + m / p.row_tiles * kColumns * deep;
    float x[1][4];
    attend<1>(x, {{scores, scores + 8 * int64_t(p.frames_deep)}}, Right<S>::of_rows(candidates, deep), 0, 1, p.frames_deep / kDeep, exchange());
#pragma unroll
    for (int i = 0; i < 4; ++i) floats(p.shared.context)[(m * kRows + g + i / 2 * 8) * kColumns + t * 2 + i % 2] = x[0][i];
  }

  // ---- M of (27) ----

  // Unit: 8 columns of the facts' or the emotions' half of some videos. The gates' products run beside the first of E's.
  __device__ void gates() const {
    const int halves = p.emotions ? 2 : 1, tiles = p.width / kColumns;
    const int together = least(least(parts(p.B * halves * tiles, static_cast<int>(gridDim.x)), p.B), kRows);
    const int of_videos = parts(p.B, together);
    for_units(of_videos * halves * tiles, [&](int unit) {
      const int first = unit % of_videos * together, half = unit / of_videos / tiles;
      fuse(first, least(together, p.B - first), half, unit / of_videos % tiles);
    });
  }
  __device__ void fuse(int first, int videos, int half, int tile) const {
    constexpr int kSplit = 4, kTogether = kWarps / kSplit;
    const bool projects = half == 1 && p.augments;  // E from the routed context, after the routing
    const int part = warp % kSplit, gate_tile = half * (p.width / kColumns) + tile;
    const int jobs = 1 + (projects ? videos * p.row_tiles : 0);  // the first is the gate
    // Where E is there already, or for the facts: element by element. A thread's column is always the same.
    const int column = projects ? t * 2 + part % 2 : static_cast<int>(threadIdx.x % kColumns), elements = projects ? 0 : videos * p.N * kColumns;
    const float* from = half == 0 ? p.routed_facts : p.emotions_of;
    const int stride = half == 0 ? p.width : p.emotion_columns();
    const auto load = [&](int i) {
      return i < elements ? from[(int64_t(first + i / kColumns / p.N) * p.frames + i / kColumns % p.N) * stride + tile * kColumns + column] : 0.0f;
    };
    float next = load(threadIdx.x);
    const float gate_bias = p.bias_adjustment ? p.vector(Weight::kGateBias)[gate_tile * kColumns + column] : 0;
    const float bias = projects ? p.vector(Weight::kEmotionBias)[tile * kColumns + column] : 0;
    const auto gate = [&](int video) {  // (24), (25); video: from `first` on
      if (!p.bias_adjustment) return 1.0f;
      const float* own = partials() + (video / 8 * 2 + column % 2) * kWarp + video % 8 * 4 + column / 2;
      float sum = own[0];
#pragma unroll
      for (int i = 1; i < kSplit; ++i) sum += own[i * 128];
      return tanhf(sum + gate_bias);
    };
    S* shown = half == 0 ? p.fact_gate : p.emotion_gate;
    const auto put = [&](int video, int n, float x) {
      const float share = gate(video);
      const int64_t to = (int64_t(first + video) * (p.kinds - 1) + half) * p.frames + n;
      p.fused[to * p.width + tile * kColumns + column] = narrow<S>(share * x);
      if (p.explain && n == 0 && tile * kColumns + column < p.d) shown[int64_t(first + video) * p.d + tile * kColumns + column] = narrow<S>(share);
    };
#pragma unroll 1
    for (int base = 0; base < jobs; base += kTogether) {
      const int job = base + warp / kSplit;
      Sums<S> sums;
      if (job == 0 ? p.bias_adjustment : job < jobs) {
        const Rows<S> rows = job == 0 ? rows_of(p.pooled, first, p.gate_depth(), videos)
                                      : rows_of(p.routed_context, int64_t(first) * p.frames + (job - 1) * kRows, p.by_head);
        multiply_packed(sums, rows, job == 0 ? Weight::kGate : Weight::kEmotion, job == 0 ? gate_tile : tile, part, kSplit);
      }
      // The gate's stay until the unit ends.
      float* own = partials() + (job == 0 ? part : kSplit + warp) * 128 + lane;
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i * kWarp] = sums.total(i);
      __syncthreads();
      if (job > 0 && job < jobs) {
        const float* of_job = partials() + (kSplit + warp - part) * 128 + part * kWarp + lane;
        const int row = (job - 1) * kRows + g + part / 2 * 8, n = row % p.frames;
        float sum = of_job[0];
#pragma unroll
        for (int i = 1; i < kSplit; ++i) sum += of_job[i * 128];
        if (n < p.N) put(row / p.frames, n, sum + bias);
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < elements; i += kThreads) {
      const float x = next;
      next = load(i + kThreads);
      put(i / kColumns / p.N, i / kColumns % p.N, x);
    }
  }

  // ---- what Attn_d reads of M, and the classification head ----

  __device__ void memory() const {
    constexpr int kSplit = 4, kTogether = kWarps / kSplit;
    const int of_video = (p.kinds - 1) * p.row_tiles, columns = (p.scores + p.by_head) / kColumns, words = p.words / kColumns;
    const int of_memory = p.B * of_video * columns, tiles = of_memory + (p.emotions ? parts(p.B, kRows) * words : 0);
    const int units = parts(tiles, kTogether), shown = p.explain && p.emotions ? p.B * (p.augments ? p.K : 1) : 0;
    for_units(units + shown, [&](int unit) {
      if (unit >= units) return explain_emotions(unit - units);
      const int first = unit * kTogether, last = least(first + kTogether, tiles);
      for_tiles<kSplit, S>(
          first, last, partials(),
          [&](int tile, int, int column) {
            return tile < of_memory ? 0.0f : p.vector(Weight::kHeadBias)[(tile - of_memory) % words * kColumns + column];
          },
          [&](Sums<S>& sums, int tile, int part) {
            const bool of_head = tile >= of_memory;
            const int own = of_head ? tile - of_memory : tile, wide = of_head ? words : columns, row = own / wide * kRows, column = own % wide;
            const Rows<S> rows = of_head ? rows_of(p.mean_context, row, p.by_head, p.B - row) : rows_of(p.fused, row, p.width);
            multiply_packed(sums, rows, of_head ? Weight::kHead : Weight::kMemory, column, part, kSplit);
          },
          [&](int tile, int row, int column, float sum) {
            if (tile < of_memory) {
              const int m = tile / columns, of = m % of_video;
              return remember(m / of_video, of / p.row_tiles, of % p.row_tiles * kRows + row, tile % columns * kColumns + column, sum);
            }
            tile -= of_memory, row += tile / words * kRows, column += tile % words * kColumns;
            if (row < p.B && column < p.W) p.emotion_logits[int64_t(row) * p.W + column] = narrow<S>(sum);
          });
    });
  }
  // Weights of (19), mean over heads, by the mean row of (20). index: of a triplet, or of a video where emotions come first.
  __device__ void explain_emotions(int index) const {
    const int64_t row = int64_t(index) * p.frames;
    const auto row_stats = [&](const float* scores, int count, float* to) {
      float best = -INFINITY, total = 0;
#pragma unroll 1
      for (int i = lane; i < count; i += kWarp) best = fmaxf(scores[i], best);
      best = warp_max(best);
#pragma unroll 1
      for (int i = lane; i < count; i += kWarp) total += expf(scores[i] - best);
      total = warp_sum(total);
      if (lane == 0) to[0] = best, to[1] = 1 / total;
    };
#pragma unroll 1
    for (int64_t i = row * p.heads + warp; i < (row + p.N) * p.heads; i += kWarps) row_stats(p.word_scores + i * p.words, p.W, p.word_stats + i * 2);
#pragma unroll 1
    for (int64_t i = row + warp; i < row + p.N; i += kWarps) row_stats(p.gate_scores + i * p.frames_deep, p.N, p.gate_stats + i * 2);
    __syncthreads();
    for (int j = threadIdx.x; j < p.N; j += kThreads) {
      float sum = 0;
#pragma unroll 1
      for (int64_t i = row; i < row + p.N; ++i) sum += expf(p.gate_scores[i * p.frames_deep + j] - p.gate_stats[i * 2]) * p.gate_stats[i * 2 + 1];
      p.mean_gate[row + j] = sum / static_cast<float>(p.N * p.heads);
    }
    __syncthreads();
    for (int w = threadIdx.x; w < p.W; w += kThreads) {
      float sum = 0;
#pragma unroll 1
      for (int64_t n = row; n < row + p.N; ++n) {
        float of_frame = 0;
#pragma unroll 1
        for (int64_t i = n * p.heads; i < (n + 1) * p.heads; ++i)
          of_frame += expf(p.word_scores[i * p.words + w] - p.word_stats[i * 2]) * p.word_stats[i * 2 + 1];
        sum = fmaf(p.mean_gate[n], of_frame, sum);
      }
      const int copies = p.augments ? 1 : p.K;
#pragma unroll 1
      for (int k = 0; k < copies; ++k) p.emotion_distribution[(int64_t(index) * copies + k) * p.W + w] = sum;
    }
  }

  // ---- Attn_d's reading and the output (29): each block reads all of a video's memory, for its part of the columns ----

  __device__ void tokens() const {
    const int query_tiles = parts(p.queries, kRows), columns = parts(p.output_width, kColumns), stride = shared_stride<S>(p.by_head);
    const int each = groups(p.B, parts(columns * query_tiles, kWarps));
    for_units(p.B * each, [&](int unit) {
      const int b = unit / each, group = unit % each;
      const int begin = int(int64_t(columns) * group / each) * query_tiles, end = int(int64_t(columns) * (group + 1) / each) * query_tiles;
      if (begin + warp < end) expect_packed(Weight::kOutput, (begin + warp) / query_tiles);
      read(b);
      __syncthreads();
      for_tiles<1, S>(
          begin, end, partials(),
          [&](int tile, int row, int column) {
            row += tile % query_tiles * kRows, column += tile / query_tiles * kColumns;
            const bool some = row < p.queries && column < p.output_width;
            return some ? p.vector(Weight::kOutputBias)[int64_t(row) * p.output_width + column] : 0.0f;
          },
          [&](Sums<S>& sums, int tile, int) {
            this->template multiply_packed<10, true>(sums, rows_of(operands(p.shared.read), tile % query_tiles * kRows, stride), Weight::kOutput, tile / query_tiles);
          },
          [&](int tile, int row, int column, float sum) {
            row += tile % query_tiles * kRows, column += tile / query_tiles * kColumns;
            if (row < p.queries && column < p.output_width)
              p.tokens[(int64_t(b) * p.queries + row) * p.output_width + column] = narrow<S>(sum);
          });
    });
  }
  // softmax(scores) values of all heads, into shared memory. A job: 16 queries of a head, kTiles tiles of its columns.
  __device__ void read(int b) const {
    constexpr int kTiles = 5;
    const int query_tiles = parts(p.queries, kRows), of_head = p.head_width / kColumns, all = p.by_head / kColumns;
    const int rest = all - p.heads * of_head, chunks = parts(of_head + rest, kTiles);  // the last head also fills the padding
    const int jobs = p.heads * query_tiles * chunks, stride = shared_stride<S>(p.by_head);
    const S* values = p.memory_values + int64_t(b) * p.by_head * p.slots;
    const float* scores = p.memory_scores + int64_t(b) * p.scores * p.slots;
    const auto head_of = [&](int job) { return job / chunks % p.heads; };
    const auto query_of = [&](int job) { return job / chunks / p.heads * kRows; };
    const auto tile_of = [&](int job) { return head_of(job) * of_head + job % chunks * kTiles; };
    if (const int next = warp + kWarps; next < jobs) {  // while the first job waits
      expect(values + int64_t(tile_of(next)) * kColumns * p.slots, int64_t(least(kTiles, all - tile_of(next))) * kColumns * p.slots * sizeof(S));
      expect(scores + int64_t(head_of(next) * p.queries + query_of(next)) * p.slots, int64_t(least(kRows, p.queries - query_of(next))) * p.slots * 4);
    }
#pragma unroll 1
    for (int job = warp; job < jobs; job += kWarps) {
      const int h = head_of(job), q = query_of(job) + g, tile = tile_of(job), tiles = least(kTiles, (h + 1 < p.heads ? (h + 1) * of_head : all) - tile);
      if (tiles <= 0) continue;
      const float* own = scores + int64_t(h * p.queries + q) * p.slots;
      float x[kTiles][4];
      attend<2>(x, {{q < p.queries ? own : nullptr, q + 8 < p.queries ? own + 8 * int64_t(p.slots) : nullptr}},
                Right<S>::of_rows(values + int64_t(tile) * kColumns * p.slots, p.slots), int64_t(kColumns) * p.slots, tiles, p.slots / kDeep, exchange());
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        if (i < tiles)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            operands(p.shared.read)[(q + j / 2 * 8) * stride + (tile + i) * kColumns + t * 2 + j % 2] = narrow<S>(x[i][j]);
    }
  }
};

}  // namespace evc::folded
