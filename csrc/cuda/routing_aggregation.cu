// Dynamic bias routing, equations (22), (23), (26) and the sums of (27), in one launch that reads facts and emotions once.
// A task is a slice of the columns of one video's facts or emotions; a warp takes every so many of its frames.
#include "kernels.cuh"
#include "numeric.cuh"
#include "reduce.cuh"

namespace evc {
namespace {

constexpr int kMaxWarps = 16;

// Columns of a lane: 4 bytes, so that few videos still make many tasks.
template <class S>
constexpr int kWide = 4 / static_cast<int>(sizeof(S));

// The first `count` of kWide elements, 0 for the rest. whole: p is 4-byte aligned, and count 0 or kWide.
template <class S>
__device__ inline void load_word(const S* p, int count, bool whole, float (&x)[kWide<S>]) {
  union {
    uint32_t bits;
    S at[kWide<S>];
  } v{};
  if (whole) {
    if (count > 0) v.bits = *reinterpret_cast<const uint32_t*>(p);
  } else {
#pragma unroll
    for (int j = 0; j < kWide<S>; ++j)
      if (j < count) v.at[j] = p[j];
  }
#pragma unroll
  for (int j = 0; j < kWide<S>; ++j) x[j] = widen(v.at[j]);
}

template <class S>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) route(RoutingArgs args, int64_t slices, int64_t tasks) {
  constexpr int kColumns = kWide<S>;
  EVC_SHARED(float, sums, kMaxWarps* kWarp* kColumns);  // [warps][columns of the slice]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t K = args.K, N = args.N, d = args.d;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t slice = task % slices, of = task / slices % 2, b = task / slices / 2;
    const int64_t column = (slice * kWarp + lane) * kColumns;
    const int columns = column >= d ? 0 : d - column < kColumns ? static_cast<int>(d - column) : kColumns;  // the lane's
    const S* x = static_cast<const S*>(of ? args.emotions : args.facts) + b * K * N * d + column;
    S* routed = static_cast<S*>(args.routed) + (b * 2 + of) * N * d + column;
    const bool whole = reinterpret_cast<uintptr_t>(x) % 4 == 0 && d % kColumns == 0;
    const bool first_of_video = of == 0 && slice == 0;
    float sum[kColumns] = {}, lost[kColumns] = {};  // of the warp's frames, and what its rounding lost so far
    for (int64_t n = warp; n < N; n += warps) {
      const float* logits = static_cast<const float*>(args.logits) + (b * N + n) * K;
      float best = -INFINITY, total = 0;
      for (int64_t k = lane; k < K; k += kWarp) best = Max::join(logits[k], best);
      best = warp_max(best);
      for (int64_t k = lane; k < K; k += kWarp) total += expf(logits[k] - best);
      total = warp_sum(total);
      float weighted[kColumns] = {}, plain[kColumns] = {};
      const S* row = x + n * d;
      for (int64_t first = 0; first < K; first += kWarp) {
        const int64_t mine = first + lane;
        const float weight = mine < K ? expf(logits[mine] - best) / total : 0.0f;  // (26)
        if (first_of_video && mine < K) static_cast<float*>(args.weights)[(b * N + n) * K + mine] = weight;
        const int count = static_cast<int>(K - first < kWarp ? K - first : kWarp);
#pragma unroll 4
        for (int k = 0; k < count; ++k, row += N * d) {
          float at[kColumns];
          load_word(row, columns, whole, at);
          const float w = __shfl_sync(kAllLanes, weight, k);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            weighted[j] += w * at[j];
            plain[j] += at[j];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (j < columns) routed[n * d + j] = narrow<S>(weighted[j]);  // (27)
        const float more = plain[j] - lost[j], next = sum[j] + more;  // Kahan's sum
        lost[j] = (next - sum[j]) - more;
        sum[j] = next;
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[(warp * kWarp + lane) * kColumns + j] = sum[j];
    __syncthreads();
    for (int i = threadIdx.x; i < kWarp * kColumns; i += blockDim.x) {
      float total = 0;
      for (int w = 0; w < warps; ++w) total += sums[w * kWarp * kColumns + i];
      const int64_t at = slice * kWarp * kColumns + i;
      if (at < d) static_cast<S*>(args.pooled)[(b * 2 + of) * d + at] = narrow<S>(total / static_cast<float>(K * N));  // (22), (23)
    }
    __syncthreads();  // the next task writes what this one read
  }
}

}  // namespace

int routing_aggregation(const RoutingArgs& args, const CudaLaunch& how) {
  return for_dtype(how.dtype, [&](auto storage) {
    typedef decltype(storage) S;
    constexpr int64_t kSlice = kWarp * kWide<S>;
    const int64_t slices = (args.d + kSlice - 1) / kSlice, tasks = how.videos * 2 * slices;
    const int warps = static_cast<int>(args.N < kMaxWarps ? args.N : kMaxWarps);
    return launch({grid_size(how, tasks), warps * kWarp}, how.stream, route<S>, args, slices, tasks);
  });
}

}  // namespace evc
