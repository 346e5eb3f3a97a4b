// The folded encoder's stages from the features to the facts F (10)-(18), and the scores of the facts' attentions.
#pragma once

#include "calibration.cuh"
#include "folded_block.cuh"

namespace evc::folded {

template <class S>
struct Facts : Block<S> {
  typedef FoldedCudaWeight Weight;
  typedef typename Block<S>::Rows Rows;
  using Block<S>::Block, Block<S>::p, Block<S>::floats, Block<S>::operands, Block<S>::partials, Block<S>::lane, Block<S>::warp, Block<S>::g, Block<S>::t;
  using Block<S>::for_units, Block<S>::groups, Block<S>::packed, Block<S>::steps, Block<S>::exchange, Block<S>::rows_of;
  using Block<S>::multiply, Block<S>::remember;

  // ---- all products of the features, and the weights of (10)-(15) ----

  __device__ void products() const {
    const int frame_tiles = p.B * p.row_tiles, of_video = frame_tiles * (p.visual_columns / kColumns);
    const int triplet_rows = 3 * p.B * p.K, triplet_tiles = parts(triplet_rows, kRows);
    const int tiles = of_video + (p.retrieval ? triplet_tiles * (2 * p.by_head / kColumns) : 0);
    constexpr int kSplit = 2, kTogether = kWarps / kSplit;
    const int64_t together = parts(tiles, kTogether);
    for_units(together + (p.retrieval ? int64_t(p.B) * p.K : 0), [&](int unit) {
      if (unit >= together) return calibrate(unit - static_cast<int>(together));
      const int first = unit * kTogether, last = first + kTogether < tiles ? first + kTogether : tiles;
      for_tiles<kSplit, S>(
          first, last, partials(),
          [&](int tile, int part, Sums<S>& sums) {
            if (tile < of_video) {
              const int b = tile % frame_tiles / p.row_tiles, n = tile % p.row_tiles * kRows + g;
              const int64_t row = int64_t(b) * p.N + n;
              return multiply(sums, p.video, p.videos_aligned, p.video_width, {n < p.N ? row : -1, n + 8 < p.N ? row + 8 : -1},
                              Weight::kVisual, tile / frame_tiles, part, kSplit);
            }
            const int row = (tile - of_video) % triplet_tiles * kRows + g;
            multiply(sums, p.triplets, p.triplets_aligned, p.text_width, {row < triplet_rows ? row : -1, row + 8 < triplet_rows ? row + 8 : -1},
                     Weight::kTriplet, (tile - of_video) / triplet_tiles, part, kSplit);
          },
          [&](int tile, int row, int column, float sum) {
            if (tile < of_video) return put_visual(tile % frame_tiles * kRows + row, tile / frame_tiles * kColumns + column, sum);
            row += (tile - of_video) % triplet_tiles * kRows, column += (tile - of_video) / triplet_tiles * kColumns;
            p.keys_values[int64_t(row) * 2 * p.by_head + column] = sum;
          });
    });
  }
  // rows: of features [.., depth], -1 for zeros.
  __device__ void multiply(Sums<S>& sums, const void* features, bool aligned, int depth, const int64_t (&rows)[2], Weight w, int tile,
                           int part, int of) const {
    const Range range = part_of(steps(w), part, of);
    if (p.wide_features)
      Features<S, float>{static_cast<const float*>(features), depth, aligned}.multiply(sums, rows, packed(w, tile), range, exchange());
    else if constexpr (sizeof(S) == 2)
      Features<S, S>{static_cast<const S*>(features), depth, aligned}.multiply(sums, rows, packed(w, tile), range, exchange());
  }
  // row: of all videos' frames.
  __device__ void put_visual(int64_t row, int column, float x) const {
    x += p.vector(Weight::kVisualBias)[column];
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
      p.word_scores[row * (p.heads * p.words) + column - p.words_at] = x;
    } else if (column < p.gate_bias_at) {
      p.gate_key[row * p.width + column - p.gate_at] = narrow<S>(x);
    } else if (column < p.scores_at) {
      if (column == p.gate_bias_at) p.gate_bias[row] = x;
    } else {
      const int b = static_cast<int>(row / p.frames);
      remember(b, p.kinds - 1, static_cast<int>(row - int64_t(b) * p.frames), column - p.scores_at, x);
    }
  }
  __device__ void calibrate(int pair) const {  // (13) and (16) scale whole rows, after their product
    const int64_t b = pair / p.K, k = pair % p.K;
    if (warp < 3) {
      float h = 0;
      const int64_t row = (int64_t(pair) * 3 + warp) * p.text_width;
      if (p.self_refine && p.wide_features) h = entropy(static_cast<const float*>(p.triplets) + row, p.text_width);
      else if (p.self_refine) h = entropy(static_cast<const S*>(p.triplets) + row, p.text_width);
      if (lane == 0) floats(p.shared.calibration)[warp] = h;
    } else if (warp == 3) {
      float theta = 1.0f / static_cast<float>(p.K);
      const int64_t* groups = p.groups ? p.groups + b * p.K : nullptr;
      if (p.cross_refine && p.wide_similarity) theta = triplet_weight(static_cast<const float*>(p.similarity) + b * p.K, groups, p.K, k);
      else if (p.cross_refine) theta = triplet_weight(static_cast<const S*>(p.similarity) + b * p.K, groups, p.K, k);
      if (lane == 0) floats(p.shared.calibration)[3] = theta;
    }
    __syncthreads();
    if (threadIdx.x >= 3) return;
    const float total = floats(p.shared.calibration)[0] + floats(p.shared.calibration)[1] + floats(p.shared.calibration)[2], theta = floats(p.shared.calibration)[3];
    const float alpha = p.self_refine && total != 0 ? floats(p.shared.calibration)[threadIdx.x] / total : 1.0f / 3.0f;  // (12)
    p.calibration[int64_t(pair) * 3 + threadIdx.x] = theta * alpha;
    if (!p.explain) return;
    p.component_weights[int64_t(pair) * 3 + threadIdx.x] = alpha;
    if (threadIdx.x == 0) p.triplet_weights[pair] = theta;
  }

  // ---- emotions first: (20) of V, and E with Attn_f's q of it ----

  __device__ void gate_of_frames() const {
    const int row_tiles = p.B * p.row_tiles, tiles = row_tiles * (p.frames / kColumns), together = kWarps / 2;
    for_units(parts(tiles, together), [&](int unit) {
      const int first = unit * together, last = first + together < tiles ? first + together : tiles;
      for_tiles<2, S>(
          first, last, partials(),
          [&](int tile, int part, Sums<S>& sums) {
            const int m = tile % row_tiles;
            gate_product(sums, rows_of(p.visual_operand, int64_t(m) * kRows, p.width), m / p.row_tiles, tile / row_tiles, part);
          },
          [&](int tile, int row, int column, float sum) {
            const int64_t m = int64_t(tile % row_tiles) * kRows + row;
            p.gate_scores[m * p.frames_deep + tile / row_tiles * kColumns + column] = sum;
          });
    });
  }
  // One of two parts of a tile of (20)'s scores: with frames [8 tile, 8 tile + 8) of video b.
  __device__ void gate_product(Sums<S>& sums, const Rows& rows, int b, int tile, int part) const {
    const S* keys = p.gate_key + (int64_t(b) * p.frames + tile * kColumns) * p.width;
    sums.multiply(rows.at, Right<S>::of_rows(keys, p.width), part_of(p.width / kDeep, part, 2));
  }
  __device__ void emotions_of_frames() const {
    const int row_tiles = p.B * p.row_tiles, columns = p.emotion_columns();
    const int tiles = row_tiles * (columns / kColumns), together = kWarps / 2;
    for_units(parts(tiles, together), [&](int unit) {
      const int first = unit * together, last = first + together < tiles ? first + together : tiles;
      for_tiles<2, S>(
          first, last, partials(),
          [&](int tile, int part, Sums<S>& sums) {
            multiply(sums, rows_of(p.routed_context, int64_t(tile % row_tiles) * kRows, p.by_head), Weight::kEmotion, tile / row_tiles, part, 2);
          },
          [&](int tile, int row, int column, float sum) {
            column += tile / row_tiles * kColumns;
            p.emotions_of[(int64_t(tile % row_tiles) * kRows + row) * columns + column] = sum + p.vector(Weight::kEmotionBias)[column];
          });
    });
  }

  // ---- the FFN's hidden layer of 16 frames and one triplet (17), (18), and that triplet's part of the logits (26) ----

  __device__ void hidden() const {
    const int row_tiles = p.B * p.K * p.row_tiles, of_hidden = p.hidden / kColumns, of_router = p.router / kColumns;
    const int tiles = of_hidden + of_router, each = groups(row_tiles, tiles), stride = shared_stride<S>(p.by_head);
    for_units(int64_t(row_tiles) * each, [&](int unit) {
      const int m = unit % row_tiles, group = unit / row_tiles, pair = m / p.row_tiles;
      const int64_t frame = int64_t(pair / p.K) * p.frames + m % p.row_tiles * kRows;
      attend_to_triplet(pair, frame);
      for_tiles<1, S>(
          int(int64_t(tiles) * group / each), int(int64_t(tiles) * (group + 1) / each), partials(),
          [&](int tile, int, Sums<S>& sums) {
            const int own = tile < of_hidden ? tile : tile + pair % p.K * of_router;
            multiply(sums, rows_of(operands(p.shared.h), 0, stride), Weight::kHidden, own);
          },
          [&](int tile, int row, int column, float sum) {
            const int64_t to = int64_t(m) * kRows + row;
            if (tile < of_hidden) {
              column += tile * kColumns;
              p.hidden_layer[to * p.hidden + column] = narrow<S>(gelu(sum + p.of_visual[(frame + row) * p.hidden + column]));
            } else {
              p.router_parts[to * p.router + (tile - of_hidden) * kColumns + column] = sum;
            }
          });
    });
  }
  // H (17) of frames [frame, frame + 16) into operands(p.shared.h): four lanes for a frame's three scores in one head.
  __device__ void attend_to_triplet(int pair, int64_t frame) const {
    const float* query = p.query_of_emotions ? p.emotions_of + p.width : p.query;
    const int query_stride = p.query_of_emotions ? p.emotion_columns() : p.by_head;
    const float* keys = p.keys_values + int64_t(pair) * 3 * 2 * p.by_head;
    const float* calibration = p.calibration + int64_t(pair) * 3;
    const int jobs = kRows * p.heads, whole = round_up(jobs, kThreads / 4);
    for (int job = threadIdx.x / 4; job < whole; job += kThreads / 4) {
      const int h = job < jobs ? job / kRows : 0, n = job % kRows;
      const float* q = query + (frame + n) * query_stride + h * p.head_width;
      float score[3] = {};
#pragma unroll 5
      for (int i = t * 4; i < p.head_width; i += 16) {
        float x[4], key[4];
        load_vector(q + i, x);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          load_vector(keys + c * 2 * p.by_head + h * p.head_width + i, key);
          score[c] += x[0] * key[0] + x[1] * key[1] + (x[2] * key[2] + x[3] * key[3]);
        }
      }
      float best = -INFINITY, total = 0;
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        score[c] = warp_sum<4>(score[c]) * calibration[c];
        best = Max::join(score[c], best);
      }
#pragma unroll
      for (int c = 0; c < 3; ++c) total += score[c] = expf(score[c] - best);
      if (t < 3 && job < jobs) {
        const float share = t == 0 ? score[0] : t == 1 ? score[1] : score[2];
        floats(p.shared.attention)[(n * p.heads + h) * 3 + t] = share / total * calibration[t];
      }
    }
    __syncthreads();
    const float* values = keys + p.by_head;
    const int chunks = p.by_head / 8, stride = shared_stride<S>(p.by_head);
    for (int i = threadIdx.x; i < kRows * chunks; i += kThreads) {
      const int n = i / chunks, column = i % chunks * 8, h = column / p.head_width;
      float x[8] = {};
      if (h < p.heads)
#pragma unroll
        for (int c = 0; c < 3; ++c) {
          const float weight = floats(p.shared.attention)[(n * p.heads + h) * 3 + c];
          float value[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            load_vector(values + c * 2 * p.by_head + column + half * 4, value);
#pragma unroll
            for (int j = 0; j < 4; ++j) x[half * 4 + j] = fmaf(weight, value[j], x[half * 4 + j]);
          }
        }
      put_eight(x, operands(p.shared.h) + n * stride + column);
    }
    __syncthreads();
  }
  __device__ static void put_eight(const float (&x)[8], S* to) {
    if constexpr (sizeof(S) == 2) {
      store_vector(x, to);
    } else {
      store_vector({x[0], x[1], x[2], x[3]}, to);
      store_vector({x[4], x[5], x[6], x[7]}, to + 4);
    }
  }

  // ---- the FFN's second layer with its residual (18) ----

  __device__ void ffn() const {
    constexpr int kSplit = 4, kTogether = kWarps / kSplit;
    const int row_tiles = p.B * p.K * p.row_tiles, tiles = row_tiles * (p.width / kColumns);
    const float* residual = p.emotion_first ? p.emotions_of : p.visual;
    const int stride = p.emotion_first ? p.emotion_columns() : p.width;
    for_units(parts(tiles, kTogether), [&](int unit) {
      const int first = unit * kTogether, last = first + kTogether < tiles ? first + kTogether : tiles;
      for_tiles<kSplit, S>(
          first, last, partials(),
          [&](int tile, int part, Sums<S>& sums) {
            multiply(sums, rows_of(p.hidden_layer, int64_t(tile % row_tiles) * kRows, p.hidden), Weight::kFfn, tile / row_tiles, part, kSplit);
          },
          [&](int tile, int row, int column, float sum) {
            const int m = tile % row_tiles;
            const int64_t frame = int64_t(m / p.row_tiles / p.K) * p.frames + m % p.row_tiles * kRows + row;
            column += tile / row_tiles * kColumns;
            p.updated[(int64_t(m) * kRows + row) * p.width + column] =
                sum + p.vector(Weight::kFfnBias)[column] + residual[frame * stride + column];
          });
    });
  }

  // ---- F (18), and the scores of its two attentions (19), (20) ----

  __device__ void facts() const {
    const int row_tiles = p.B * p.K * p.row_tiles, stride = shared_stride<S>(p.width);
    const int of_words = p.augments ? p.heads * p.words / kColumns : 0;
    const int tiles = of_words + (p.augments ? p.frames / kColumns : 0), each = groups(row_tiles, tiles);
    for_units(int64_t(row_tiles) * each, [&](int unit) {
      const int m = unit % row_tiles, group = unit / row_tiles;
      normalise(m, group == 0);
      for_tiles<2, S>(
          int(int64_t(tiles) * group / each), int(int64_t(tiles) * (group + 1) / each), partials(),
          [&](int tile, int part, Sums<S>& sums) {
            const Rows rows = rows_of(operands(p.shared.after), 0, stride);
            if (tile < of_words) multiply(sums, rows, Weight::kWords, tile, part, 2);
            else gate_product(sums, rows, m / p.row_tiles / p.K, tile - of_words, part);
          },
          [&](int tile, int row, int column, float sum) {
            const int64_t to = int64_t(m) * kRows + row;
            column += tile * kColumns;
            if (tile < of_words) p.word_scores[to * (p.heads * p.words) + column] = sum + p.vector(Weight::kWordsBias)[column];
            else p.gate_scores[to * p.frames_deep + column - of_words * kColumns] = sum;
          });
    });
  }
  // LayerNorm of (18) of row tile m into operands(p.shared.after); `keep`: into facts, too.
  __device__ void normalise(int m, bool keep) const {
    const int quads = p.width / 4, stride = shared_stride<S>(p.width);
    const float *from = p.updated + int64_t(m) * kRows * p.width, *weight = p.vector(Weight::kNormWeight), *bias = p.vector(Weight::kNormBias);
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * quads; i += kThreads) {
      float x[4];
      load_vector(from + i * 4, x);
      store_vector(x, floats(p.shared.before) + i / quads * (p.width + 4) + i % quads * 4);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows / kWarps; ++r) {
      const int row = warp + r * kWarps;
      const float* x = floats(p.shared.before) + row * (p.width + 4);
      float sum = 0, squares = 0;
      for (int i = lane; i < p.d; i += kWarp) sum += x[i];
      const float mean = warp_sum(sum) / static_cast<float>(p.d);
      for (int i = lane; i < p.d; i += kWarp) squares += (x[i] - mean) * (x[i] - mean);
      const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(p.d) + p.norm_eps);
      for (int i = lane; i < p.width; i += kWarp) {
        const float y = i < p.d ? (x[i] - mean) * scale * weight[i] + bias[i] : 0.0f;
        operands(p.shared.after)[row * stride + i] = narrow<S>(y);
        if (keep) p.facts[(int64_t(m) * kRows + row) * p.width + i] = y;
      }
    }
    __syncthreads();
  }
};

}  // namespace evc::folded
