// The contract between cuda_ops.cpp (tensors, streams) and csrc/cuda (kernels), which nvcc compiles into a library of
// its own, evc_fast/_cuda.so: it knows no torch, and nothing loads it where there is no GPU. Pointers are to contiguous
// memory of the current device. Launchers only enqueue on the stream that they are given: they allocate nothing, wait for
// nothing and can be captured into a graph. They return a cudaError_t, 0 for success.
#pragma once

#include "ops.h"

namespace evc {

// Storage types of the CUDA kernels; all accumulate in float.
enum CudaDtype { kCudaFloat32, kCudaBFloat16, kCudaFloat16, kCudaDtypes };

struct Float16 {
  uint16_t bits;
};

// How an op is launched, whatever it computes.
struct CudaLaunch {
  CudaDtype dtype;
  int64_t videos;   // B
  int blocks;       // grid size, for tests; 0: what suits the sizes and the device
  void* workspace;  // as many bytes as the op's `..._workspace` asks for, 256-byte aligned, uninitialised; null for 0
  void* stream;     // cudaStream_t
};

struct FoldedCudaKernels;  // cuda_folded.h

constexpr int kCudaKernelsVersion = 1;

struct CudaKernels {
  int version;                // kCudaKernelsVersion; the rest is read only where it matches
  bool emulated;              // tests: the kernels run on the CPU, on its memory
  const char* architectures;  // what the library was compiled for, as "80,90,90+PTX"
  // Why the kernels cannot run on the current device and what mends it, one sentence; null where they can.
  const char* (*obstacle)();
  const char* (*error_text)(int error);

  // Forward; `candidates` and all that belongs to backward stay unused, as does emotion_attention's `dictionary`.
  int (*entropy_calibration)(const EntropyArgs&, const CudaLaunch&);
  int (*emotion_attention)(const EmotionArgs&, const CudaLaunch&);
  int64_t (*emotion_attention_workspace)(const EmotionArgs&, const CudaLaunch&);  // bytes
  int (*routing_aggregation)(const RoutingArgs&, const CudaLaunch&);

  const FoldedCudaKernels* folded;
};

// What the library exports, by the name "evc_fast_cuda_kernels".
typedef const CudaKernels* (*CudaKernelsEntry)();

}  // namespace evc
