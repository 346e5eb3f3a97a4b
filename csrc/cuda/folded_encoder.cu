// The folded encoder and Q-former, equations (10)-(29) with fixed weights (evc_fast/reference/folded_encoder.py), in one
// cooperative launch: a block of 256 threads on each multiprocessor, stages with a barrier of the whole grid between them.
//
// Few videos are a chain of small steps, and each step waits longer than it computes. So the chain is short: W_v is
// multiplied into all that reads V, Attn_c's q into its keys; calibration scales rows after their product; routing runs
// column by column beside the attention that it sums. Each stage spreads over all multiprocessors, its loads wait
// together, and weights stay in the order in which a warp's lanes read them.
//
// | stage     | what                                             | blocks | weights, KB | MFLOP | us, predicted |
// |-----------|--------------------------------------------------|--------|-------------|-------|---------------|
// | products  | V, and all products of frames; keys and values   |        |             |       |               |
// |           | of the triplets; theta alpha (10)-(15)           |    107 |        3361 |    54 | 1.0           |
// | hidden    | H (17), the FFN's hidden layer, router's parts   |    132 |         799 |    50 | 1.3           |
// | ffn       | the FFN's second layer; routing weights (26)     |     81 |         780 |    50 | 0.9           |
// | facts     | F (18), scores of its attentions (19), (20)      |    132 |         497 |    32 | 1.0           |
// | routing   | (19)-(23) and the sums of (27), 8 columns each   |     80 |         123 |     9 | 1.4           |
// | gates     | (24), (25), E, M of (27)                         |     80 |        1028 |    16 | 0.7           |
// | memory    | scores and values of M, emotion logits           |     68 |         410 |    11 | 0.6           |
// | tokens    | Attn_d and phi_M (29)                            |     64 |        1573 |   126 | 1.6           |
//
// The table is of one video, N = 16, K = 4, d = 300, W = 179, N_q = 32, d_out = 2048, in bfloat16 on 132 multiprocessors.
// Blocks, bytes (biases included) and FLOPs, padding and repeated work included, are counted. The times are a prediction
// and no measurement: a load from L2 at 0.35 us, one to three of them in a row in a stage, a warp's dependent products at
// 18 cycles, 1.9 GHz. With 7 barriers of 1.2 us and a launch of 3 us they make 20 us. The 8.6 MB of weights, where they
// are not in L2 yet, take 2 us at 4.3 TB/s; all but the first stage's are asked for while the first barrier waits.
// With emotions first three stages more stand before `hidden`; without retrieval `hidden` falls away.
//
// Compiled for sm_90 (nvcc 13.0): 204 registers, no stack, no spill, 47 KB of shared memory for these sizes: one block a
// multiprocessor, so that all blocks are resident; float32 takes 192 registers and 75 KB.
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
#pragma unroll 1
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

const FoldedCudaKernels kFoldedKernels{folded::weight_sizes, folded::is_vector, folded::workspace, folded::obstacle,
                                       folded::run};

}  // namespace evc
