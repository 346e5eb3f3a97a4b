// The weights of factual calibration, (10)-(15): a warp's work each.
#pragma once

#include "numeric.cuh"
#include "reduce.cuh"

namespace evc {

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

// theta of triplet k (14), (15). similarity(i): of triplet i < K; groups: [K] or null; a warp's work, every lane returns it. In
// double: where one similarity outweighs all others, log p of a p near 1 keeps its digits.
template <class Similarity>
__device__ float triplet_weight(const Similarity& similarity, const int64_t* groups, int64_t K, int64_t k) {
  const int lane = threadIdx.x % kWarp;
  double all = 0;
  bool single = true;
  for (int64_t i = lane; i < K; i += kWarp) {
    all += clamped(similarity(i));
    single = single && same_group(groups, 0, i);
  }
  if (__all_sync(kAllLanes, single)) return 1.0f / static_cast<float>(K);
  all = warp_sum_double(all);
  double total = 0, own = 0;
  for (int64_t i = lane; i < K; i += kWarp) {
    double p = 0;
    for (int64_t j = 0; j < K; ++j)
      if (same_group(groups, i, j)) p += clamped(similarity(j));
    p /= all;
    const double p_log_p = p * log(p);
    total += p_log_p;
    if (i == k) own = p_log_p;
  }
  total = warp_sum_double(total);
  return static_cast<float>(__shfl_sync(kAllLanes, own, static_cast<int>(k % kWarp)) / total);
}

}  // namespace evc
