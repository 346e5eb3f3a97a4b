// The folded encoder's stages from the features to the facts F (10)-(18), and the scores of the facts' attentions.
#pragma once

#include "calibration.cuh"
#include "folded_block.cuh"

namespace evc::folded {

template <class S>
struct Facts : Block<S> {
  typedef FoldedCudaWeight Weight;
  using Block<S>::Block, Block<S>::p, Block<S>::floats, Block<S>::operands, Block<S>::partials, Block<S>::lane, Block<S>::warp;
  using Block<S>::g, Block<S>::t, Block<S>::for_units, Block<S>::for_units_of, Block<S>::groups, Block<S>::packed, Block<S>::steps;
  using Block<S>::expect_packed;
  using Block<S>::exchange, Block<S>::rows_of, Block<S>::multiply_packed, Block<S>::remember;

  // ---- all products of the features, and the weights of (10)-(15) ----

  __device__ void products() const {
    constexpr int kSplit = 2, kTogether = kWarps / kSplit;
    const int columns = p.visual_columns / kColumns, triplet_columns = 2 * p.by_head / kColumns, triplet_rows = 3 * p.B * p.K;
    const int of_video = p.B * p.row_tiles * columns;
    const int tiles = of_video + (p.retrieval ? parts(triplet_rows, kRows) * triplet_columns : 0), units = parts(tiles, kTogether);
    for_units(units + (p.retrieval ? p.B * p.K : 0), [&](int unit) {
      if (unit >= units) return calibrate(unit - units);
      const int first = unit * kTogether, last = least(first + kTogether, tiles);
      for_tiles<kSplit, S>(
          first, last, partials(),
          [&](int tile, int, int column) { return tile < of_video ? p.vector(Weight::kVisualBias)[tile % columns * kColumns + column] : 0.0f; },
          [&](Sums<S>& sums, int tile, int part) {
            const bool visual = tile < of_video;
            const int own = visual ? tile : tile - of_video, wide = visual ? columns : triplet_columns, m = own / wide, column = own % wide;
            const int b = m / p.row_tiles, n = (visual ? m % p.row_tiles : m) * kRows + g;
            const int64_t row = visual ? int64_t(b) * p.N + n : n;
            const int left = visual ? p.N - n : triplet_rows - n, depth = visual ? p.video_width : p.text_width;
            const Weight w = visual ? Weight::kVisual : Weight::kTriplet;
            const Right<S> right = Right<S>::packed(p.matrix(w), p.size(w).depth, column);
            const Range range = part_of(steps(w), part, kSplit);
            const void* from = visual ? p.video : p.triplets;
            const bool aligned = visual ? p.videos_aligned : p.triplets_aligned;
            if constexpr (sizeof(S) == 2)
              if (!p.wide_features) return multiply(sums, features(static_cast<const S*>(from), row, left, depth, aligned), right, range, exchange());
            multiply(sums, features(static_cast<const float*>(from), row, left, depth, aligned), right, range, exchange());
          },
          [&](int tile, int row, int column, float sum) {
            if (tile < of_video) return put_visual(int64_t(tile / columns) * kRows + row, tile % columns * kColumns + column, sum);
            tile -= of_video;
            row += tile / triplet_columns * kRows, column += tile % triplet_columns * kColumns;
            p.keys_values[int64_t(row) * 2 * p.by_head + column] = sum;
          });
    });
  }
  // row: the lane's upper; the first `left` from it on are there.
  template <class In>
  __device__ static Features<In> features(const In* all, int64_t row, int left, int depth, bool aligned) {
    const In* own = all + row * depth;
    return {{left > 0 ? own : nullptr, left > 8 ? own + 8 * int64_t(depth) : nullptr}, depth, aligned};
  }
  // row: of all videos' frames.
  __device__ void put_visual(int64_t row, int column, float x) const {
    if (column < p.width) {
      p.visual[row * p.width + column] = x;
      if (p.emotion_first) p.visual_operand[row * p.width + column] = narrow<S>(x);
    } else if (column < p.query_at) {
      column -= p.width;
      if (p.retrieval) p.of_visual[row * p.hidden + column] = x;
      else p.hidden_layer[row * p.hidden + column] = narrow<S>(gelu(x));
    } else if (column < p.words_at) {
      p.query[row * p.by_head + column - p.query_at] = x;
    } else if (column < p.gate_at) {
      put_word_score(row, column - p.words_at, x);
    } else if (column < p.gate_bias_at) {
      p.gate_key[row * p.width + column - p.gate_at] = narrow<S>(x);
    } else if (column < p.scores_at) {
      if (column == p.gate_bias_at) p.gate_bias[row] = x;
    } else {
      const int b = static_cast<int>(row / p.frames);
      remember(b, p.kinds - 1, static_cast<int>(row - int64_t(b) * p.frames), column - p.scores_at, x);
    }
  }
  __device__ void put_word_score(int64_t row, int column, float x) const {
    p.word_scores[row * (p.heads * p.words) + column] = column % p.words < p.W ? x : -INFINITY;
  }
  __device__ void calibrate(int pair) const {  // (13) and (16) scale whole rows, after their product
    const int b = pair / p.K, k = pair % p.K;
    float* of_block = floats(p.shared.calibration);
    if (warp < 3) {
      float h = 0;
      const int64_t row = (int64_t(pair) * 3 + warp) * p.text_width;
      if (p.self_refine && p.wide_features) h = entropy(static_cast<const float*>(p.triplets) + row, p.text_width);
      else if (p.self_refine) h = entropy(static_cast<const S*>(p.triplets) + row, p.text_width);
      if (lane == 0) of_block[warp] = h;
    } else if (warp == 3) {
      float theta = 1.0f / static_cast<float>(p.K);
      const int64_t first = int64_t(b) * p.K;
      const int64_t* groups = p.groups ? p.groups + first : nullptr;
      const auto similarity = [&](int64_t i) {
        return p.wide_similarity ? static_cast<const float*>(p.similarity)[first + i] : widen(static_cast<const S*>(p.similarity)[first + i]);
      };
      if (p.cross_refine) theta = triplet_weight(similarity, groups, p.K, k);
      if (lane == 0) of_block[3] = theta;
    }
    __syncthreads();
    if (threadIdx.x >= 3) return;
    const float total = of_block[0] + of_block[1] + of_block[2], theta = of_block[3];
    const float alpha = p.self_refine && total != 0 ? of_block[threadIdx.x] / total : 1.0f / 3.0f;  // (12)
    p.calibration[int64_t(pair) * 3 + threadIdx.x] = theta * alpha;
    if (!p.explain) return;
    p.component_weights[int64_t(pair) * 3 + threadIdx.x] = alpha;
    if (threadIdx.x == 0) p.triplet_weights[pair] = theta;
  }

  // ---- emotions first: (20) of V, and E with Attn_f's q of it ----

  __device__ void gate_of_frames() const {
    const int columns = p.frames / kColumns;
    for_units_of(p.B * p.row_tiles * columns, kWarps / 2, [&](int first, int last) {
      for_tiles<2, S>(
          first, last, partials(),
          [&](int tile, int, int column) { return gate_bias(tile / columns / p.row_tiles, tile % columns * kColumns + column); },
          [&](Sums<S>& sums, int tile, int part) {
            const int m = tile / columns;
            multiply_gate<false>(sums, rows_of(p.visual_operand, int64_t(m) * kRows, p.width), m / p.row_tiles, tile % columns, part);
          },
          [&](int tile, int row, int column, float sum) {
            put_gate_score(int64_t(tile / columns) * kRows + row, tile % columns * kColumns + column, sum);
          });
    });
  }
  // One of two parts of a tile of (20)'s scores: with frames [8 tile, 8 tile + 8) of video b.
  template <bool shared>
  __device__ void multiply_gate(Sums<S>& sums, const Rows<S>& rows, int b, int tile, int part) const {
    const S* keys = p.gate_key + (int64_t(b) * p.frames + tile * kColumns) * p.width;
    multiply<5, shared>(sums, rows, Right<S>::of_rows(keys, p.width), part_of(p.width / kDeep, part, 2));
  }
  __device__ float gate_bias(int b, int frame) const { return p.gate_bias[int64_t(b) * p.frames + frame]; }
  __device__ void put_gate_score(int64_t row, int column, float x) const {
    float* to = p.gate_scores + row * p.frames_deep + column;
    *to = column < p.N ? x : -INFINITY;
    if (column >= p.frames - kRows && p.frames < p.frames_deep) to[kRows] = -INFINITY;  // half a step without a frame
  }
  __device__ void emotions_of_frames() const {
    const int width = p.emotion_columns(), columns = width / kColumns;
    for_units_of(p.B * p.row_tiles * columns, kWarps / 2, [&](int first, int last) {
      for_tiles<2, S>(
          first, last, partials(),
          [&](int tile, int, int column) { return p.vector(Weight::kEmotionBias)[tile % columns * kColumns + column]; },
          [&](Sums<S>& sums, int tile, int part) {
            const Rows<S> rows = rows_of(p.routed_context, int64_t(tile / columns) * kRows, p.by_head);
            multiply_packed(sums, rows, Weight::kEmotion, tile % columns, part, 2);
          },
          [&](int tile, int row, int column, float sum) {
            p.emotions_of[(int64_t(tile / columns) * kRows + row) * width + tile % columns * kColumns + column] = sum;
          });
    });
  }

  // ---- the FFN's hidden layer of 16 frames and one triplet (17), (18), and that triplet's part of the logits (26) ----

  __device__ void hidden() const {
    const int row_tiles = p.B * p.K * p.row_tiles, of_hidden = p.hidden / kColumns, of_router = p.router / kColumns;
    const int tiles = of_hidden + of_router, each = groups(row_tiles, tiles), stride = shared_stride<S>(p.by_head);
    for_units(row_tiles * each, [&](int unit) {
      const int m = unit / each, group = unit % each, pair = m / p.row_tiles, k = pair % p.K;
      const int64_t frame = int64_t(pair / p.K) * p.frames + m % p.row_tiles * kRows;
      const int begin = int(int64_t(tiles) * group / each), end = int(int64_t(tiles) * (group + 1) / each);
      const auto packed_tile = [&](int tile) { return tile < of_hidden ? tile : tile + k * of_router; };
      if (begin + warp < end) expect_packed(Weight::kHidden, packed_tile(begin + warp));
      attend_to_triplet(pair, frame);
      for_tiles<1, S>(
          begin, end, partials(),
          [&](int tile, int row, int column) {
            return tile < of_hidden ? p.of_visual[(frame + row) * p.hidden + tile * kColumns + column] : 0.0f;
          },
          [&](Sums<S>& sums, int tile, int) {
            this->template multiply_packed<10, true>(sums, rows_of(operands(p.shared.h), 0, stride), Weight::kHidden, packed_tile(tile));
          },
          [&](int tile, int row, int column, float sum) {
            const int64_t to = int64_t(m) * kRows + row;
            if (tile < of_hidden) p.hidden_layer[to * p.hidden + tile * kColumns + column] = narrow<S>(gelu(sum));
            else p.router_parts[to * p.router + (tile - of_hidden) * kColumns + column] = sum;
          });
    });
  }
  // H (17) of frames [frame, frame + 16) into shared memory.
  __device__ void attend_to_triplet(int pair, int64_t frame) const {
    const int from_stride = p.query_of_emotions ? p.emotion_columns() : p.by_head, stride = rows_stride(p.by_head), quads = p.by_head / 4;
    const float* from = p.query_of_emotions ? p.emotions_of + p.width : p.query;
    float *query = floats(p.shared.query), *keys = floats(p.shared.keys_values), *attention = floats(p.shared.attention);
    copy_quads(kRows * quads, [&](int i) { return from + (frame + i / quads) * from_stride + i % quads * 4; },
               [&](int i) { return query + i / quads * stride + i % quads * 4; });
    copy_quads(3 * 2 * quads, [&](int i) { return p.keys_values + int64_t(pair) * 3 * 2 * p.by_head + i * 4; }, [&](int i) { return keys + i * 4; });
    const float scale[3] = {p.calibration[int64_t(pair) * 3], p.calibration[int64_t(pair) * 3 + 1], p.calibration[int64_t(pair) * 3 + 2]};
    __syncthreads();
    // Four lanes for a frame's three scores in one head.
    const int jobs = kRows * p.heads, whole = round_up(jobs, kThreads / 4);
#pragma unroll 1
    for (int job = threadIdx.x / 4; job < whole; job += kThreads / 4) {
      const int h = job < jobs ? job / kRows : 0, n = job % kRows;
      const float *q = query + n * stride + h * p.head_width, *key = keys + h * p.head_width;
      float score[3] = {};
#pragma unroll 1
      for (int i = t * 4; i < p.head_width; i += 16) {
        float x[4], y[4];
        load_vector(q + i, x);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          load_vector(key + c * 2 * p.by_head + i, y);
          score[c] += x[0] * y[0] + x[1] * y[1] + (x[2] * y[2] + x[3] * y[3]);
        }
      }
      float best = -INFINITY, total = 0;
#pragma unroll
      for (int c = 0; c < 3; ++c) best = fmaxf(score[c] = warp_sum<4>(score[c]) * scale[c], best);
#pragma unroll
      for (int c = 0; c < 3; ++c) total += score[c] = expf(score[c] - best);
      if (t < 3 && job < jobs)
        attention[(n * p.heads + h) * 3 + t] = (t == 0 ? score[0] * scale[0] : t == 1 ? score[1] * scale[1] : score[2] * scale[2]) / total;
    }
    __syncthreads();
    const float* values = keys + p.by_head;
    const int chunks = p.by_head / 8, to_stride = shared_stride<S>(p.by_head);
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
      const int n = i / chunks, column = i % chunks * 8, h = column / p.head_width;
      float x[8] = {}, value[8];
      if (h < p.heads)
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          load_eight(values + c * 2 * p.by_head, column, value);
#pragma unroll
          for (int j = 0; j < 8; ++j) x[j] = fmaf(attention[(n * p.heads + h) * 3 + c], value[j], x[j]);
        }
      S* to = operands(p.shared.h) + n * to_stride + column;
      if constexpr (sizeof(S) == 2) {
        store_vector(x, to);
      } else {
        store_vector({x[0], x[1], x[2], x[3]}, to);
        store_vector({x[4], x[5], x[6], x[7]}, to + 4);
      }
    }
    __syncthreads();
  }
  // Four floats at a time by the whole block, as many loads as can be under way.
  template <class From, class To>
  __device__ static void copy_quads(int count, const From& from, const To& to) {
    constexpr int kAhead = 5;
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += kAhead * kThreads) {
      float x[kAhead][4];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i * kThreads < count) load_vector(from(first + i * kThreads), x[i]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i * kThreads < count) store_vector(x[i], to(first + i * kThreads));
    }
  }

  // ---- the FFN's second layer with its residual (18) ----

  __device__ void ffn() const {
    constexpr int kSplit = 4, kTogether = kWarps / kSplit;
    const int columns = p.width / kColumns, stride = p.emotion_first ? p.emotion_columns() : p.width;
    const float* residual = p.emotion_first ? p.emotions_of : p.visual;
    const int tiles = p.B * p.K * p.row_tiles * columns, units = parts(tiles, kTogether);
    for_units(units + p.B, [&](int unit) {
      if (unit >= units) return weigh(unit - units);
      const int first = unit * kTogether, last = least(first + kTogether, tiles);
      for_tiles<kSplit, S>(
          first, last, partials(),
          [&](int tile, int row, int column) {
            const int m = tile / columns;
            const int64_t frame = int64_t(m / p.row_tiles / p.K) * p.frames + m % p.row_tiles * kRows + row;
            column += tile % columns * kColumns;
            return p.vector(Weight::kFfnBias)[column] + residual[frame * stride + column];
          },
          [&](Sums<S>& sums, int tile, int part) {
            const Rows<S> rows = rows_of(p.hidden_layer, int64_t(tile / columns) * kRows, p.hidden);
            this->template multiply_packed<10>(sums, rows, Weight::kFfn, tile % columns, part, kSplit);
          },
          [&](int tile, int row, int column, float sum) {
            p.updated[(int64_t(tile / columns) * kRows + row) * p.width + tile % columns * kColumns + column] = sum;
          });
    });
  }

  // The routing weights of a video (26).
  __device__ void weigh(int b) const {
    float *weights = p.weights + int64_t(b) * p.N * p.K, *logits = floats(p.shared.logits);
#pragma unroll 1
    for (int i = threadIdx.x; i < p.N * p.K; i += kThreads) {
      float logit = 0;
      if (p.routed) {
        const float* own = p.router_parts + (int64_t(b) * p.K * p.frames + i / p.K) * p.router + i % p.K;
        logit = p.vector(Weight::kRouterBias)[i % p.K];
#pragma unroll 1
        for (int k = 0; k < p.K; ++k) logit += own[int64_t(k) * p.frames * p.router];
      }
      weights[i] = logit;
    }
    __syncthreads();
#pragma unroll 1
    for (int j = threadIdx.x; p.video_router && j < p.K; j += kThreads) {
      float sum = 0;
#pragma unroll 1
      for (int n = 0; n < p.N; ++n) sum += weights[n * p.K + j];
      logits[j] = sum / static_cast<float>(p.N);
    }
    __syncthreads();
#pragma unroll 1
    for (int n = threadIdx.x; n < p.N; n += kThreads) {
      float *own = weights + n * p.K, best = -INFINITY, total = 0;
      const float* from = p.video_router ? logits : own;
#pragma unroll 1
      for (int k = 0; k < p.K; ++k) best = fmaxf(from[k], best);
#pragma unroll 1
      for (int k = 0; k < p.K; ++k) total += own[k] = expf(from[k] - best);
#pragma unroll 1
      for (int k = 0; k < p.K; ++k) own[k] /= total;
    }
  }

  // ---- F (18), and the scores of its two attentions (19), (20) ----

  __device__ void facts() const {
    const int row_tiles = p.B * p.K * p.row_tiles, stride = shared_stride<S>(p.width);
    const int of_words = p.augments ? p.heads * p.words / kColumns : 0;
    const int tiles = of_words + (p.augments ? p.frames / kColumns : 0), each = groups(row_tiles, tiles);
    for_units(row_tiles * each, [&](int unit) {
      const int m = unit / each, group = unit % each;
      const int begin = int(int64_t(tiles) * group / each), end = int(int64_t(tiles) * (group + 1) / each);
      if (begin + warp / 2 < least(end, of_words)) expect_packed(Weight::kWords, begin + warp / 2);
      normalise(m, group == 0);
      for_tiles<2, S>(
          begin, end, partials(),
          [&](int tile, int, int column) {
            if (tile < of_words) return p.vector(Weight::kWordsBias)[tile * kColumns + column];
            return gate_bias(m / p.row_tiles / p.K, (tile - of_words) * kColumns + column);
          },
          [&](Sums<S>& sums, int tile, int part) {
            const Rows<S> rows = rows_of(operands(p.shared.after), 0, stride);
            if (tile < of_words) return this->template multiply_packed<5, true>(sums, rows, Weight::kWords, tile, part, 2);
            multiply_gate<true>(sums, rows, m / p.row_tiles / p.K, tile - of_words, part);
          },
          [&](int tile, int row, int column, float sum) {
            const int64_t to = int64_t(m) * kRows + row;
            if (tile < of_words) put_word_score(to, tile * kColumns + column, sum);
            else put_gate_score(to, (tile - of_words) * kColumns + column, sum);
          });
    });
  }
  // LayerNorm of (18) of row tile m into shared memory, half a warp a row; `keep`: into facts, too.
  __device__ void normalise(int m, bool keep) const {
    constexpr int kHalf = kWarp / 2;
    const int quads = p.width / 4, stride = rows_stride(p.width);
    float *before = floats(p.shared.before), *norm = floats(p.shared.norm);
    copy_quads(kRows * quads, [&](int i) { return p.updated + int64_t(m) * kRows * p.width + i * 4; },
               [&](int i) { return before + i / quads * stride + i % quads * 4; });
    copy_quads(2 * quads, [&](int i) { return i < quads ? p.vector(Weight::kNormWeight) + i * 4 : p.vector(Weight::kNormBias) + (i - quads) * 4; },
               [&](int i) { return norm + i * 4; });
    __syncthreads();
    const int row = threadIdx.x / kHalf, begin = threadIdx.x % kHalf * 4;
    const float *x = before + row * stride, count = static_cast<float>(p.d);
    float y[4], sum = 0, squares = 0;
    for (int i = begin; i < p.width; i += kHalf * 4) {  // zeros beyond d
      load_vector(x + i, y);
      sum += y[0] + y[1] + (y[2] + y[3]);
    }
    const float mean = warp_sum<kHalf>(sum) / count;
    for (int i = begin; i < p.d; i += kHalf * 4) {
      load_vector(x + i, y);
#pragma unroll
      for (int j = 0; j < 4; ++j) squares += i + j < p.d ? (y[j] - mean) * (y[j] - mean) : 0;
    }
    const float scale = 1.0f / sqrtf(warp_sum<kHalf>(squares) / count + p.norm_eps);
    S* after = operands(p.shared.after) + row * shared_stride<S>(p.width);
    float* kept = p.facts + (int64_t(m) * kRows + row) * p.width;
    for (int i = begin; i < p.width; i += kHalf * 4) {
      load_vector(x + i, y);
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = i + j < p.d ? (y[j] - mean) * scale * norm[i + j] + norm[p.width + i + j] : 0;
      if constexpr (sizeof(S) == 2) *reinterpret_cast<uint2*>(after + i) = make_uint2(narrow_pair<S>(y[0], y[1]), narrow_pair<S>(y[2], y[3]));
      else store_vector(y, after + i);
      if (keep) store_vector(y, kept + i);
    }
    __syncthreads();
  }
};

}  // namespace evc::folded
