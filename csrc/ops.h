// The contract between library.cpp (tensors, threads) and csrc/cpu (kernels): raw pointers to contiguous memory,
// int64 sizes, and one table of kernels per instruction set. Kernels allocate nothing and start no threads: the caller
// splits [0, tasks) among threads, and gives each a scratch buffer of the size that the kernel asks for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace evc {

// Storage types of tensors. Kernels compute in float, and in double for kFloat64.
enum Dtype { kFloat32, kBFloat16, kFloat64, kDtypes };

struct BFloat16 {
  uint16_t bits;
};

// Symbols as in FACE-net: B videos, K triplets, N frames, W emotion words, d common width, D width of text features.
// Acc* pointers are float, and double for kFloat64.

struct EntropyArgs {
  int64_t K, D;
  bool self_refine, cross_refine;
  const void* triplets;       // [B, K, 3, D]
  const void* similarity;     // [B, K] Acc
  const int64_t* groups;      // [B, K], or null: all distinct
  void* calibrated;           // forward: [B, K, 3, D]
  void* component_weights;    // forward: [B, K, 3] Acc
  void* triplet_weights;      // forward: [B, K] Acc
  const void* grad_calibrated;  // backward: [B, K, 3, D]
  void* grad_triplets;          // backward: [B, K, 3, D]
  void* grad_similarity;        // backward: [B, K] Acc
};

struct EmotionArgs {
  int64_t B, K, N, W, d, heads;
  const void *query, *key, *value, *gate_query, *gate_key;  // [B,K,N,d] [W,d] [W,d] [B,K,N,d] [B,N,d]
  void* context;                                            // forward: [B, K, N, d]
  void* candidates;           // X [B, K, N, d]: written by forward unless null, read by backward
  const void* grad_context;   // backward: [B, K, N, d]
  void *grad_query, *grad_key, *grad_value, *grad_gate_query, *grad_gate_key;
  void* dictionary;           // packed keys and values, emotion_dictionary_bytes, filled by emotion_pack
  void* partials;             // backward: emotion_chunks sums of the dictionary's gradients, zeroed by the kernel
};

struct RoutingArgs {
  int64_t K, N, d;
  const void *facts, *emotions;  // [B, K, N, d]
  const void* logits;            // forward: [B, N, K] Acc
  void* routed;                  // forward: [B, 2N, d]
  void* pooled;                  // forward: [B, 2d]
  void* weights;                 // [B, N, K] Acc: written by forward, read by backward
  const void *grad_routed, *grad_pooled;
  void *grad_facts, *grad_emotions;
  void* grad_logits;             // backward: [B, N, K] Acc
};

// F: the FFN's hidden width; T = 3 heads terms of H's factors.
struct HiddenArgs {
  int64_t K, N, T, F;
  const void *weights, *values, *visual;  // [B, K, N, T] [B, K, T, F] [B, N, F]
  void* hidden;                           // forward: [B, K, N, F]
  const void* grad_hidden;                // backward: [B, K, N, F]
  void *grad_weights, *grad_values, *grad_visual;
};

// A weight [groups][columns, depth] into panels (cpu/packed.h). A task is one group.
struct PackArgs {
  int64_t columns, depth;
  const void* weight;
  void* packed;
};

enum Activation { kNone, kGelu, kQuickGelu, kActivations };

// Rows that meet packed weights at a time: with their depth they stay in L2.
constexpr int64_t kBlockRows = 64;

// output = activation(input W^T + bias) + residual. A task is a block of rows times a group of columns.
struct LinearArgs {
  int64_t rows, depth, columns, row_blocks, column_groups;
  Activation activation;
  const void* input;     // [rows, depth] Acc
  const void* packed;    // W [columns, depth]
  const void* bias;      // [columns] Acc, or null
  const void* residual;  // [rows, columns] Acc, or null
  void* output;          // [rows, columns] Acc
};

// What evc_fast/ops/folded_encoder.py packs, in its order; W [out, in] as panels, sections of columns and of depth padded
// to kFoldedPad; biases and norms Acc, padded alike. Null where the configuration has no such part.
enum FoldedWeight {
  kVideoWeight, kVideoBias,    // [d, D_v]
  kVisualWeight, kVisualBias,  // [hidden | query? | emotion_query? | gate_key and gate_bias? | scores | values, d]
  kTripletWeight,              // [keys | values, D_t]
  kHiddenWeight,               // heads x [F | K K?, d / heads]
  kRouterBias,                 // [K]
  kFfnWeight, kFfnBias,        // [d, F]
  kNormWeight, kNormBias,
  kEmotionQueryWeight, kEmotionQueryBias,  // [d, d]
  kKey,                        // heads x [W, d / heads]
  kValue,                      // heads x [d / heads, W]
  kEmotionWeight, kEmotionBias,  // [E | query?, d]
  kGateWeight, kGateBias,        // [fact gate | emotion gate?, facts | context]
  kHeadWeight, kHeadBias,        // [W, d]
  kMemoryWeight,                 // [scores | values, d]
  kOutputWeight, kOutputBias,    // [d_out, d], not padded; [N_q, d_out]
  kFoldedWeights
};
constexpr int64_t kFoldedPad = 32;

// The folded encoder (evc_fast/reference/folded_encoder.py) for `videos` videos in a workspace of their own, as stages
// that must follow each other; the units of a stage are independent. K is 1 without retrieval. All data Acc but tokens,
// logits and gates, which have the weights' type.
struct FoldedArgs {
  int64_t N, K, W, d, heads, hidden, video_width, text_width, queries, output_width;
  bool project_video, retrieval, emotions, bias_adjustment, emotion_first, video_router, self_refine, cross_refine, explain;
  double norm_eps;
  const void* weights[kFoldedWeights];
  const void *video, *triplets, *similarity;  // [B, N, D_v] [B, K, 3, D_t] [B, K]
  const int64_t* groups;                      // [B, K] or null
  void *tokens, *emotion_logits;              // [B, N_q, d_out] [B, W]
  // with `explain` only: [B, K, 3] [B, K] [B, N, K] [B, K, W] [B, d] [B, d]
  void *component_weights, *triplet_weights, *routing_weights, *emotion_distribution, *fact_gate, *emotion_gate;
  int64_t first, videos;  // of the batch
  void* workspace;
};

struct FoldedKernel {
  int64_t (*matrix_size)(const FoldedArgs&, FoldedWeight);  // elements of a weight, 0 where there is none
  bool (*is_vector)(FoldedWeight);                          // Acc, and not packed
  size_t (*workspace_bytes)(const FoldedArgs&);
  size_t (*scratch_bytes)(const FoldedArgs&);  // per thread
  int64_t (*units)(const FoldedArgs&, int stage);
  void (*run)(const FoldedArgs&, int stage, int64_t begin, int64_t end, void* scratch);
  int stages;
};

template <class Args>
struct Kernel {
  size_t (*scratch_bytes)(const Args&);  // per thread
  void (*run)(const Args&, int64_t begin, int64_t end, void* scratch);
};

// Tasks: entropy B; emotion_forward B K; emotion_backward chunks; routing_forward 2 B; routing_backward B N;
// hidden_forward B K; hidden_backward B.
struct Kernels {
  Kernel<EntropyArgs> entropy_forward[kDtypes], entropy_backward[kDtypes];
  Kernel<EmotionArgs> emotion_pack[kDtypes], emotion_forward[kDtypes];  // pack: one task a head
  Kernel<EmotionArgs> emotion_backward[kDtypes], emotion_reduce[kDtypes];  // reduce: one task a word
  Kernel<RoutingArgs> routing_forward[kDtypes], routing_backward[kDtypes];
  Kernel<HiddenArgs> hidden_forward[kDtypes], hidden_backward[kDtypes];
  FoldedKernel folded[kDtypes];
  Kernel<PackArgs> pack[kDtypes];
  Kernel<LinearArgs> linear[kDtypes];
  int64_t (*packed_size[kDtypes])(int64_t columns, int64_t depth);  // elements of one packed group
  size_t (*emotion_dictionary_bytes[kDtypes])(const EmotionArgs&, bool backward);
  size_t (*emotion_partial_bytes[kDtypes])(const EmotionArgs&);  // a chunk
};

// Videos are summed in this many chunks, each in order, and the chunks in order: the dictionary's gradients depend on
// the batch alone, never on the number of threads.
inline int64_t emotion_chunks(int64_t batch) {
  return batch < 4 ? (batch > 0 ? 1 : 0) : batch / 4 < 32 ? batch / 4 : 32;
}

// One table a variant that was built; only `isa_default` runs on every machine.
namespace isa_default { const Kernels& kernels(); }
namespace isa_avx2 { const Kernels& kernels(); }
namespace isa_avx512 { const Kernels& kernels(); }
namespace isa_avx512_bf16 { const Kernels& kernels(); }

}  // namespace evc
