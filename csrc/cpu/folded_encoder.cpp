// The folded encoder, equations (10)-(29) with fixed weights: evc_fast/reference/folded_encoder.py in one workspace.
//
// Each stage below reads what earlier ones wrote; its units may run in any order and on any threads. An element of a
// result is always the same chain of operations, whichever videos and threads share the call.
#include "activations.h"
#include "folded_layout.h"
#include "kernels.h"

namespace evc::EVC_NAMESPACE {
namespace {

enum Stage { kVideo, kProducts, kTriplets, kEmotionsOfFrames, kEmotionsProjected, kFacts, kRouting, kGating, kMemory, kReading, kTokens, kStages };

template <class S, class T = Acc<S>>
struct Folded : FoldedLayout<S> {
  typedef FoldedLayout<S> Layout;
  typedef typename Layout::Scratch Scratch;
  using Layout::Layout, Layout::a, Layout::d, Layout::head, Layout::hidden, Layout::router, Layout::words, Layout::frames;
  using Layout::rows, Layout::pairs, Layout::triplet_rows, Layout::fused_rows, Layout::memory_columns;
  using Layout::query_at, Layout::emotion_query_at, Layout::gate_at, Layout::memory_at, Layout::visual_columns;
  using Layout::routed, Layout::calibrated, Layout::visual, Layout::products, Layout::gate_keys, Layout::keys_values;
  using Layout::of_values, Layout::router_parts, Layout::facts, Layout::context, Layout::emotions, Layout::routed_rows;
  using Layout::pooled, Layout::mean_context, Layout::fused, Layout::memory, Layout::read, Layout::component_weights;
  using Layout::triplet_weights;
  using Layout::matrix, Layout::vector, Layout::panels, Layout::block_pairs, Layout::scratch;

  // The elements of y that lie within a row of `width`.
  template <class To>
  static EVC_INLINE void put_row(Vec<T> y, int64_t column, int64_t width, To* row) {
    if (column + kLanes<T> <= width)
      store(y, row + column);
    else if (column < width)
      store_part<To>(y, row + column, width - column);
  }

  // finish(row, column, sums) of panels [begin, end) of a product, any number of rows.
  template <class Finish>
  EVC_INLINE void multiply_rows(int64_t count, const T* x, int64_t stride, const Packed<S>& w, int64_t begin, int64_t end,
                                const Scratch& s, const Finish& finish) const {
    const int64_t blocks = (count + kBlockRows - 1) / kBlockRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = count * b / blocks, step = count * (b + 1) / blocks - first;
      multiply_packed<S>(step, x + first * stride, stride, w, begin, end, s.product,
                         [&](int64_t row, int64_t column, Vec<T> y) { finish(first + row, column, y); });
    }
  }

  // ---- V, and the calibrated triplets ----

  int64_t video_units() const { return a.project_video ? panels(kVideoWeight) : rows; }
  void video(int64_t begin, int64_t end, const Scratch& s) const {
    const T* x = static_cast<const T*>(a.video) + a.first * a.N * a.video_width;
    if (!a.project_video) {
      for (int64_t row = begin; row < end; ++row) {
        memcpy(visual + row * d, x + row * a.d, a.d * sizeof(T));
        memset(visual + row * d + a.d, 0, (d - a.d) * sizeof(T));
      }
      return;
    }
    const T* bias = vector(kVideoBias);
    multiply_rows(rows, x, a.video_width, matrix(kVideoWeight), begin, end, s,
                  [&](int64_t row, int64_t column, Vec<T> y) { store(y + load(bias + column), visual + row * d + column); });
  }
  void calibrate(int64_t v, const Scratch& s) const {  // (10)-(16)
    EntropyArgs e{};
    const int64_t video = a.first + v;
    e.K = a.K, e.D = a.text_width, e.self_refine = a.self_refine, e.cross_refine = a.cross_refine;
    e.triplets = static_cast<const T*>(a.triplets) + video * a.K * 3 * a.text_width;
    e.similarity = static_cast<const T*>(a.similarity) + video * a.K;
    e.groups = a.groups ? a.groups + video * a.K : nullptr;
    e.calibrated = calibrated + v * a.K * 3 * a.text_width;
    e.component_weights = component_weights + v * a.K * 3;
    e.triplet_weights = triplet_weights + v * a.K;
    kernels().entropy_forward[sizeof(T) == 8 ? kFloat64 : kFloat32].run(e, 0, 1, s.hidden);
  }

  // ---- all products of V; keys and values of the triplets ----

  void product_of_triplets(int64_t begin, int64_t end, const Scratch& s) const {
    multiply_rows(triplet_rows, calibrated, a.text_width, matrix(kTripletWeight), begin, end, s,
                  [&](int64_t row, int64_t column, Vec<T> y) { store(y, keys_values + row * 2 * d + column); });
  }
  void product(int64_t begin, int64_t end, const Scratch& s) const {
    const T* bias = vector(kVisualBias);
    const int64_t gate_end = a.emotions ? gate_at + a.d + 1 : gate_at;
    multiply_rows(rows, visual, d, matrix(kVisualWeight), begin, end, s, [&](int64_t row, int64_t column, Vec<T> y) {
      y += load(bias + column);
      if (column < gate_at || column >= gate_end) return store(y, products + row * visual_columns + column);
      // Gate keys are a right operand: [d + 1, N], the last row what a frame adds to its scores.
      T* to = gate_keys + (row / a.N) * (a.d + 1) * frames + row % a.N;
      for (int64_t i = 0; i < kLanes<T> && column + i < gate_end; ++i) to[(column + i - gate_at) * frames] = y[i];
    });
  }

  // ---- each head's three values of a triplet, through the FFN's first layer and the router: [pairs][heads][3] rows ----

  void triplet_hidden(int64_t begin, int64_t end, const Scratch& s) const {
    const int64_t each = panels(kHiddenWeight), width = hidden + router;
    for (int64_t unit = begin, next; unit < end; unit = next) {
      const int64_t h = unit / each;
      next = (h + 1) * each < end ? (h + 1) * each : end;
      multiply_rows(triplet_rows, keys_values + d + h * head, 2 * d, matrix(kHiddenWeight, h), unit - h * each,
                    next - h * each, s, [&](int64_t row, int64_t column, Vec<T> y) {
                      store(y, of_values + ((row / 3 * a.heads + h) * 3 + row % 3) * width + column);
                    });
    }
  }

  // ---- (19)-(21): the frames of `count` pairs attend to the dictionary, and are gathered by the gate ----

  // query, of, to: the first pair's rows. pair: its number among pairs, or among videos where emotions come first.
  void augment(int64_t pair, int64_t count, int64_t pairs_of_video, const T* query, int64_t query_stride, const T* of,
               T* to, const Scratch& s) const {
    const int64_t all = count * a.N;
    const T scale = 1 / std::sqrt(T(head));
    if (a.explain) memset(s.weights, 0, all * words * sizeof(T));
    for (int64_t h = 0; h < a.heads; ++h) {
      multiply_rows(all, query + h * head, query_stride, matrix(kKey, h), 0, panels(kKey), s,
                    [&](int64_t row, int64_t column, Vec<T> y) { store(y * scale, s.scores + row * words + column); });
      for (int64_t i = 0; i < all; ++i) {
        T* row = s.scores + i * words;
        const T share = softmax_numerators(row, a.W);  // (19)
        for (int64_t w = 0; w < a.W; w += kLanes<T>) store(load(row + w) * share, row + w);
        if (a.explain)
          for (int64_t w = 0; w < a.W; w += kLanes<T>)
            store(load(s.weights + i * words + w) + load(row + w) * (1 / T(a.heads)), s.weights + i * words + w);
      }
      multiply_rows(all, s.scores, words, matrix(kValue, h), 0, Packed<S>::panels(head), s,
                    [&](int64_t row, int64_t column, Vec<T> y) {
                      put_row(y, column, head, s.candidates + row * d + h * head);
                    });
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t video = (pair + p) / pairs_of_video;
      const T* keys = gate_keys + video * (a.d + 1) * frames;
      multiply<T, false>(a.N, a.N, a.d, {of + p * a.N * d, d, 1}, {keys, frames}, s.scores, frames);
      for (int64_t i = 0; i < a.N; ++i) {
        T* row = s.scores + i * frames;
        for (int64_t j = 0; j < a.N; j += kLanes<T>) store(load(row + j) + load(keys + a.d * frames + j), row + j);
        const T share = softmax_numerators(row, a.N);  // (20)
        for (int64_t j = 0; j < a.N; j += kLanes<T>) store(load(row + j) * share, row + j);
      }
      T* out = to + p * a.N * d;
      multiply<T, false>(a.N, a.d, a.N, {s.scores, frames, 1}, {s.candidates + p * a.N * d, d}, out, d);  // (21)
      for (int64_t i = 0; i < a.N; ++i) memset(out + i * d + a.d, 0, (d - a.d) * sizeof(T));
      if (a.explain) explain_emotions(video, (pair + p) % pairs_of_video, s.scores, s.weights + p * a.N * words);
    }
  }
  // The words' weights, mean over heads, by the gate's mean row.
  void explain_emotions(int64_t video, int64_t k, const T* gate, const T* weights) const {
    const int64_t copies = a.emotion_first ? a.K : 1;
    T* out = static_cast<T*>(a.emotion_distribution) + ((a.first + video) * a.K + k) * a.W;
    memset(out, 0, a.W * sizeof(T));
    for (int64_t j = 0; j < a.N; ++j) {
      T mean = 0;
      for (int64_t i = 0; i < a.N; ++i) mean += gate[i * frames + j];
      for (int64_t w = 0; w < a.W; ++w) out[w] += mean / T(a.N) * weights[j * words + w];
    }
    for (int64_t copy = 1; copy < copies; ++copy) memcpy(out + copy * a.W, out, a.W * sizeof(T));
  }
  void emotions_of_frames(int64_t v, const Scratch& s) const {
    augment(v, 1, 1, products + v * a.N * visual_columns + emotion_query_at, visual_columns, visual + v * a.N * d,
            context + v * a.N * d, s);
  }
  void project_emotions(int64_t begin, int64_t end, const Scratch& s) const {
    const T* bias = vector(kEmotionBias);
    multiply_rows(rows, context, d, matrix(kEmotionWeight), begin, end, s, [&](int64_t row, int64_t column, Vec<T> y) {
      store(y + load(bias + column), emotions + row * 2 * d + column);
    });
  }

  // ---- F of pairs [begin, end), (17)-(18), and their emotions ----

  void facts_of(int64_t begin, int64_t end, const Scratch& s) const {
    for (int64_t pair = begin; pair < end; pair += block_pairs()) {
      const int64_t count = end - pair < block_pairs() ? end - pair : block_pairs(), all = count * a.N;
      for (int64_t p = 0; p < count; ++p) hidden_of(pair + p, s.hidden + p * a.N * hidden, s);
      const T* bias = vector(kFfnBias);
      T* out = facts + pair * a.N * d;
      const auto frame = [&](int64_t row) { return (pair + row / a.N) / a.K * a.N + row % a.N; };
      multiply_rows(all, s.hidden, hidden, matrix(kFfnWeight), 0, panels(kFfnWeight), s,
                    [&](int64_t row, int64_t column, Vec<T> y) {
                      const T* residual = a.emotion_first ? emotions + frame(row) * 2 * d : visual + frame(row) * d;
                      store(y + load(bias + column) + load(residual + column), out + row * d + column);
                    });
      for (int64_t i = 0; i < all; ++i) normalise(out + i * d);
      if (!a.emotions || a.emotion_first) continue;
      const T* query_bias = vector(kEmotionQueryBias);
      multiply_rows(all, out, d, matrix(kEmotionQueryWeight), 0, panels(kEmotionQueryWeight), s,
                    [&](int64_t row, int64_t column, Vec<T> y) {
                      store(y + load(query_bias + column), s.query + row * d + column);
                    });
      augment(pair, count, a.K, s.query, d, out, context + pair * a.N * d, s);
    }
  }
  // The FFN's hidden layer [N, F], and the triplet's part of the logits.
  void hidden_of(int64_t pair, T* to, const Scratch& s) const {
    const int64_t first = pair / a.K * a.N, width = hidden + router, terms = a.heads * 3;
    const T* of_frames = products + first * visual_columns;
    if (!a.retrieval) {
      for (int64_t n = 0; n < a.N; ++n)
        for (int64_t i = 0; i < hidden; i += kLanes<T>)
          store(gelu<T>(load(of_frames + n * visual_columns + i)), to + n * hidden + i);
      return;
    }
    attend_to_triplet(pair, s.attention);
    const T* values = of_values + pair * terms * width;
    for (int64_t column = 0; column < width; column += kPanelColumns<S>) {
      constexpr int64_t kColumns = kPanelColumns<S>;
      for (int64_t n = 0; n < a.N; n += kBlockRows) {
        const int64_t step = a.N - n < kBlockRows ? a.N - n : kBlockRows;
        multiply_block<T, false>(step, kColumns, terms, {s.attention + n * terms, terms, 1}, {values + column, width},
                                 s.product, kColumns);
        for (int64_t i = 0; i < step; ++i)
          for (int64_t j = 0; j < kColumns; j += kLanes<T>) {
            const Vec<T> y = load(s.product + i * kColumns + j);
            const int64_t at = column + j;
            if (at < hidden)
              store(gelu<T>(y + load(of_frames + (n + i) * visual_columns + at)), to + (n + i) * hidden + at);
            else
              store(y, router_parts + (pair * a.N + n + i) * router + at - hidden);
          }
      }
    }
  }
  // (17): attention of each frame over the triplet's three parts, [N, heads * 3].
  void attend_to_triplet(int64_t pair, T* to) const {
    const int64_t first = pair / a.K * a.N, terms = a.heads * 3;
    const T* query = a.emotion_first ? emotions + d : products + query_at;
    const int64_t stride = a.emotion_first ? 2 * d : visual_columns;
    for (int64_t n = 0; n < a.N; ++n)
      for (int64_t h = 0; h < a.heads; ++h) {
        const T* q = query + (first + n) * stride + h * head;
        const T* keys = keys_values + pair * 3 * 2 * d + h * head;
        Vec<T> dot[3] = {};
        for_row<T>(head, [&](int64_t i, auto part) {
          const Vec<T> x = part.get(q + i, 0);
#pragma GCC unroll 3
          for (int c = 0; c < 3; ++c) dot[c] += x * part.get(keys + c * 2 * d + i, 0);
        });
        T* score = to + n * terms + h * 3;
        for (int c = 0; c < 3; ++c) score[c] = sum_lanes<T>(dot[c]);
        const T best = max_of(max_of(score[0], score[1]), score[2]);
        for (int c = 0; c < 3; ++c) score[c] -= best;
      }
    for_row<T>(a.N * terms, [&](int64_t i, auto part) { part.put(exp_nonpositive<T>(part.get(to + i, 0)), to + i); });
    for (T* score = to; score < to + a.N * terms; score += 3) {
      const T share = 1 / (score[0] + score[1] + score[2]);
      for (int c = 0; c < 3; ++c) score[c] *= share;
    }
  }
  void normalise(T* row) const {  // LayerNorm of (18); zeros beyond d
    RowSum<T> sum, squares;
    for_row_sums<T>(a.d, [&](int64_t i, auto part, int chain) { sum.chain[chain] += part.get(row + i, 0); });
    const T mean = sum.total() / T(a.d);
    for_row_sums<T>(a.d, [&](int64_t i, auto part, int chain) {
      const Vec<T> x = part.get(row + i, mean) - mean;
      squares.chain[chain] += x * x;
    });
    const T scale = 1 / std::sqrt(squares.total() / T(a.d) + T(a.norm_eps));
    const T *weight = vector(kNormWeight), *bias = vector(kNormBias);
    for_row<T>(a.d, [&](int64_t i, auto part) {
      part.put((part.get(row + i, 0) - mean) * scale * load(weight + i) + load(bias + i), row + i);
    });
    memset(row + a.d, 0, (d - a.d) * sizeof(T));
  }

  // ---- (22), (23), (26), and the sums of (27) ----

  // Unit: a video's facts (even) or context (odd).
  void route(int64_t unit, const Scratch& s) const {
    const int64_t v = unit / 2;
    const bool of_context = unit % 2;
    if (of_context && !a.emotions) return;
    const bool once = of_context && a.emotion_first;  // E is the same for all K, whose weights sum to 1
    T *logits = s.gate, *weights = s.gate + a.N * a.K;
    RoutingArgs r{};
    r.K = once ? 1 : a.K, r.N = a.N, r.d = d;
    r.facts = facts + v * a.K * a.N * d;
    r.emotions = context + v * (once ? 1 : a.K) * a.N * d;
    r.routed = routed_rows + v * 2 * a.N * d;
    r.pooled = pooled + v * 2 * d;
    const bool shown = a.explain && !of_context;
    r.weights = shown ? static_cast<T*>(a.routing_weights) + (a.first + v) * a.N * a.K : weights;
    memset(logits, 0, a.N * a.K * sizeof(T));
    if (routed && !once) route_logits(v, logits);
    r.logits = logits;
    kernels().routing_forward[sizeof(T) == 8 ? kFloat64 : kFloat32].run(r, of_context, of_context + 1, s.hidden);
    if (!of_context) return;
    T* mean = mean_context + v * d;  // over frames, for the classification head
    memset(mean, 0, d * sizeof(T));
    for (int64_t n = 0; n < a.N; ++n)
      for (int64_t i = 0; i < d; i += kLanes<T>)
        store(load(mean + i) + load(routed_rows + ((v * 2 + 1) * a.N + n) * d + i), mean + i);
    for (int64_t i = 0; i < d; i += kLanes<T>) store(load(mean + i) * (1 / T(a.N)), mean + i);
  }
  void route_logits(int64_t v, T* logits) const {  // [N, K]
    for (int64_t n = 0; n < a.N; ++n)
      for (int64_t j = 0; j < a.K; ++j) {
        T sum = 0;
        for (int64_t k = 0; k < a.K; ++k) sum += router_parts[((v * a.K + k) * a.N + n) * router + k * a.K + j];
        logits[n * a.K + j] = sum + vector(kRouterBias)[j];
      }
    if (!a.video_router) return;
    for (int64_t j = 0; j < a.K; ++j) {
      T mean = 0;
      for (int64_t n = 0; n < a.N; ++n) mean += logits[n * a.K + j];
      for (int64_t n = 0; n < a.N; ++n) logits[n * a.K + j] = mean / T(a.N);
    }
  }

  // ---- M of (27): a range of panels of both gates and of both halves; the classification head ----

  void gate(int64_t begin, int64_t end, const Scratch& s) const {
    const int64_t first = begin * kPanelColumns<S>, last = end * kPanelColumns<S>;
    gate_values(begin, end, begin, static_cast<S*>(a.fact_gate), s);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t v = row / a.N, n = row % a.N;
      for (int64_t j = first; j < last; j += kLanes<T>)
        store(load(s.gate + v * d + j) * load(routed_rows + (v * 2 * a.N + n) * d + j), fused + (v * fused_rows + n) * d + j);
    }
    if (!a.emotions) return;
    const int64_t of_emotions = Packed<S>::panels(d);
    gate_values(of_emotions + begin, of_emotions + end, begin, static_cast<S*>(a.emotion_gate), s);
    const auto put = [&](int64_t v, int64_t n, int64_t column, Vec<T> emotion) {
      store(load(s.gate + v * d + column) * emotion, fused + (v * fused_rows + a.N + n) * d + column);
    };
    if (a.emotion_first) {
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t j = first; j < last; j += kLanes<T>)
          put(row / a.N, row % a.N, j, load(emotions + row * 2 * d + j));
      return;
    }
    const T* bias = vector(kEmotionBias);
    for (int64_t v = 0; v < a.videos; ++v)  // phi_E after the routing
      multiply_rows(a.N, routed_rows + (v * 2 + 1) * a.N * d, d, matrix(kEmotionWeight), begin, end, s,
                    [&](int64_t n, int64_t column, Vec<T> y) { put(v, n, column, y + load(bias + column)); });
  }
  // (24), (25): panels [begin, end) of the gates' weight into s.gate [videos, d], from panel `to` on; shown: [B, d].
  void gate_values(int64_t begin, int64_t end, int64_t to, S* shown, const Scratch& s) const {
    const int64_t first = to * kPanelColumns<S>, last = first + (end - begin) * kPanelColumns<S>;
    const int64_t back = (begin - to) * kPanelColumns<S>;
    if (!a.bias_adjustment)
      for (int64_t i = 0; i < a.videos * d; ++i) s.gate[i] = 1;
    else
      multiply_rows(a.videos, pooled, 2 * d, matrix(kGateWeight), begin, end, s, [&](int64_t v, int64_t column, Vec<T> y) {
        store(tanh_of<T>(y + load(vector(kGateBias) + column)), s.gate + v * d + column - back);
      });
    if (!a.explain) return;
    for (int64_t v = 0; v < a.videos; ++v)
      for (int64_t j = first; j < last && j < a.d; ++j) narrow(s.gate[v * d + j], shown + (a.first + v) * a.d + j);
  }
  void classify(int64_t begin, int64_t end, const Scratch& s) const {
    const T* bias = vector(kHeadBias);
    S* out = static_cast<S*>(a.emotion_logits) + a.first * a.W;
    multiply_rows(a.videos, mean_context, d, matrix(kHeadWeight), begin, end, s, [&](int64_t v, int64_t column, Vec<T> y) {
      put_row(y + load(bias + column), column, a.W, out + v * a.W);
    });
  }

  // ---- (29) ----

  void remember(int64_t begin, int64_t end, const Scratch& s) const {
    multiply_rows(a.videos * fused_rows, fused, d, matrix(kMemoryWeight), begin, end, s,
                  [&](int64_t row, int64_t column, Vec<T> y) { store(y, memory + row * memory_columns + column); });
  }
  // Unit: one head of one video. Scores stand by token, so that a softmax runs down the columns.
  void read_memory(int64_t unit, const Scratch& s) const {
    const int64_t v = unit / a.heads, h = unit % a.heads, width = pad(a.queries), values = pad(a.heads * a.queries);
    const T* of_fused = memory + v * fused_rows * memory_columns;
    const T* of_visual = products + v * a.N * visual_columns + memory_at;
    const int64_t all = fused_rows + a.N;
    const auto token = [&](int64_t t) {
      return t < fused_rows ? of_fused + t * memory_columns : of_visual + (t - fused_rows) * visual_columns;
    };
    T* p = s.hidden;
    for (int64_t i = 0; i < a.queries; i += kLanes<T>) {
      Vec<T> best = load(token(0) + h * a.queries + i), total{};
      for (int64_t t = 1; t < all; ++t) best = max_vec<T>(best, load(token(t) + h * a.queries + i));
      for (int64_t t = 0; t < all; ++t) {
        const Vec<T> e = exp_nonpositive<T>(load(token(t) + h * a.queries + i) - best);
        store(e, p + t * width + i);
        total += e;
      }
      for (int64_t t = 0; t < all; ++t) store(load(p + t * width + i) / total, p + t * width + i);
    }
    const int64_t head_row = pad(head);
    T* out = s.candidates;
    multiply<T, false>(a.queries, head, fused_rows, {p, 1, width}, {of_fused + values + h * head, memory_columns}, out, head_row);
    multiply<T, true>(a.queries, head, a.N, {p + fused_rows * width, 1, width},
                      {of_visual + values + h * head, visual_columns}, out, head_row);
    for (int64_t i = 0; i < a.queries; ++i)
      memcpy(read + (v * a.queries + i) * d + h * head, out + i * head_row, head * sizeof(T));
  }
  void write_tokens(int64_t begin, int64_t end, const Scratch& s) const {
    const T* bias = vector(kOutputBias);
    S* out = static_cast<S*>(a.tokens) + a.first * a.queries * a.output_width;
    multiply_rows(a.videos * a.queries, read, d, matrix(kOutputWeight), begin, end, s,
                  [&](int64_t row, int64_t column, Vec<T> y) {
                    const T* added = bias + row % a.queries * a.output_width + column;
                    const int64_t left = a.output_width - column;
                    y += left < kLanes<T> ? load_part(added, left, T(0)) : load(added);
                    put_row(y, column, a.output_width, out + row * a.output_width);
                  });
  }

  int64_t units(int stage) const {
    switch (stage) {
      case kVideo: return video_units() + (a.retrieval ? a.videos : 0);
      case kProducts: return panels(kVisualWeight) + (a.retrieval ? panels(kTripletWeight) : 0);
      case kTriplets: return a.retrieval ? a.heads * panels(kHiddenWeight) : 0;
      case kEmotionsOfFrames: return a.emotion_first ? a.videos : 0;
      case kEmotionsProjected: return a.emotion_first ? panels(kEmotionWeight) : 0;
      case kFacts: return pairs;
      case kRouting: return 2 * a.videos;
      case kGating: return Packed<S>::panels(d) + (a.emotions ? panels(kHeadWeight) : 0);
      case kMemory: return panels(kMemoryWeight);
      case kReading: return a.videos * a.heads;
      default: return panels(kOutputWeight);
    }
  }
  void run(int stage, int64_t begin, int64_t end, void* base) const {
    const Scratch s = scratch(base);
    // Where a stage holds two kinds of units, those from `border` on are of the second.
    const auto split = [&](int64_t border, const auto& before, const auto& after) {
      if (begin < border) before(begin, end < border ? end : border);
      if (end > border) after(begin > border ? begin - border : 0, end - border);
    };
    const auto each = [&](const auto& of) {
      for (int64_t unit = begin; unit < end; ++unit) of(unit);
    };
    switch (stage) {
      case kVideo:
        return split(video_units(), [&](int64_t i, int64_t j) { video(i, j, s); },
                     [&](int64_t i, int64_t j) { for (; i < j; ++i) calibrate(i, s); });
      case kProducts:
        return split(panels(kVisualWeight), [&](int64_t i, int64_t j) { product(i, j, s); },
                     [&](int64_t i, int64_t j) { product_of_triplets(i, j, s); });
      case kTriplets: return triplet_hidden(begin, end, s);
      case kEmotionsOfFrames: return each([&](int64_t unit) { emotions_of_frames(unit, s); });
      case kEmotionsProjected: return project_emotions(begin, end, s);
      case kFacts: return facts_of(begin, end, s);
      case kRouting: return each([&](int64_t unit) { route(unit, s); });
      case kGating:
        return split(Packed<S>::panels(d), [&](int64_t i, int64_t j) { gate(i, j, s); },
                     [&](int64_t i, int64_t j) { classify(i, j, s); });
      case kMemory: return remember(begin, end, s);
      case kReading: return each([&](int64_t unit) { read_memory(unit, s); });
      default: return write_tokens(begin, end, s);
    }
  }
};

}  // namespace

void add_folded_encoder(Kernels& kernels) {
  for_each_dtype([&](Dtype dtype, auto storage) {
    typedef Folded<decltype(storage)> F;
    kernels.folded[dtype] = {
        [](const FoldedArgs& a, FoldedWeight w) -> int64_t { return F(a).size(w); },
        F::is_vector,
        [](const FoldedArgs& a) -> size_t { return F(a).bytes; },
        [](const FoldedArgs& a) -> size_t { return F(a).scratch(nullptr).bytes; },
        [](const FoldedArgs& a, int stage) -> int64_t { return F(a).units(stage); },
        [](const FoldedArgs& a, int stage, int64_t begin, int64_t end, void* base) { F(a).run(stage, begin, end, base); },
        kStages,
    };
  });
}

}  // namespace evc::EVC_NAMESPACE
