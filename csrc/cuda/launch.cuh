// Kernel launches, and what they need to know of the device. `<<<>>>` is no C++, so that every launch goes through the
// runtime's cudaLaunchKernelEx: tests compile these files with a C++ compiler.
#pragma once

#include <cuda_runtime.h>

#include "../cuda.h"

// Shared memory of a block; tests give every block its own, filled with NaN.
#ifndef EVC_SHARED
#define EVC_SHARED(type, name, count) __shared__ type name[count]
#define EVC_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace evc {

constexpr int kWarp = 32;
constexpr size_t kPlainSharedBytes = 48 << 10;  // a kernel gets more only where it asked for it

struct Grid {
  int blocks, threads;
  size_t shared_bytes = 0;  // dynamic
  bool cooperative = false;  // all blocks are resident at once, and may wait for each other (grid.cuh)
};

template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= kPlainSharedBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Errors of a launch are returned, and left behind for nobody else to find.
template <class... Expected, class... Given>
int launch(const Grid& grid, void* stream, void (*kernel)(Expected...), Given... arguments) {
  cudaError_t error = allow_shared(kernel, grid.shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid.blocks);
    config.blockDim = dim3(grid.threads);
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = grid.cooperative ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, Expected(arguments)...);
  }
  if (error != cudaSuccess) cudaGetLastError();
  return static_cast<int>(error);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 0;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Blocks for so many tasks, which each block takes gridDim.x apart: enough for all multiprocessors several times over.
inline int grid_size(const CudaLaunch& how, int64_t tasks) {
  const int64_t most = how.blocks > 0 ? how.blocks : int64_t(32) * multiprocessors();
  return static_cast<int>(tasks < most ? tasks : most);
}
// Dynamic shared memory that one block can ask for, bytes.
inline size_t shared_limit() { return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

// Blocks of this kernel that the device holds at once: the largest cooperative grid. 0 where not one fits.
template <class Kernel>
int resident_blocks(Kernel* kernel, int threads, size_t shared_bytes) {
  int per_multiprocessor = 0;
  if (allow_shared(kernel, shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, shared_bytes) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return per_multiprocessor * multiprocessors();
}

// f(S{}) for the launch's storage type.
template <class F>
int for_dtype(CudaDtype dtype, F&& f) {
  switch (dtype) {
    case kCudaFloat32: return f(float());
    case kCudaBFloat16: return f(BFloat16());
    case kCudaFloat16: return f(Float16());
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace evc
