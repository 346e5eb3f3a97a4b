// Factual calibration, equations (10)-(16), in one launch. A task is one triplet: a warp for each of its three
// components, and a fourth for the triplet's weight among those of its video.
#include "calibration.cuh"
#include "kernels.cuh"

namespace evc {
namespace {

constexpr int kComponents = 3;
constexpr int kThreads = (kComponents + 1) * kWarp;

template <class S>
__global__ void __launch_bounds__(kThreads, 4) calibrate(EntropyArgs args, int64_t tasks) {
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
        const float* similarity = static_cast<const float*>(args.similarity) + b * K;
        theta = triplet_weight([&](int64_t i) { return similarity[i]; }, groups, K, k);
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
