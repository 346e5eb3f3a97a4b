// Factual calibration, equations (10)-(16), in one launch. A task is one triplet: a warp for each of its three
// components, and a fourth for the triplet's weight among those of its video.
#include "kernels.cuh"
#include "numeric.cuh"
#include "reduce.cuh"

namespace evc {
namespace {

constexpr int kComponents = 3;
constexpr int kThreads = (kComponents + 1) * kWarp;
constexpr float kMinSimilarity = 1e-6f;

// Entropy of softmax(x) (11), as logsumexp(x) - sum p x. x: [D]; a warp's work, every lane returns it.
template <class S>
__device__ float entropy(const S* x, int64_t D) {
  constexpr int kPer = kVector<S>;
  const bool aligned = is_aligned(x);
  const int64_t first = threadIdx.x % kWarp * kPer;
  float at[kPer], best = -INFINITY;
  for (int64_t i = first; i < D; i += kWarp * kPer) {
    load_vector(x, i, D, aligned, at, -INFINITY);
#pragma unroll
    for (int j = 0; j < kPer; ++j) best = Max::join(at[j], best);
  }
  best = warp_max(best);
  float total = 0, moment = 0;
  for (int64_t i = first; i < D; i += kWarp * kPer) {
    load_vector(x, i, D, aligned, at, -INFINITY);
    float some = 0, some_moment = 0;  // summed before they join the total: shorter chains, smaller error
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const float shifted = at[j] - best, p = expf(shifted);
      some += p;
      some_moment += p > 0 ? p * shifted : p;  // 0 log 0 = 0
    }
    total += some;
    moment += some_moment;
  }
  total = warp_sum(total);
  return logf(total) - warp_sum(moment) / total;
}

__device__ inline bool same_group(const int64_t* groups, int64_t i, int64_t j) {
  return groups ? groups[i] == groups[j] : i == j;
}
__device__ inline double clamped(float similarity) { return similarity < kMinSimilarity ? kMinSimilarity : similarity; }

__device__ inline double warp_sum_double(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// theta of triplet k (14), (15). similarity, groups: [K], groups may be null; a warp's work, every lane returns it. In
// double: where one similarity outweighs all others, log p of a p near 1 keeps its digits.
__device__ inline float triplet_weight(const float* similarity, const int64_t* groups, int64_t K, int64_t k) {
  const int lane = threadIdx.x % kWarp;
  double all = 0;
  bool single = true;
  for (int64_t i = lane; i < K; i += kWarp) {
    all += clamped(similarity[i]);
    single = single && same_group(groups, 0, i);
  }
  if (__all_sync(kAllLanes, single)) return 1.0f / static_cast<float>(K);
  all = warp_sum_double(all);
  double total = 0, own = 0;
  for (int64_t i = lane; i < K; i += kWarp) {
    double p = 0;
    for (int64_t j = 0; j < K; ++j)
      if (same_group(groups, i, j)) p += clamped(similarity[j]);
    p /= all;
    const double p_log_p = p * log(p);
    total += p_log_p;
    if (i == k) own = p_log_p;
  }
  total = warp_sum_double(total);
  return static_cast<float>(__shfl_sync(kAllLanes, own, static_cast<int>(k % kWarp)) / total);
}

template <class S>
__global__ void __launch_bounds__(kThreads) calibrate(EntropyArgs args, int64_t tasks) {
  EVC_SHARED(float, entropies, kComponents);
  EVC_SHARED(float, shared_theta, 1);
  constexpr int kPer = kVector<S>;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t K = args.K, D = args.D;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t b = task / K, k = task % K;
    const S* x = static_cast<const S*>(args.triplets) + task * kComponents * D;
    S* y = static_cast<S*>(args.calibrated) + task * kComponents * D;
    if (warp < kComponents) {
      const float h = args.self_refine ? entropy(x + warp * D, D) : 0.0f;
      if (lane == 0) entropies[warp] = h;
    } else {
      float theta = 1.0f / static_cast<float>(K);
      if (args.cross_refine) {
        const int64_t* groups = args.groups ? args.groups + b * K : nullptr;
        theta = triplet_weight(static_cast<const float*>(args.similarity) + b * K, groups, K, k);
      }
      if (lane == 0) {
        *shared_theta = theta;
        static_cast<float*>(args.triplet_weights)[task] = theta;
      }
    }
    __syncthreads();
    const float total = entropies[0] + entropies[1] + entropies[2], theta = *shared_theta;
#pragma unroll
    for (int c = 0; c < kComponents; ++c) {
      const float alpha = args.self_refine && total != 0 ? entropies[c] / total : 1.0f / 3.0f;  // (12)
      if (threadIdx.x == 0) static_cast<float*>(args.component_weights)[task * kComponents + c] = alpha;
      const float scale = theta * alpha;  // (13), (16)
      const S* from = x + c * D;
      S* to = y + c * D;
      const bool aligned = is_aligned(from) && is_aligned(to);
      for (int64_t i = threadIdx.x * kPer; i < D; i += kThreads * kPer) {
        float at[kPer];
        load_vector(from, i, D, aligned, at);
#pragma unroll
        for (int j = 0; j < kPer; ++j) at[j] *= scale;
        store_vector(at, to, i, D, aligned);
      }
    }
    __syncthreads();  // the next task writes what this one read
  }
}

}  // namespace

int entropy_calibration(const EntropyArgs& args, const CudaLaunch& how) {
  const int64_t tasks = how.videos * args.K;
  const Grid grid{grid_size(how, tasks), kThreads};
  return for_dtype(how.dtype, [&](auto storage) { return launch(grid, how.stream, calibrate<decltype(storage)>, args, tasks); });
}

}  // namespace evc
