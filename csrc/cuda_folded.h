// The folded encoder's part of the contract in cuda.h: what evc_fast/ops/folded_cuda.py packs, and the one kernel.
#pragma once

#include "cuda.h"

namespace evc {

// Matrices W [out, in] of the weights' type as tiles of 8 rows, in the order in which a warp reads them: float32 as
// [tiles][in / 4][8][4], 16-bit types as [tiles][in / 32][8][32]; biases and norms float. All sections of columns and of
// depth are padded with zeros; `by head`: heads sections of d / heads, each to whole tiles. Empty where the
// configuration has no such part.
enum class FoldedCudaWeight {
  // All products of the frames, W_v of (2) multiplied in, so that none waits for V:
  // [V | hidden | query? | words? | gate key? | gate bias? | scores | values, D_v]; query, values by head.
  kVisual,
  kVisualBias,
  kTriplet,     // [keys | values, D_t], by head
  kHidden,      // [F | K x router?, d by head]: the FFN's first layer of H, and each triplet's own block of W_g
  kRouterBias,  // [K]
  kFfn,         // [d, F]
  kFfnBias,
  kNormWeight,
  kNormBias,
  kWords,  // heads x [W, d]: the scores of (19), Attn_c's q multiplied in; among kVisual's where emotions come first
  kWordsBias,
  kValue,    // [d by head, W]
  kEmotion,  // [E | query by head?, d by head]
  kEmotionBias,
  kGate,  // [fact gate | emotion gate?, facts | context by head?]
  kGateBias,
  kHead,  // [W, d by head]
  kHeadBias,
  kMemory,      // [scores | values by head, d]
  kOutput,      // [d_out, d by head]
  kOutputBias,  // [N_q, d_out], not padded
  kCount
};
constexpr int kFoldedCudaWeights = static_cast<int>(FoldedCudaWeight::kCount);

// FoldedArgs' weights, first, videos and workspace stay unused.
struct FoldedCudaArgs : FoldedArgs {
  const void* packed[kFoldedCudaWeights];
  bool wide_features, wide_similarity;  // float32, whatever the weights' type
};

struct FoldedCudaKernels {
  // Elements of each weight, 0 where there is none.
  void (*weight_sizes)(const FoldedCudaArgs&, CudaDtype, int64_t (&sizes)[kFoldedCudaWeights]);
  bool (*is_vector)(FoldedCudaWeight);                                // float, and not packed
  int64_t (*workspace)(const FoldedCudaArgs&, const CudaLaunch&);     // bytes
  const char* (*obstacle)(const FoldedCudaArgs&, const CudaLaunch&);  // why these sizes do not run here, or null
  int (*run)(const FoldedCudaArgs&, const CudaLaunch&);
};

}  // namespace evc
