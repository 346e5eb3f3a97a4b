// What the folded encoder's kernel is told: sizes and their padding, where weights lie, and what its stages write.
#pragma once

#include "../cuda_folded.h"
#include "launch.cuh"

namespace evc::folded {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Rows and columns of the tile that one warp multiplies, and the depth that it takes at a time.
constexpr int kRows = 16, kColumns = 8, kDeep = 32;

__host__ __device__ constexpr int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to * to); }
__host__ __device__ constexpr int parts(int64_t n, int of) { return static_cast<int>((n + of - 1) / of); }
__host__ __device__ constexpr int least(int a, int b) { return a < b ? a : b; }

// Elements from one row of a left operand in shared memory to the next: the 8 rows that a warp reads at a time lie in
// different banks.
template <class S>
__host__ __device__ constexpr int shared_stride(int depth) {
  return sizeof(S) == 4 ? depth + 4 : (depth / kDeep | 1) * kDeep;
}
// The same of floats that half a warp, or four lanes, read along a row.
__host__ __device__ constexpr int rows_stride(int depth) { return depth + 16; }

// Where a block's parts of its shared memory begin, bytes: what all stages use, then each stage's own over one another.
struct SharedOffsets {
  int exchange;     // float [kWarps, kExchange], where S is float: left operands pass through it
  int calibration;  // float [4]: entropies of the three components, and theta
  int logits;       // float [K]: the video router's
  // Hidden layer: q of 16 frames, a triplet's keys and values, the attention times theta alpha, and H.
  int query;        // float [16, rows_stride(by_head)]
  int keys_values;  // float [3, 2 by_head]
  int attention;    // float [16, heads, 3]
  int h;            // S [16, shared_stride(by_head)]
  // LayerNorm: its weight and bias, 16 rows before and after.
  int norm;    // float [2, width]
  int before;  // float [16, rows_stride(width)]
  int after;   // S [16, shared_stride(width)]
  // Routing, of 8 columns.
  int routed;      // float [N, 8]
  int sums;        // float [kWarps, 2, 8]
  int context;     // float [together, frames, 8]
  int candidates;  // S [together, 8, shared_stride(frames_deep)]
  int read;        // S [N_q to whole tiles, shared_stride(by_head)]: what Attn_d has read
};
constexpr int kPartials = 12;                      // tiles of sums at offset 0: one of each warp, and four of the gate
constexpr int kExchange = kRows * (kDeep + 4);     // of a warp

template <class S>
struct Layout {
  typedef S Storage;
  typedef FoldedCudaWeight Weight;

  int B, N, K, W, d, heads, head, queries, output_width, video_width, text_width;
  bool retrieval, emotions, bias_adjustment, emotion_first, video_router, self_refine, cross_refine, explain;
  bool wide_features, wide_similarity, videos_aligned, triplets_aligned;
  float norm_eps;
  bool augments;           // emotions of each triplet's facts, rather than of V
  bool routed;             // routing weights are not just 1 / K
  bool query_of_emotions;  // Attn_f's q is made of E

  int width, hidden, words;           // d, F and W to whole steps of the depth
  int head_width, by_head;            // d / heads to whole tiles; all heads' to whole steps: attention's operands and results
  int router, scores;                 // K, of one triplet's logits, and heads N_q to whole tiles
  int frames, row_tiles, frames_deep;  // N to whole tiles of rows, these tiles, and `frames` as a depth
  int kinds, slots;                   // of tokens that Attn_d reads: facts, emotions?, V; a video's, to whole steps
  // kVisual's sections: V from 0, the FFN's hidden layer from `width`.
  int query_at, words_at, gate_at, gate_bias_at, scores_at, values_at, visual_columns;

  const void *video, *triplets, *similarity;
  const int64_t* groups;
  const void* packed[kFoldedCudaWeights];
  S *tokens, *emotion_logits, *fact_gate, *emotion_gate;
  float *component_weights, *triplet_weights, *emotion_distribution;

  // The workspace. Rows of frames are padded: `frames` a video or a triplet. What a product reads to its full depth is
  // written to its full width, zeros included.
  float* visual;          // V [B frames, width]
  S* visual_operand;      // the same, where emotions come first
  float* of_visual;       // V's part of the FFN's first layer [B frames, hidden]
  float* query;           // Attn_f's q [B frames, by_head]
  float* word_scores;     // (19) [B K frames or B frames, heads words]; here and below, -inf where there is none
  S* gate_key;            // [B frames, width]
  float* gate_bias;       // [B frames]
  float* keys_values;     // of uncalibrated triplets [3 B K to whole tiles, 2 by_head]
  float* calibration;     // theta alpha of (13), (16) [B K, 3]
  float* router_parts;    // each triplet's part of the logits [B K frames, router]
  float* weights;         // (26) [B, N, K], the caller's where it explains
  S* hidden_layer;        // after GELU [B K frames, hidden]
  float* updated;         // (18) before LayerNorm [B K frames, width]
  float* facts;           // (18) [B K frames, width]
  float* gate_scores;     // (20) [B K frames or B frames, frames_deep]
  float* emotions_of;     // [E | query] where emotions come first [B frames, width + by_head?]
  float* routed_facts;    // (27) before the gate [B frames, width]
  S* routed_context;      // the same of Attn_c's results [B frames, by_head]
  S* pooled;              // (22), (23) [B, width + by_head]
  S* mean_context;        // routed context, mean over frames [B, by_head]
  S* fused;               // M of (27) [B, kinds - 1, frames, width]
  float* memory_scores;   // scores with q' [B, scores, slots]
  S* memory_values;       // Attn_d's values [B, by_head, slots]
  float* word_stats;      // explanation: largest score and 1 / sum of (19)'s rows [.. frames, heads, 2]
  float* gate_stats;      // the same of (20)'s [.. frames, 2]
  float* mean_gate;       // (20), mean over its rows [.. frames]
  int64_t workspace_bytes;

  SharedOffsets shared;
  int64_t shared_bytes;
  int together;  // triplets that are routed at a time: enough row tiles for all warps

  Layout(const FoldedCudaArgs& a, int64_t videos, void* workspace)
      : B(int(videos)), N(int(a.N)), K(int(a.K)), W(int(a.W)), d(int(a.d)), heads(int(a.heads)), head(int(a.d / a.heads)),
        queries(int(a.queries)), output_width(int(a.output_width)), video_width(int(a.video_width)),
        text_width(int(a.text_width)), retrieval(a.retrieval), emotions(a.emotions), bias_adjustment(a.bias_adjustment),
        emotion_first(a.emotion_first), video_router(a.video_router), self_refine(a.self_refine),
        cross_refine(a.cross_refine), explain(a.explain), wide_features(a.wide_features || sizeof(S) == 4),
        wide_similarity(a.wide_similarity || sizeof(S) == 4), norm_eps(float(a.norm_eps)) {
    augments = emotions && !emotion_first;
    routed = retrieval && bias_adjustment && K > 1;
    query_of_emotions = emotion_first && retrieval;
    width = round_up(d, kDeep), hidden = round_up(a.hidden, kDeep), words = round_up(W, kDeep);
    head_width = round_up(head, kColumns), by_head = round_up(int64_t(heads) * head_width, kDeep);
    router = routed ? round_up(K, kColumns) : 0, scores = round_up(int64_t(heads) * queries, kColumns);
    frames = round_up(N, kRows), row_tiles = frames / kRows, frames_deep = round_up(frames, kDeep);
    kinds = emotions ? 3 : 2, slots = round_up(int64_t(kinds) * frames, kDeep);
    int at = width + hidden;
    query_at = at, at += retrieval && !emotion_first ? by_head : 0;
    words_at = at, at += emotion_first ? heads * words : 0;
    gate_at = at, at += emotions ? width : 0;
    gate_bias_at = at, at += emotions ? kColumns : 0;
    scores_at = at, at += scores;
    values_at = at, at += by_head;
    visual_columns = at;

    video = a.video, triplets = a.triplets, similarity = a.similarity, groups = a.groups;
    const int per_vector = wide_features ? 4 : 8;
    videos_aligned = reinterpret_cast<uintptr_t>(video) % 16 == 0 && video_width % per_vector == 0;
    triplets_aligned = reinterpret_cast<uintptr_t>(triplets) % 16 == 0 && text_width % per_vector == 0;
    for (int w = 0; w < kFoldedCudaWeights; ++w) packed[w] = a.packed[w];
    tokens = static_cast<S*>(a.tokens), emotion_logits = static_cast<S*>(a.emotion_logits);
    fact_gate = static_cast<S*>(a.fact_gate), emotion_gate = static_cast<S*>(a.emotion_gate);
    component_weights = static_cast<float*>(a.component_weights);
    triplet_weights = static_cast<float*>(a.triplet_weights);
    emotion_distribution = static_cast<float*>(a.emotion_distribution);

    int64_t used = 0;
    const auto take = [&](auto*& buffer, int64_t elements) {
      buffer = reinterpret_cast<std::remove_reference_t<decltype(buffer)>>(static_cast<char*>(workspace) + used);
      used += round_up64(elements * int64_t(sizeof(*buffer)));
    };
    const int64_t rows = int64_t(B) * frames, pairs = rows * K, attending = emotions ? (augments ? pairs : rows) : 0;
    take(visual, rows * width);
    take(visual_operand, emotion_first ? rows * width : 0);
    take(of_visual, retrieval ? rows * hidden : 0);
    take(query, query_at < words_at ? rows * by_head : 0);
    take(word_scores, attending * heads * words);
    take(gate_key, emotions ? rows * width : 0);
    take(gate_bias, emotions ? rows : 0);
    take(keys_values, retrieval ? int64_t(round_up(int64_t(3) * B * K, kRows)) * 2 * by_head : 0);
    take(calibration, retrieval ? int64_t(3) * B * K : 0);
    take(router_parts, pairs * router);
    take(weights, explain ? 0 : int64_t(B) * N * K);
    if (explain) weights = static_cast<float*>(a.routing_weights);
    take(hidden_layer, pairs * hidden);
    take(updated, pairs * width);
    take(facts, pairs * width);
    take(gate_scores, attending * frames_deep);
    take(emotions_of, emotion_first ? rows * emotion_columns() : 0);
    take(routed_facts, rows * width);
    take(routed_context, emotions ? rows * by_head : 0);
    take(pooled, int64_t(B) * gate_depth());
    take(mean_context, emotions ? int64_t(B) * by_head : 0);
    take(fused, rows * (kinds - 1) * width);
    take(memory_scores, int64_t(B) * scores * slots);
    take(memory_values, int64_t(B) * by_head * slots);
    take(word_stats, explain ? attending * heads * 2 : 0);
    take(gate_stats, explain ? attending * 2 : 0);
    take(mean_gate, explain ? attending : 0);
    workspace_bytes = used;
    share();
  }

  void share() {
    int64_t at = 0;
    shared_bytes = 0;
    const auto take = [&](int& offset, int64_t elements, size_t size) {
      offset = static_cast<int>(at);
      at += (elements * int64_t(size) + 15) / 16 * 16;
      shared_bytes = at > shared_bytes ? at : shared_bytes;
    };
    int partials;
    take(partials, kPartials * 128, sizeof(float));
    take(shared.exchange, sizeof(S) == 4 ? kWarps * kExchange : 0, sizeof(float));
    const int64_t common = at;
    take(shared.calibration, 4, sizeof(float));
    at = common;
    take(shared.logits, K, sizeof(float));
    at = common;
    take(shared.query, kRows * int64_t(rows_stride(by_head)), sizeof(float));
    take(shared.keys_values, 3 * 2 * int64_t(by_head), sizeof(float));
    take(shared.attention, kRows * 3 * int64_t(heads), sizeof(float));
    take(shared.h, kRows * int64_t(shared_stride<S>(by_head)), sizeof(S));
    at = common;
    take(shared.norm, 2 * int64_t(width), sizeof(float));
    take(shared.before, kRows * int64_t(rows_stride(width)), sizeof(float));
    take(shared.after, kRows * int64_t(shared_stride<S>(width)), sizeof(S));
    at = common;
    together = least(parts(kWarps, row_tiles), K);
    take(shared.routed, int64_t(N) * kColumns, sizeof(float));
    take(shared.sums, kWarps * 2 * kColumns, sizeof(float));
    take(shared.context, int64_t(together) * frames * kColumns, sizeof(float));
    take(shared.candidates, int64_t(together) * kColumns * shared_stride<S>(frames_deep), sizeof(S));
    at = common;
    take(shared.read, round_up(queries, kRows) * int64_t(shared_stride<S>(by_head)), sizeof(S));
  }

  static int64_t round_up64(int64_t bytes) { return (bytes + 255) / 256 * 256; }

  __host__ __device__ int emotion_columns() const { return width + (query_of_emotions ? by_head : 0); }
  __host__ __device__ int gate_depth() const { return width + (emotions ? by_head : 0); }

  __device__ const S* matrix(Weight w) const { return static_cast<const S*>(packed[int(w)]); }
  __device__ const float* vector(Weight w) const { return static_cast<const float*>(packed[int(w)]); }

  // [columns, depth], both padded; a vector's depth is 1. {0, 0} where the configuration has no such part.
  struct Size {
    int columns, depth;
  };
  __host__ __device__ Size size(Weight w) const {
    const Size none{0, 0};
    switch (w) {
      case Weight::kVisual: return {visual_columns, round_up(video_width, kDeep)};
      case Weight::kVisualBias: return {visual_columns, 1};
      case Weight::kTriplet: return retrieval ? Size{2 * by_head, round_up(text_width, kDeep)} : none;
      case Weight::kHidden: return retrieval ? Size{hidden + K * router, by_head} : none;
      case Weight::kRouterBias: return routed ? Size{K, 1} : none;
      case Weight::kFfn: return {width, hidden};
      case Weight::kFfnBias: case Weight::kNormWeight: case Weight::kNormBias: return {width, 1};
      case Weight::kWords: return augments ? Size{heads * words, width} : none;
      case Weight::kWordsBias: return augments ? Size{heads * words, 1} : none;
      case Weight::kValue: return emotions ? Size{by_head, words} : none;
      case Weight::kEmotion: return emotions ? Size{emotion_columns(), by_head} : none;
      case Weight::kEmotionBias: return emotions ? Size{emotion_columns(), 1} : none;
      case Weight::kGate: return bias_adjustment ? Size{(emotions ? 2 : 1) * width, gate_depth()} : none;
      case Weight::kGateBias: return bias_adjustment ? Size{(emotions ? 2 : 1) * width, 1} : none;
      case Weight::kHead: return emotions ? Size{words, by_head} : none;
      case Weight::kHeadBias: return emotions ? Size{words, 1} : none;
      case Weight::kMemory: return {scores + by_head, width};
      case Weight::kOutput: return {round_up(output_width, kColumns), by_head};
      case Weight::kOutputBias: return {queries * output_width, 1};
      default: return none;
    }
  }
  __host__ __device__ static bool is_vector(Weight w) {
    switch (w) {
      case Weight::kVisualBias: case Weight::kRouterBias: case Weight::kFfnBias: case Weight::kNormWeight:
      case Weight::kNormBias: case Weight::kWordsBias: case Weight::kEmotionBias: case Weight::kGateBias:
      case Weight::kHeadBias: case Weight::kOutputBias: return true;
      default: return false;
    }
  }
};

}  // namespace evc::folded
