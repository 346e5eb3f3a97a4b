// Tensors in, tensors out: the folded encoder on the GPU, one launch for the whole of equations (10)-(29).
#include "cuda_folded.h"

#include "cuda_tensors.h"

namespace evc {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The order of `sizes` in the schema, as the CPU's folded encoder has it; flags are 0 or 1.
FoldedCudaArgs sizes_of(const std::vector<int64_t>& sizes) {
  FoldedCudaArgs a{};
  int64_t* const numbers[] = {&a.K, &a.W, &a.d, &a.heads, &a.hidden, &a.video_width, &a.text_width, &a.queries, &a.output_width};
  bool* const flags[] = {nullptr,          &a.retrieval,    &a.emotions,    &a.bias_adjustment,
                         &a.emotion_first, &a.video_router, &a.self_refine, &a.cross_refine};
  constexpr size_t kNumbers = std::size(numbers), kFlags = std::size(flags);
  STD_TORCH_CHECK(sizes.size() == kNumbers + kFlags, "evc_fast: not a folded encoder");
  for (size_t i = 0; i < kNumbers; ++i) *numbers[i] = sizes[i];
  for (size_t i = 1; i < kFlags; ++i) *flags[i] = sizes[kNumbers + i] != 0;
  const int64_t positive[] = {a.K, a.d, a.heads, a.hidden, a.video_width, a.queries, a.output_width};
  for (int64_t size : positive) STD_TORCH_CHECK(size > 0, "evc_fast: no size may be 0");
  STD_TORCH_CHECK(a.d % a.heads == 0, "evc_fast: heads must divide d");
  STD_TORCH_CHECK(!a.retrieval || a.text_width > 0, "evc_fast: triplets have no features");
  STD_TORCH_CHECK(!a.emotions || a.W > 0, "evc_fast: the dictionary has no words");
  STD_TORCH_CHECK(a.emotions || !a.emotion_first, "evc_fast: emotions cannot come first where there are none");
  STD_TORCH_CHECK(a.retrieval || a.K == 1, "evc_fast: without retrieval K is 1");
  return a;
}

Outputs folded_encoder_cuda(const Tensor& video_, std::optional<Tensor> triplets_, std::optional<Tensor> similarity_,
                            std::optional<Tensor> groups_, std::vector<Tensor> weights, std::vector<int64_t> sizes,
                            double norm_eps, bool explain) {
  STD_TORCH_CHECK(weights.size() == kFoldedCudaWeights, "evc_fast: not a folded encoder");
  check_first(video_, "video", 3);
  FoldedCudaArgs a = sizes_of(sizes);
  const int64_t B = video_.size(0);
  const Tensor& like = weights[static_cast<int>(FoldedCudaWeight::kFfn)];
  const ScalarType type = like.scalar_type(), wide = ScalarType::Float;
  CudaCall call(like, B);
  STD_TORCH_CHECK(call.kernels.folded, "evc_fast: the loaded CUDA kernels hold no folded encoder");
  const FoldedCudaKernels& kernel = *call.kernels.folded;
  a.N = video_.size(1), a.norm_eps = norm_eps, a.explain = explain;
  a.wide_features = video_.scalar_type() == wide;
  a.wide_similarity = similarity_ && similarity_->scalar_type() == wide;
  const ScalarType features = a.wide_features ? wide : type;

  std::vector<Tensor> held;  // keeps copies alive that were made contiguous
  const auto hold = [&](const Tensor& tensor, const char* name, const std::vector<int64_t>& size, ScalarType of) {
    held.push_back(call.checked(tensor, name, size, of));
    return held.back().data_ptr();
  };
  int64_t weight_sizes[kFoldedCudaWeights];
  kernel.weight_sizes(a, call.launch.dtype, weight_sizes);
  for (int w = 0; w < kFoldedCudaWeights; ++w) {
    const bool vector = kernel.is_vector(static_cast<FoldedCudaWeight>(w));
    a.packed[w] = hold(weights[w], "a folded weight", {weight_sizes[w]}, vector ? wide : type);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(a.packed[w]) % 16 == 0, "evc_fast: a folded weight is not aligned to 16 bytes");
  }
  a.video = hold(video_, "video", {B, a.N, a.video_width}, features);
  STD_TORCH_CHECK(a.retrieval == triplets_.has_value() && a.retrieval == similarity_.has_value(),
                  "evc_fast: triplets and similarity belong to retrieval");
  if (a.retrieval) {
    a.triplets = hold(*triplets_, "triplets", {B, a.K, 3, a.text_width}, features);
    a.similarity = hold(*similarity_, "similarity", {B, a.K}, a.wide_similarity ? wide : type);
  }
  if (groups_) a.groups = static_cast<const int64_t*>(hold(*groups_, "groups", {B, a.K}, ScalarType::Long));
  const char* obstacle = kernel.obstacle(a, call.launch);
  STD_TORCH_CHECK(!obstacle, "evc_fast: ", obstacle);

  const int64_t shown = explain ? B : 0, shown_triplets = a.retrieval ? shown : 0, shown_emotions = a.emotions ? shown : 0;
  std::vector<Tensor> made;
  const auto output = [&](void*& data, const std::vector<int64_t>& size, ScalarType of) {
    made.push_back(call.output(size, of));
    data = made.back().data_ptr();
  };
  output(a.tokens, {B, a.queries, a.output_width}, type);
  output(a.emotion_logits, {a.emotions ? B : 0, a.W}, type);
  output(a.component_weights, {shown_triplets, a.K, 3}, wide);
  output(a.triplet_weights, {shown_triplets, a.K}, wide);
  output(a.routing_weights, {shown, a.N, a.K}, wide);
  output(a.emotion_distribution, {shown_emotions, a.K, a.W}, wide);
  output(a.fact_gate, {shown, a.d}, type);
  output(a.emotion_gate, {shown_emotions, a.d}, type);
  if (B > 0) {
    call.allocate_workspace(kernel.workspace(a, call.launch));
    call.check(kernel.run(a, call.launch));
  }
  return {made[0], made[1], made[2], made[3], made[4], made[5], made[6], made[7]};
}

}  // namespace
}  // namespace evc

// Why the loaded kernel does not run one video of these sizes on the current device, or null; `count` as in the schema.
extern "C" __attribute__((visibility("default"))) const char* evc_fast_folded_cuda_obstacle(const int64_t* sizes, int64_t count,
                                                                                           int64_t frames, int dtype,
                                                                                           int on_cpu) {
  static thread_local std::string reason;
  try {
    evc::FoldedCudaArgs args = evc::sizes_of({sizes, sizes + count});
    args.N = frames;
    const evc::FoldedCudaKernels* kernel = evc::cuda_kernels(on_cpu != 0).folded;
    STD_TORCH_CHECK(kernel, "evc_fast: the loaded CUDA kernels hold no folded encoder");
    evc::CudaLaunch launch{};
    launch.dtype = static_cast<evc::CudaDtype>(dtype);
    launch.videos = 1;
    return kernel->obstacle(args, launch);
  } catch (const std::exception& error) {
    reason = error.what();
    return reason.c_str();
  }
}

STABLE_TORCH_LIBRARY_IMPL(evc_fast, CUDA, m) { m.impl("folded_encoder_cuda", TORCH_BOX(&evc::folded_encoder_cuda)); }
STABLE_TORCH_LIBRARY_IMPL(evc_fast, CPU, m) { m.impl("folded_encoder_cuda", TORCH_BOX(&evc::folded_encoder_cuda)); }
