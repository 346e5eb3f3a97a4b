// What csrc/cuda's headers offer to kernels, one kernel each, for tests: on a GPU as under the emulation.
#include "../../csrc/cuda/grid.cuh"
#include "../../csrc/cuda/mma.cuh"
#include "../../csrc/cuda/reduce.cuh"

#define EVC_TEST extern "C" __attribute__((visibility("default")))

namespace evc {
namespace {

// c [16, 8] = a [16, 16] b^T [8, 16], each lane's elements as mma.cuh says.
template <class S>
__global__ void product(const S* a, const S* b, float* c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto pair = [](const S* from) { return from[0].bits | uint32_t(from[1].bits) << 16; };
  uint32_t from_a[4], from_b[2];
  for (int i = 0; i < 4; ++i) from_a[i] = pair(a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
  for (int i = 0; i < 2; ++i) from_b[i] = pair(b + g * 16 + 2 * t + i * 8);
  float sums[4] = {};
  mma<S>(sums, from_a, from_b);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// to[i] = from[i] through storage S, and back.
template <class S>
__global__ void convert(const float* from, S* stored, float* to, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    stored[i] = narrow<S>(from[i]);
    to[i] = widen(stored[i]);
  }
}

// to = 2 from, by vectors of a row of any length and alignment.
template <class S>
__global__ void twice(const S* from, S* to, int64_t n) {
  const bool aligned = is_aligned(from) && is_aligned(to);
  for (int64_t i = threadIdx.x * kVector<S>; i < n; i += blockDim.x * kVector<S>) {
    float x[kVector<S>];
    load_vector(from, i, n, aligned, x);
    for (float& value : x) value *= 2;
    store_vector(x, to, i, n, aligned);
  }
}

// Of a block's x: the sum to every thread's place, and the largest.
__global__ void reduce(const float* x, float* sums, float* largest) {
  EVC_SHARED(float, scratch, kWarp);
  sums[threadIdx.x] = block_reduce<Sum>(x[threadIdx.x], scratch);
  largest[threadIdx.x] = block_reduce<Max>(x[threadIdx.x], scratch);
}

// `rounds` times, x[i] becomes x[i + 1] + 1, around the whole grid.
__global__ void shift(float* x, int rounds) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  for (int round = 0; round < rounds; ++round) {
    const float next = x[(i + 1) % n];
    grid_barrier();
    x[i] = next + 1;
    grid_barrier();
  }
}

}  // namespace
}  // namespace evc

using namespace evc;

EVC_TEST int test_product(bool half, const void* a, const void* b, float* c) {
  if (half) return launch({1, kWarp}, nullptr, product<Float16>, static_cast<const Float16*>(a), static_cast<const Float16*>(b), c);
  return launch({1, kWarp}, nullptr, product<BFloat16>, static_cast<const BFloat16*>(a), static_cast<const BFloat16*>(b), c);
}
EVC_TEST int test_convert(bool half, const float* from, void* stored, float* to, int64_t n) {
  if (half) return launch({1, 64}, nullptr, convert<Float16>, from, static_cast<Float16*>(stored), to, n);
  return launch({1, 64}, nullptr, convert<BFloat16>, from, static_cast<BFloat16*>(stored), to, n);
}
EVC_TEST int test_twice(int dtype, const void* from, void* to, int64_t n) {
  return for_dtype(static_cast<CudaDtype>(dtype), [&](auto storage) {
    typedef decltype(storage) S;
    return launch({1, 64}, nullptr, twice<S>, static_cast<const S*>(from), static_cast<S*>(to), n);
  });
}
EVC_TEST int test_reduce(int threads, const float* x, float* sums, float* largest) {
  return launch({1, threads}, nullptr, reduce, x, sums, largest);
}
EVC_TEST int test_shift(int blocks, int threads, float* x, int rounds) {
  return launch({blocks, threads, 0, true}, nullptr, shift, x, rounds);
}
EVC_TEST int test_synchronize() {
#ifdef EVC_EMULATION
  return 0;
#else
  return static_cast<int>(cudaDeviceSynchronize());
#endif
}

#ifdef EVC_EMULATION

// What would hang or corrupt a GPU, and what only a lockstep of lanes would make right.
namespace {
__global__ void mistake(int which, float* x) {
  EVC_DYNAMIC_SHARED(raw);
  EVC_SHARED(float, plain, 32);
  float* shared = reinterpret_cast<float*>(raw);
  const int t = threadIdx.x;
  switch (which) {
    case 0:
      if (t != 5) __syncthreads();
      break;
    case 1:
      if (t < 32) __syncthreads();
      else __syncwarp();
      break;
    case 2: x[t] = __shfl_xor_sync(t % 2 ? kAllLanes : 1u, 1.0f, 1); break;
    case 3:
      if (t % 2) x[t] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
      else __syncwarp();
      break;
    case 4:
      while (x[0] != 7) __nanosleep(0);
      break;
    case 5: shared[16] = 1; break;
    case 6: plain[32] = 1; break;
    case 7: x[t] = shared[t % 16] + plain[t % 32]; break;
    case 8:  // no barrier between the write and the neighbour's read
      shared[t % 16] = static_cast<float>(t);
      x[t] = shared[(t + 1) % 16];
      break;
    case 9: grid_wait(blockIdx.x == 0 ? grid_arrive() : 0); break;
    default: break;
  }
}
}  // namespace
EVC_TEST int test_mistake(int which, float* x) { return launch({2, 64, 64, which == 9}, nullptr, mistake, which, x); }
EVC_TEST int test_launch(int blocks, int threads, int64_t shared_bytes, bool cooperative) {
  return launch({blocks, threads, static_cast<size_t>(shared_bytes), cooperative}, nullptr, mistake, -1, static_cast<float*>(nullptr));
}
EVC_TEST const char* test_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#endif
