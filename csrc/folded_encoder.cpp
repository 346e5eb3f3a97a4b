// Tensors in, tensors out: the folded encoder, one call for the whole of equations (10)-(29).
#include "tensors.h"

namespace evc {
namespace {

// The order of `sizes` in the schema; flags are 0 or 1.
enum Size {
  kTriplets, kWords, kWidth, kHeads, kHidden, kVideoWidth, kTextWidth, kQueries, kOutputWidth, kProjectVideo, kRetrieval,
  kEmotions, kBiasAdjustment, kEmotionFirst, kVideoRouter, kSelfRefine, kCrossRefine, kSizes
};

// Videos that one thread takes through all stages together: enough rows to pass over the weights once for several.
int64_t videos_together(int64_t frames) { return std::max<int64_t>(1, 32 / frames); }

// Many videos: each thread takes its own through all stages. The rest, fewer than threads: all threads share each stage.
void run_folded(const FoldedKernel& kernel, FoldedArgs args, int64_t batch) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t alone = batch / threads * threads, group = videos_together(args.N);
  if (alone > 0) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        FoldedArgs own = args;
        const int64_t last = alone / threads * (t + 1);
        for (own.first = alone / threads * t; own.first < last; own.first += own.videos) {
          own.videos = std::min(group, last - own.first);
          own.workspace = thread_scratch(kernel.workspace_bytes(own), kWorkspace);
          void* scratch = thread_scratch(kernel.scratch_bytes(own));
          for (int stage = 0; stage < kernel.stages; ++stage) {
            const int64_t units = kernel.units(own, stage);
            if (units > 0) kernel.run(own, stage, 0, units, scratch);
          }
        }
      }
    });
  }
  if (alone == batch) return;
  args.first = alone;
  args.videos = batch - alone;
  args.workspace = thread_scratch(kernel.workspace_bytes(args), kWorkspace);
  const size_t bytes = kernel.scratch_bytes(args);
  for (int stage = 0; stage < kernel.stages; ++stage)
    torch::stable::parallel_for(0, kernel.units(args, stage), 1, [&](int64_t begin, int64_t end) {
      kernel.run(args, stage, begin, end, thread_scratch(bytes));
    });
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs folded_encoder_forward(const Tensor& video_, const std::optional<Tensor>& triplets_,
                               const std::optional<Tensor>& similarity_, const std::optional<Tensor>& groups_,
                               const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes, double norm_eps,
                               bool explain) {
  STD_TORCH_CHECK(sizes.size() == kSizes && weights.size() == kFoldedWeights, "evc_fast: not a folded encoder");
  for (int i = 0; i < kProjectVideo; ++i)
    STD_TORCH_CHECK(sizes[i] > 0 || ((i == kWords || i == kTextWidth) && sizes[i] == 0), "evc_fast: no size may be 0");
  check_first(video_, "video", 3);
  const Dtype dtype = dtype_of(weights[kFfnWeight]);
  const ScalarType type = weights[kFfnWeight].scalar_type(), acc = accumulator(dtype);
  const int64_t B = video_.size(0);
  FoldedArgs a{};
  a.N = video_.size(1), a.K = sizes[kTriplets], a.W = sizes[kWords], a.d = sizes[kWidth], a.heads = sizes[kHeads];
  a.hidden = sizes[kHidden], a.video_width = sizes[kVideoWidth], a.text_width = sizes[kTextWidth];
  a.queries = sizes[kQueries], a.output_width = sizes[kOutputWidth], a.project_video = sizes[kProjectVideo];
  a.retrieval = sizes[kRetrieval], a.emotions = sizes[kEmotions], a.bias_adjustment = sizes[kBiasAdjustment];
  a.emotion_first = sizes[kEmotionFirst], a.video_router = sizes[kVideoRouter], a.self_refine = sizes[kSelfRefine];
  a.cross_refine = sizes[kCrossRefine], a.norm_eps = norm_eps, a.explain = explain;
  STD_TORCH_CHECK(a.d % a.heads == 0, "evc_fast: heads must divide d");

  const FoldedKernel& kernel = kernels().folded[dtype];
  std::vector<Tensor> held;  // keeps copies alive that were made contiguous
  for (int w = 0; w < kFoldedWeights; ++w) {
    const int64_t size = kernel.matrix_size(a, FoldedWeight(w));
    const bool vector = kernel.is_vector(FoldedWeight(w));
    held.push_back(checked(weights[w], "a folded weight", {size}, vector ? acc : type));
    a.weights[w] = size > 0 ? held.back().data_ptr() : nullptr;
  }
  held.push_back(checked(video_, "video", {B, a.N, a.video_width}, acc));
  a.video = held.back().data_ptr();
  STD_TORCH_CHECK(a.retrieval == triplets_.has_value() && a.retrieval == similarity_.has_value(),
                  "evc_fast: triplets and similarity belong to retrieval");
  if (a.retrieval) {
    held.push_back(checked(*triplets_, "triplets", {B, a.K, 3, a.text_width}, acc));
    a.triplets = held.back().data_ptr();
    held.push_back(checked(*similarity_, "similarity", {B, a.K}, acc));
    a.similarity = held.back().data_ptr();
  }
  if (groups_) {
    held.push_back(checked(*groups_, "groups", {B, a.K}, ScalarType::Long));
    a.groups = static_cast<const int64_t*>(held.back().data_ptr());
  }

  const Tensor& like = held[kFfnWeight];
  const int64_t shown = explain ? B : 0, shown_triplets = a.retrieval ? shown : 0, shown_emotions = a.emotions ? shown : 0;
  Tensor tokens = empty(like, {B, a.queries, a.output_width});
  Tensor emotion_logits = empty(like, {a.emotions ? B : 0, a.W});
  Tensor component_weights = empty(like, {shown_triplets, a.K, 3}, acc);
  Tensor triplet_weights = empty(like, {shown_triplets, a.K}, acc);
  Tensor routing_weights = empty(like, {shown, a.N, a.K}, acc);
  Tensor emotion_distribution = empty(like, {shown_emotions, a.K, a.W}, acc);
  Tensor fact_gate = empty(like, {shown, a.d}), emotion_gate = empty(like, {shown_emotions, a.d});
  a.tokens = tokens.data_ptr();
  a.emotion_logits = emotion_logits.data_ptr();
  a.component_weights = component_weights.data_ptr();
  a.triplet_weights = triplet_weights.data_ptr();
  a.routing_weights = routing_weights.data_ptr();
  a.emotion_distribution = emotion_distribution.data_ptr();
  a.fact_gate = fact_gate.data_ptr();
  a.emotion_gate = emotion_gate.data_ptr();
  if (B > 0) run_folded(kernel, a, B);
  return {tokens, emotion_logits, component_weights, triplet_weights, routing_weights, emotion_distribution, fact_gate, emotion_gate};
}

}  // namespace
}  // namespace evc

STABLE_TORCH_LIBRARY_IMPL(evc_fast, CPU, m) {
  m.impl("folded_encoder_forward", TORCH_BOX(&evc::folded_encoder_forward));
}
