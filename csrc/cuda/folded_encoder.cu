// The folded encoder and Q-former, equations (10)-(29) with fixed weights (evc_fast/reference/folded_encoder.py), in one
// cooperative launch of one block a multiprocessor.
#include "folded_facts.cuh"
#include "folded_tokens.cuh"
#include "grid.cuh"
#include "kernels.cuh"

#include <algorithm>
#include <cstdio>
#include <limits>

namespace evc::folded {
namespace {

// Asks for what the stages to come read of the weights: a block's share, into the cache that all blocks read.
template <class S>
__device__ void prefetch([[maybe_unused]] const Layout<S>& p) {
#ifdef __CUDA_ARCH__
  constexpr int64_t kLine = 128;
  for (int w = static_cast<int>(FoldedCudaWeight::kHidden); w < kFoldedCudaWeights; ++w) {
    const auto weight = static_cast<FoldedCudaWeight>(w);
    const auto size = p.size(weight);
    const int64_t bytes = int64_t(size.columns) * size.depth * (Layout<S>::is_vector(weight) ? sizeof(float) : sizeof(S));
    for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kLine; at < bytes; at += int64_t(gridDim.x) * kThreads * kLine)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(static_cast<const char*>(p.packed[w]) + at)));
  }
#endif
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) encode(const __grid_constant__ Layout<S> p) {
  EVC_DYNAMIC_SHARED(memory);
  const Facts<S> facts(p, memory);
  const Tokens<S> tokens(p, memory);
  facts.products();
  const unsigned arrived = grid_arrive();
  prefetch(p);
  grid_wait(arrived);
  if (p.emotion_first) {
    facts.gate_of_frames();
    grid_barrier();
    tokens.context_of_frames();
    grid_barrier();
    facts.emotions_of_frames();
    grid_barrier();
  }
  if (p.retrieval) {
    facts.hidden();
    grid_barrier();
  }
  facts.ffn();
  grid_barrier();
  facts.facts();
  grid_barrier();
  tokens.routing();
  grid_barrier();
  tokens.gates();
  grid_barrier();
  tokens.memory();
  grid_barrier();
  tokens.tokens();
}

template <class F>
auto with_layout(const FoldedCudaArgs& args, CudaDtype dtype, int64_t videos, void* workspace, F&& f) {
  switch (dtype) {
    case kCudaBFloat16: return f(Layout<BFloat16>(args, videos, workspace));
    case kCudaFloat16: return f(Layout<Float16>(args, videos, workspace));
    default: return f(Layout<float>(args, videos, workspace));
  }
}

void weight_sizes(const FoldedCudaArgs& args, CudaDtype dtype, int64_t (&sizes)[kFoldedCudaWeights]) {
  with_layout(args, dtype, 1, nullptr, [&](const auto& layout) {
    for (int w = 0; w < kFoldedCudaWeights; ++w) {
      const auto size = layout.size(static_cast<FoldedCudaWeight>(w));
      sizes[w] = int64_t(size.columns) * size.depth;
    }
  });
}
bool is_vector(FoldedCudaWeight weight) { return Layout<float>::is_vector(weight); }

int64_t workspace(const FoldedCudaArgs& args, const CudaLaunch& how) {
  return with_layout(args, how.dtype, how.videos, nullptr, [](const auto& layout) { return layout.workspace_bytes; });
}

const char* obstacle(const FoldedCudaArgs& args, const CudaLaunch& how) {
  static thread_local char text[256];
  const auto limit = static_cast<int64_t>(shared_limit());
  return with_layout(args, how.dtype, 1, nullptr, [&](const auto& layout) -> const char* {
    int columns = 0;
    for (int w = 0; w < kFoldedCudaWeights; ++w) columns = std::max(columns, layout.size(static_cast<FoldedCudaWeight>(w)).columns);
    const int64_t of_video = args.K * layout.row_tiles * int64_t(columns), most = std::numeric_limits<int>::max() / of_video;
    if (layout.shared_bytes > limit)
      snprintf(text, sizeof(text),
               "the CUDA kernel needs %lld bytes of shared memory for N = %d, d = %d and N_q = %d, and a block has %lld here: use "
               "impl=\"reference\"",
               static_cast<long long>(layout.shared_bytes), layout.N, layout.d, layout.queries, static_cast<long long>(limit));
    else if (how.videos > most)
      snprintf(text, sizeof(text), "the CUDA kernel takes %lld videos of these sizes at a time, got %lld: split the batch",
               static_cast<long long>(most), static_cast<long long>(how.videos));
    else
      return nullptr;
    return text;
  });
}

int run(const FoldedCudaArgs& args, const CudaLaunch& how) {
  return with_layout(args, how.dtype, how.videos, how.workspace, [&](const auto& layout) {
    const auto kernel = encode<typename std::decay_t<decltype(layout)>::Storage>;
    const auto bytes = static_cast<size_t>(layout.shared_bytes);
    const int resident = resident_blocks(kernel, kThreads, bytes);
    if (resident == 0) return static_cast<int>(cudaErrorCooperativeLaunchTooLarge);
    const int own = resident < multiprocessors() ? resident : multiprocessors();
    return launch({how.blocks > 0 ? how.blocks : own, kThreads, bytes, true}, how.stream, kernel, layout);
  });
}

}  // namespace
}  // namespace evc::folded

namespace evc {

const FoldedCudaKernels kFoldedKernels{folded::weight_sizes, folded::is_vector, folded::workspace, folded::obstacle, folded::run};

}  // namespace evc
