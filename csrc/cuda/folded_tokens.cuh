// The folded encoder's stages from F to the tokens: emotions (19)-(21), routing and gates (22)-(27), Attn_d (29).
#pragma once

#include "folded_block.cuh"

namespace evc::folded {

template <class S>
struct Tokens : Block<S> {
  typedef FoldedCudaWeight Weight;
  typedef typename Block<S>::Rows Rows;
  using Block<S>::Block, Block<S>::p, Block<S>::floats, Block<S>::operands, Block<S>::partials, Block<S>::lane, Block<S>::warp, Block<S>::g, Block<S>::t;
  using Block<S>::for_units, Block<S>::groups, Block<S>::packed, Block<S>::steps, Block<S>::exchange, Block<S>::rows_of;
  using Block<S>::multiply, Block<S>::remember;

  // ---- 8 columns of a video: the attended emotions, routed and pooled ----

  __device__ void context_of_frames() const {  // emotions first
    for_units(int64_t(p.B) * (p.by_head / kColumns), [&](int unit) { route(unit % p.B, unit / p.B, true); });
  }
  __device__ void routing() const {
    const int of_facts = p.width / kColumns, of_context = p.augments ? p.by_head / kColumns : 0;
    for_units(int64_t(p.B) * (of_facts + of_context), [&](int unit) {
      const int b = unit % p.B, tile = unit / p.B;
      if (tile < of_context) route(b, tile, true);
      else route(b, tile - of_context, false);
    });
  }
  // (22), (23) and the sums of (27) of columns [8 tile, 8 tile + 8) of b's facts or context.
  __device__ void route(int b, int tile, bool of_context) const {
    const bool once = of_context && p.emotion_first;  // E is the same for all triplets, whose weights sum to 1
    const int c = threadIdx.x % kColumns, first = threadIdx.x / kColumns, apart = kThreads / kColumns;
    const int K = once ? 1 : p.K;
    if (!once) weigh(b, !of_context && tile == 0 && p.explain);
    float all = 0, routed_sum = 0;
    const auto gather = [&](int begin, int count, const auto& value) {
      for (int n = first; n < p.N; n += apart) {
        float sum = begin == 0 ? 0 : floats(p.shared.routed)[n * kColumns + c];
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
          const float x = value(k, n);
          sum = fmaf(once ? 1.0f : floats(p.shared.weights)[n * p.K + begin + k], x, sum);
          all += x;
        }
        floats(p.shared.routed)[n * kColumns + c] = sum;
      }
    };
    if (!of_context) {
      const float* facts = p.facts + int64_t(b) * p.K * p.frames * p.width + tile * kColumns + c;
      gather(0, K, [&](int k, int n) { return facts[(int64_t(k) * p.frames + n) * p.width]; });
    } else {
      for (int begin = 0; begin < K; begin += p.together) {
        const int count = begin + p.together < K ? p.together : K - begin;
        const int64_t row = (int64_t(b) * K + begin) * p.frames;
        for (int m = warp; m < count * p.row_tiles; m += kWarps) attend_to_words(row, m, tile);
        __syncthreads();
        for (int m = warp; m < count * p.row_tiles; m += kWarps) attend_to_frames(b, row, m);
        __syncthreads();
        gather(begin, count, [&](int k, int n) { return floats(p.shared.context)[(k * p.frames + n) * kColumns + c]; });
      }
    }
    const int column = tile * kColumns + c;
    for (int n = first; n < p.N; n += apart) {
      const float x = floats(p.shared.routed)[n * kColumns + c];
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
    if (lane < kColumns) {
      floats(p.shared.sums)[warp * 2 * kColumns + c] = all;
      floats(p.shared.sums)[(warp * 2 + 1) * kColumns + c] = routed_sum;
    }
    __syncthreads();
    if (threadIdx.x >= 2 * kColumns) return;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += floats(p.shared.sums)[w * 2 * kColumns + threadIdx.x];
    if (threadIdx.x < kColumns)
      p.pooled[int64_t(b) * p.gate_depth() + (of_context ? p.width : 0) + column] = narrow<S>(sum / static_cast<float>(K * p.N));
    else if (of_context)
      p.mean_context[int64_t(b) * p.by_head + column] = narrow<S>(sum / static_cast<float>(p.N));
  }
  // (26) into floats(p.shared.weights); all threads return together.
  __device__ void weigh(int b, bool show) const {
    const float uniform = 1.0f / static_cast<float>(p.K);
    for (int i = threadIdx.x; i < p.N * p.K; i += kThreads) {
      float logit = uniform;
      if (p.routed) {
        const int n = i / p.K, j = i % p.K;
        logit = p.vector(Weight::kRouterBias)[j];
#pragma unroll 4
        for (int k = 0; k < p.K; ++k) logit += p.router_parts[((int64_t(b) * p.K + k) * p.frames + n) * p.router + j];
      }
      floats(p.shared.weights)[i] = logit;
    }
    __syncthreads();
    if (p.routed) {
      if (p.video_router) {
        for (int j = threadIdx.x; j < p.K; j += kThreads) {
          float sum = 0;
          for (int n = 0; n < p.N; ++n) sum += floats(p.shared.weights)[n * p.K + j];
          floats(p.shared.means)[j] = sum / static_cast<float>(p.N);
        }
        __syncthreads();
      }
      for (int n = threadIdx.x; n < p.N; n += kThreads) {
        float* own = floats(p.shared.weights) + n * p.K;
        const float* logits = p.video_router ? floats(p.shared.means) : own;
        float best = -INFINITY, total = 0;
        for (int k = 0; k < p.K; ++k) best = Max::join(logits[k], best);
        for (int k = 0; k < p.K; ++k) total += own[k] = expf(logits[k] - best);
        for (int k = 0; k < p.K; ++k) own[k] /= total;
      }
      __syncthreads();
    }
    if (show)
      for (int i = threadIdx.x; i < p.N * p.K; i += kThreads) p.routing_weights[int64_t(b) * p.N * p.K + i] = floats(p.shared.weights)[i];
  }
  // A warp's tile of (19): the candidates of row tile m after `row`, as a right operand.
  __device__ void attend_to_words(int64_t row, int m, int tile) const {
    const int stride = p.heads * p.words, of_head = tile * kColumns / p.head_width, h = of_head < p.heads ? of_head : p.heads - 1;
    const float* scores = p.word_scores + (row + m * kRows + g) * stride + h * p.words;
    const Right<S> values[1] = {packed(Weight::kValue, tile)};
    float x[1][4];
    attend<S, 1>(
        x, values, 1, p.words / kDeep,
        [&](int i, int column, float (&score)[8]) { load_eight(scores + i * 8 * int64_t(stride) + column, p.W - column, score); }, exchange());
    const int k = m / p.row_tiles, deep = shared_stride<S>(p.frames_deep);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = m % p.row_tiles * kRows + g + i / 2 * 8;
      S* to = operands(p.shared.candidates) + (k * kColumns + t * 2 + i % 2) * deep + n;
      *to = narrow<S>(n < p.N ? x[0][i] : 0.0f);
      if (n + kRows >= p.frames && n + kRows < p.frames_deep) to[kRows] = narrow<S>(0.0f);
    }
  }
  // Eight scores, of which the first `count` are any.
  __device__ static void load_eight(const float* from, int count, float (&x)[8]) {
    float half[2][4];
    load_vector(from, half[0]);
    load_vector(from + 4, half[1]);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = j < count ? half[j / 4][j % 4] : -INFINITY;
  }
  // A warp's tile of (20), (21): the candidates gathered by the gate.
  __device__ void attend_to_frames(int b, int64_t row, int m) const {
    const int k = m / p.row_tiles;
    const float *scores = p.gate_scores + (row + m * kRows + g) * p.frames_deep, *bias = p.gate_bias + int64_t(b) * p.frames;
    const int deep = shared_stride<S>(p.frames_deep);
    const Right<S> candidates[1] = {Right<S>::of_rows(operands(p.shared.candidates) + k * kColumns * deep, deep)};
    float x[1][4];
    attend<S, 1>(
        x, candidates, 1, p.frames_deep / kDeep,
        [&](int i, int column, float (&score)[8]) {
          load_eight(scores + i * 8 * int64_t(p.frames_deep) + column, p.N - column, score);
#pragma unroll
          for (int j = 0; j < 8; ++j)
            if (column + j < p.N) score[j] += bias[column + j];
        },
        exchange());
#pragma unroll
    for (int i = 0; i < 4; ++i)
      floats(p.shared.context)[(m * kRows + g + i / 2 * 8) * kColumns + t * 2 + i % 2] = x[0][i];
  }

  // ---- M of (27) ----

  // Unit: 8 columns of the facts' or the emotions' half of some videos. The gates' products run beside the first of E's.
  __device__ void gates() const {
    const int halves = p.emotions ? 2 : 1, tiles = p.width / kColumns;
    int together = parts(int64_t(p.B) * halves * tiles, static_cast<int>(gridDim.x));
    together = together < p.B ? together : p.B;
    together = together < kRows ? together : kRows;
    const int of_videos = parts(p.B, together);
    for_units(int64_t(of_videos) * halves * tiles, [&](int unit) {
      const int first = unit % of_videos * together, half = unit / of_videos / tiles;
      fuse(first, first + together < p.B ? together : p.B - first, half, unit / of_videos % tiles);
    });
  }
  __device__ void fuse(int first, int videos, int half, int tile) const {
    constexpr int kSplit = 4, kTogether = kWarps / kSplit;
    const bool projects = half == 1 && p.augments;  // E from the routed context, after the routing
    const int part = warp % kSplit, gate_tile = (half * p.width) / kColumns + tile;
    const int jobs = 1 + (projects ? videos * p.row_tiles : 0);  // the first is the gate
    const auto gate = [&](int video, int column) {  // (24), (25); video: from `first` on
      if (!p.bias_adjustment) return 1.0f;
      const float* own = partials() + (video / 8 * 2 + column % 2) * kWarp + video % 8 * 4 + column / 2;
      float sum = own[0];
#pragma unroll
      for (int i = 1; i < kSplit; ++i) sum += own[i * 128];
      return tanhf(sum + p.vector(Weight::kGateBias)[gate_tile * kColumns + column]);
    };
    const auto put = [&](int video, int n, int column, float x) {
      const int64_t to = (int64_t(first + video) * (p.kinds - 1) + half) * p.frames + n;
      p.fused[to * p.width + tile * kColumns + column] = narrow<S>(gate(video, column) * x);
    };
    for (int base = 0; base < jobs; base += kTogether) {
      const int job = base + warp / kSplit;
      Sums<S> sums;
      if (job == 0 && p.bias_adjustment)
        multiply(sums, rows_of(p.pooled, first, p.gate_depth(), videos), Weight::kGate, gate_tile, part, kSplit);
      else if (job > 0 && job < jobs)
        multiply(sums, rows_of(p.routed_context, int64_t(first) * p.frames + (job - 1) * kRows, p.by_head), Weight::kEmotion, tile, part, kSplit);
      // The gate's stay until the unit ends.
      float* own = partials() + (job == 0 ? part : kSplit + warp) * 128 + lane;
#pragma unroll
      for (int i = 0; i < 4; ++i) own[i * kWarp] = sums.total(i);
      __syncthreads();
      if (job > 0 && job < jobs) {
        const float* of_job = partials() + (kSplit + warp - part) * 128 + part * kWarp + lane;
        const int row = (job - 1) * kRows + g + part / 2 * 8, column = t * 2 + part % 2, n = row % p.frames;
        float sum = of_job[0];
#pragma unroll
        for (int i = 1; i < kSplit; ++i) sum += of_job[i * 128];
        if (n < p.N) put(row / p.frames, n, column, sum + p.vector(Weight::kEmotionBias)[tile * kColumns + column]);
      }
      __syncthreads();
    }
    if (!projects) {
      const float* from = half == 0 ? p.routed_facts : p.emotions_of;
      const int stride = half == 0 ? p.width : p.emotion_columns();
      for (int i = threadIdx.x; i < videos * p.N * kColumns; i += kThreads) {
        const int column = i % kColumns, n = i / kColumns % p.N, video = i / kColumns / p.N;
        put(video, n, column, from[(int64_t(first + video) * p.frames + n) * stride + tile * kColumns + column]);
      }
    }
    if (!p.explain) return;
    S* shown = half == 0 ? p.fact_gate : p.emotion_gate;
    for (int i = threadIdx.x; i < videos * kColumns; i += kThreads) {
      const int column = tile * kColumns + i % kColumns;
      if (column < p.d) shown[int64_t(first + i / kColumns) * p.d + column] = narrow<S>(gate(i / kColumns, i % kColumns));
    }
  }

  // ---- what Attn_d reads of M, and the classification head ----

  __device__ void memory() const {
    constexpr int kSplit = 4, kTogether = kWarps / kSplit;
    const int each = (p.kinds - 1) * p.row_tiles, row_tiles = p.B * each, video_tiles = parts(p.B, kRows);
    const int of_memory = row_tiles * ((p.scores + p.by_head) / kColumns);
    const int tiles = of_memory + (p.emotions ? video_tiles * (p.words / kColumns) : 0);
    const int64_t together = parts(tiles, kTogether);
    const int shown = p.explain && p.emotions ? p.B * (p.augments ? p.K : 1) : 0;
    for_units(together + shown, [&](int unit) {
      if (unit >= together) return explain_emotions(unit - static_cast<int>(together));
      const int first = unit * kTogether, last = first + kTogether < tiles ? first + kTogether : tiles;
      for_tiles<kSplit, S>(
          first, last, partials(),
          [&](int tile, int part, Sums<S>& sums) {
            if (tile < of_memory)
              return multiply(sums, rows_of(p.fused, int64_t(tile % row_tiles) * kRows, p.width), Weight::kMemory, tile / row_tiles, part, kSplit);
            tile -= of_memory;
            const int video = tile % video_tiles * kRows;
            multiply(sums, rows_of(p.mean_context, video, p.by_head, p.B - video), Weight::kHead, tile / video_tiles, part, kSplit);
          },
          [&](int tile, int row, int column, float sum) {
            if (tile < of_memory) {
              const int m = tile % row_tiles;
              return remember(m / each, m % each / p.row_tiles, m % p.row_tiles * kRows + row, tile / row_tiles * kColumns + column, sum);
            }
            tile -= of_memory, row += tile % video_tiles * kRows, column += tile / video_tiles * kColumns;
            if (row < p.B && column < p.W)
              p.emotion_logits[int64_t(row) * p.W + column] = narrow<S>(sum + p.vector(Weight::kHeadBias)[column]);
          });
    });
  }
  // Weights of (19), mean over heads, by the mean row of (20). index: of a triplet, or of a video where emotions come first.
  __device__ void explain_emotions(int index) const {
    const int64_t row = int64_t(index) * p.frames;
    const float* bias = p.gate_bias + int64_t(p.augments ? index / p.K : index) * p.frames;
    const auto row_stats = [&](int count, float* to, const auto& score) {
      float best = -INFINITY, total = 0;
      for (int i = lane; i < count; i += kWarp) best = Max::join(score(i), best);
      best = warp_max(best);
      for (int i = lane; i < count; i += kWarp) total += expf(score(i) - best);
      total = warp_sum(total);
      if (lane == 0) to[0] = best, to[1] = 1 / total;
    };
    for (int i = warp; i < p.N * p.heads; i += kWarps) {
      const float* scores = p.word_scores + row * p.heads * p.words + int64_t(i) * p.words;
      row_stats(p.W, p.word_stats + (row * p.heads + i) * 2, [&](int w) { return scores[w]; });
    }
    for (int n = warp; n < p.N; n += kWarps) {
      const float* scores = p.gate_scores + (row + n) * p.frames_deep;
      row_stats(p.N, p.gate_stats + (row + n) * 2, [&](int j) { return scores[j] + bias[j]; });
    }
    __syncthreads();
    for (int j = threadIdx.x; j < p.N; j += kThreads) {
      float sum = 0;
      for (int n = 0; n < p.N; ++n) {
        const float* stats = p.gate_stats + (row + n) * 2;
        sum += expf(p.gate_scores[(row + n) * p.frames_deep + j] + bias[j] - stats[0]) * stats[1];
      }
      p.mean_gate[row + j] = sum / static_cast<float>(p.N * p.heads);
    }
    __syncthreads();
    for (int w = threadIdx.x; w < p.W; w += kThreads) {
      float sum = 0;
      for (int n = 0; n < p.N; ++n) {
        float of_frame = 0;
        for (int h = 0; h < p.heads; ++h) {
          const int64_t i = (row + n) * p.heads + h;
          of_frame += expf(p.word_scores[i * p.words + w] - p.word_stats[i * 2]) * p.word_stats[i * 2 + 1];
        }
        sum = fmaf(p.mean_gate[row + n], of_frame, sum);
      }
      const int copies = p.augments ? 1 : p.K;
      for (int k = 0; k < copies; ++k) p.emotion_distribution[(int64_t(index) * copies + k) * p.W + w] = sum;
    }
  }

  // ---- Attn_d's reading and the output (29): each block reads all of a video's memory, for its part of the columns ----

  __device__ void tokens() const {
    const int query_tiles = parts(p.queries, kRows), column_tiles = parts(p.output_width, kColumns);
    const int each = groups(p.B, column_tiles), stride = shared_stride<S>(p.by_head);
    for_units(int64_t(p.B) * each, [&](int unit) {
      const int b = unit % p.B, group = unit / p.B;
      const int begin = int(int64_t(column_tiles) * group / each), end = int(int64_t(column_tiles) * (group + 1) / each);
      read(b);
      __syncthreads();
      for_tiles<2, S>(
          begin * query_tiles, end * query_tiles, partials(),
          [&](int tile, int part, Sums<S>& sums) {
            multiply(sums, rows_of(operands(p.shared.read), tile % query_tiles * kRows, stride), Weight::kOutput, tile / query_tiles, part, 2);
          },
          [&](int tile, int row, int column, float sum) {
            row += tile % query_tiles * kRows, column += tile / query_tiles * kColumns;
            if (row >= p.queries || column >= p.output_width) return;
            const float x = sum + p.vector(Weight::kOutputBias)[int64_t(row) * p.output_width + column];
            p.tokens[(int64_t(b) * p.queries + row) * p.output_width + column] = narrow<S>(x);
          });
    });
  }
  // softmax(scores) values of all heads, into operands(p.shared.read).
  __device__ void read(int b) const {
    constexpr int kTiles = 5;  // that share a softmax
    const int query_tiles = parts(p.queries, kRows), of_head = p.head_width / kColumns, all = p.by_head / kColumns;
    const int rest = all - p.heads * of_head, chunks = parts(of_head + rest, kTiles);  // the last head also fills the padding
    for (int job = warp; job < p.heads * query_tiles * chunks; job += kWarps) {
      const int h = job / chunks % p.heads, q = job / chunks / p.heads * kRows + g;
      const int tile = h * of_head + job % chunks * kTiles, end = h + 1 < p.heads ? (h + 1) * of_head : all;
      if (tile >= end) continue;
      const int count = end - tile < kTiles ? end - tile : kTiles;
      const float* scores = p.memory_scores + (int64_t(b) * p.scores + h * p.queries + q) * p.slots;
      Right<S> values[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const int own = i < count ? tile + i : tile;
        values[i] = Right<S>::of_rows(p.memory_values + (int64_t(b) * p.by_head + own * kColumns) * p.slots, p.slots);
      }
      float x[kTiles][4];
      attend<S, kTiles>(
          x, values, count, p.slots / kDeep,
          [&](int i, int slot, float (&score)[8]) {
            const int left = slot < p.kinds * p.frames ? p.N - slot % p.frames : 0;
            if (q + i * 8 < p.queries) return load_eight(scores + i * 8 * int64_t(p.slots) + slot, left, score);
#pragma unroll
            for (int j = 0; j < 8; ++j) score[j] = 0;
          },
          exchange());
      const int stride = shared_stride<S>(p.by_head);
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        if (i < count)
#pragma unroll
          for (int j = 0; j < 4; ++j) operands(p.shared.read)[(q + j / 2 * 8) * stride + (tile + i) * kColumns + t * 2 + j % 2] = narrow<S>(x[i][j]);
    }
  }
};

}  // namespace evc::folded
