// Sums and maxima over the lanes of a warp and the threads of a block. Every thread of it must call, and gets the
// result; the order of a sum depends on the block's size alone.
#pragma once

#include "launch.cuh"

namespace evc {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  __device__ static float identity() { return 0.0f; }
  __device__ static float join(float a, float b) { return a + b; }
};
// NaN wins, as in a softmax that meets one.
struct Max {
  __device__ static float identity() { return -INFINITY; }
  __device__ static float join(float a, float b) { return a > b || a != a ? a : b; }
};

// Over groups of `width` neighbouring lanes, a power of two.
template <class Op, int width = kWarp>
__device__ inline float warp_reduce(float x) {
#pragma unroll
  for (int step = width / 2; step > 0; step /= 2) x = Op::join(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}
template <int width = kWarp>
__device__ inline float warp_sum(float x) {
  return warp_reduce<Sum, width>(x);
}
template <int width = kWarp>
__device__ inline float warp_max(float x) {
  return warp_reduce<Max, width>(x);
}

// scratch: [warps] shared, free for use before and after; the block has at most 32 warps, all whole.
template <class Op>
__device__ inline float block_reduce(float x, float* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_reduce<Op>(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = warp_reduce<Op>(lane < warps ? scratch[lane] : Op::identity());
  __syncthreads();
  return x;
}

}  // namespace evc
