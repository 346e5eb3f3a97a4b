// Every launcher of csrc/cuda: table.cu gathers them.
#pragma once

#include "../cuda_folded.h"

namespace evc {

int entropy_calibration(const EntropyArgs& args, const CudaLaunch& how);
int emotion_attention(const EmotionArgs& args, const CudaLaunch& how);
int64_t emotion_attention_workspace(const EmotionArgs& args, const CudaLaunch& how);
int routing_aggregation(const RoutingArgs& args, const CudaLaunch& how);

extern const FoldedCudaKernels kFoldedKernels;

}  // namespace evc
