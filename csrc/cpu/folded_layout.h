// Where the folded encoder keeps its weights, what its stages write, and the scratch of one thread.
#pragma once

#include "packed.h"
#include "rows.h"

namespace evc::EVC_NAMESPACE {
namespace {

inline int64_t pad(int64_t n) { return round_up(n, kFoldedPad); }

template <class S, class T = Acc<S>>
struct FoldedLayout {
  const FoldedArgs& a;
  int64_t d, head, hidden, router, words, frames;      // padded widths of rows, and d / heads
  int64_t rows, pairs, triplet_rows, fused_rows, memory_columns;
  int64_t query_at, emotion_query_at, gate_at, memory_at, visual_columns;  // sections of the products of V
  bool routed, query_of_emotions;
  T *calibrated, *visual, *products, *gate_keys, *keys_values, *of_values, *router_parts, *facts, *context, *emotions;
  T *routed_rows, *pooled, *mean_context, *fused, *memory, *read, *component_weights, *triplet_weights;
  size_t bytes;

  explicit FoldedLayout(const FoldedArgs& args)
      : a(args), d(pad(a.d)), head(a.d / a.heads), hidden(pad(a.hidden)), router(pad(a.K * a.K)), words(pad(a.W)),
        frames(pad(a.N)), rows(a.videos * a.N), pairs(a.videos * a.K), triplet_rows(pairs * 3),
        fused_rows((a.emotions ? 2 : 1) * a.N), memory_columns(pad(a.heads * a.queries) + d),
        routed(a.retrieval && a.bias_adjustment && a.K > 1), query_of_emotions(a.emotion_first && a.retrieval) {
    if (!routed) router = 0;
    int64_t at = hidden;
    query_at = at, at += a.retrieval && !a.emotion_first ? d : 0;
    emotion_query_at = at, at += a.emotion_first ? d : 0;
    gate_at = at, at += a.emotions ? pad(a.d + 1) : 0;
    memory_at = at, at += memory_columns;
    visual_columns = at;
    // Every buffer ends in slack: the last vector of a row's slice may reach beyond the row.
    Arena<T> arena{static_cast<T*>(a.workspace)};
    const auto take = [&](int64_t n) { return arena.take(n + 64); };
    calibrated = take(a.retrieval ? triplet_rows * a.text_width : 0);
    visual = take(rows * d);
    products = take(rows * visual_columns);
    gate_keys = take(a.emotions ? a.videos * (a.d + 1) * frames : 0);
    keys_values = take(a.retrieval ? triplet_rows * 2 * d : 0);
    of_values = take(a.retrieval ? triplet_rows * a.heads * (hidden + router) : 0);
    router_parts = take(pairs * a.N * router);
    facts = take(pairs * a.N * d);
    context = take(a.emotions ? (a.emotion_first ? rows : pairs * a.N) * d : 0);
    emotions = take(a.emotion_first ? rows * 2 * d : 0);
    routed_rows = take(2 * rows * d);  // [videos][facts, context][N, d]
    pooled = take(a.videos * 2 * d);
    mean_context = take(a.videos * d);
    fused = take(a.videos * fused_rows * d);
    memory = take(a.videos * fused_rows * memory_columns);
    read = take(a.videos * a.queries * d);
    // What only an explanation keeps: the caller's, or the workspace's.
    const auto shown = [&](void* of_batch, int64_t each) {
      return a.explain ? static_cast<T*>(of_batch) + a.first * each : take(a.videos * each);
    };
    component_weights = shown(a.component_weights, a.retrieval ? a.K * 3 : 0);
    triplet_weights = shown(a.triplet_weights, a.retrieval ? a.K : 0);
    bytes = arena.used * sizeof(T);
  }

  // ---- weights ----

  int64_t columns(FoldedWeight w) const {
    switch (w) {
      case kVideoWeight: case kFfnWeight: case kEmotionQueryWeight: return d;
      case kVisualWeight: return visual_columns;
      case kTripletWeight: return 2 * d;
      case kHiddenWeight: return hidden + router;
      case kKey: return words;
      case kValue: return pad(head);
      case kEmotionWeight: return query_of_emotions ? 2 * d : d;
      case kGateWeight: return a.emotions ? 2 * d : d;
      case kHeadWeight: return words;
      case kMemoryWeight: return memory_columns;
      case kOutputWeight: return a.output_width;
      default: return 0;
    }
  }
  int64_t depth(FoldedWeight w) const {
    switch (w) {
      case kVideoWeight: return a.video_width;
      case kTripletWeight: return a.text_width;
      case kHiddenWeight: case kKey: return head;
      case kFfnWeight: return a.hidden;
      case kValue: return a.W;
      case kGateWeight: return a.emotions ? 2 * d : d;
      default: return a.d;
    }
  }
  int64_t groups(FoldedWeight w) const { return w == kHiddenWeight || w == kKey || w == kValue ? a.heads : 1; }
  bool present(FoldedWeight w) const {
    switch (w) {
      case kVideoWeight: case kVideoBias: return a.project_video;
      case kTripletWeight: case kHiddenWeight: return a.retrieval;
      case kRouterBias: return routed;
      case kEmotionQueryWeight: case kEmotionQueryBias: return a.emotions && !a.emotion_first;
      case kKey: case kValue: case kEmotionWeight: case kEmotionBias: case kHeadWeight: case kHeadBias: return a.emotions;
      case kGateWeight: case kGateBias: return a.bias_adjustment;
      default: return true;
    }
  }
  static bool is_vector(FoldedWeight w) {
    switch (w) {
      case kVideoBias: case kVisualBias: case kRouterBias: case kFfnBias: case kNormWeight: case kNormBias:
      case kEmotionQueryBias: case kEmotionBias: case kGateBias: case kHeadBias: case kOutputBias: return true;
      default: return false;
    }
  }
  int64_t size(FoldedWeight w) const {
    if (!present(w)) return 0;
    switch (w) {
      case kVideoBias: case kFfnBias: case kNormWeight: case kNormBias: case kEmotionQueryBias: return d;
      case kVisualBias: return visual_columns;
      case kRouterBias: return a.K;
      case kEmotionBias: return columns(kEmotionWeight);
      case kGateBias: return columns(kGateWeight);
      case kHeadBias: return words;
      case kOutputBias: return a.queries * a.output_width;
      default: return groups(w) * Packed<S>::size(columns(w), depth(w));
    }
  }
  Packed<S> matrix(FoldedWeight w, int64_t group = 0) const {
    return {static_cast<const S*>(a.weights[w]) + group * Packed<S>::size(columns(w), depth(w)), columns(w), depth(w)};
  }
  const T* vector(FoldedWeight w) const { return static_cast<const T*>(a.weights[w]); }
  int64_t panels(FoldedWeight w) const { return Packed<S>::panels(columns(w)); }

  // ---- scratch of one thread ----

  struct Scratch {
    T *product, *attention, *hidden, *query, *scores, *candidates, *weights, *gate;
    size_t bytes;
  };
  int64_t block_pairs() const { return a.N < kBlockRows ? kBlockRows / a.N : 1; }
  Scratch scratch(void* base) const {
    Arena<T> arena{static_cast<T*>(base)};
    const auto take = [&](int64_t n) { return arena.take(n + 64); };
    const int64_t n = block_pairs() * a.N;
    int64_t deepest = 0;
    for (int w = 0; w < kFoldedWeights; ++w) deepest = deepest < depth(FoldedWeight(w)) ? depth(FoldedWeight(w)) : deepest;
    // One block serves the FFN's hidden layer, the scores of all tokens, and the other two ops' scratch.
    int64_t most = n * hidden;
    const int64_t others[] = {(fused_rows + a.N) * pad(a.queries), a.N * a.K + 3 * d, 2 * a.K + a.text_width};
    for (int64_t other : others) most = most < other ? other : most;
    Scratch s;
    s.product = take(packed_scratch<S>(deepest));
    s.attention = take(n * (a.heads * 3));
    s.hidden = take(most);
    s.query = take(n * d);
    s.scores = take(n * (words > frames ? words : frames));
    s.candidates = take(n * d > a.queries * d ? n * d : a.queries * d);
    s.weights = take(a.explain ? n * words : 0);
    s.gate = take(a.videos * d + 2 * a.N * a.K);
    s.bytes = arena.used * sizeof(T);
    return s;
  }
};

}  // namespace
}  // namespace evc::EVC_NAMESPACE
