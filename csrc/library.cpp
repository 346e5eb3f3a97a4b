// Tensors in, tensors out: the CPU implementations of the three ops' schemas in evc_fast/ops/_library.py.
#include "tensors.h"

namespace evc {

void* thread_scratch(size_t bytes, Slot slot) {
  constexpr std::align_val_t kAlign{64};
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
    ~Block() { ::operator delete(data, kAlign); }
  };
  thread_local Block blocks[kSlots];
  Block& block = blocks[slot];
  if (bytes > block.bytes) {
    ::operator delete(block.data, kAlign);
    block.data = nullptr;  // new may throw
    block.bytes = 0;
    block.data = ::operator new(bytes, kAlign);
    block.bytes = bytes;
  }
  return block.data;
}

namespace {

// ---- entropy_calibration ----

struct EntropyInputs {
  Tensor triplets, similarity;
  std::optional<Tensor> groups;
  Dtype dtype;
  int64_t B;
  EntropyArgs args{};

  EntropyInputs(const Tensor& triplets_, const Tensor& similarity_, const std::optional<Tensor>& groups_,
                bool self_refine, bool cross_refine)
      : dtype(dtype_of(triplets_)) {
    check_first(triplets_, "triplets", 4);
    B = triplets_.size(0);
    args.K = triplets_.size(1);
    args.D = triplets_.size(3);
    triplets = checked(triplets_, "triplets", {B, args.K, 3, args.D}, triplets_.scalar_type());
    similarity = checked(similarity_, "similarity", {B, args.K}, accumulator(dtype));
    if (groups_) groups = checked(*groups_, "groups", {B, args.K}, ScalarType::Long);
    args.self_refine = self_refine;
    args.cross_refine = cross_refine;
    args.triplets = triplets.data_ptr();
    args.similarity = similarity.data_ptr();
    args.groups = groups ? static_cast<const int64_t*>(groups->data_ptr()) : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor> entropy_calibration_forward(const Tensor& triplets, const Tensor& similarity,
                                                               std::optional<Tensor> groups, bool self_refine,
                                                               bool cross_refine) {
  EntropyInputs in(triplets, similarity, groups, self_refine, cross_refine);
  const ScalarType acc = accumulator(in.dtype);
  Tensor calibrated = empty(in.triplets, {in.B, in.args.K, 3, in.args.D});
  Tensor component_weights = empty(in.triplets, {in.B, in.args.K, 3}, acc);
  Tensor triplet_weights = empty(in.triplets, {in.B, in.args.K}, acc);
  in.args.calibrated = calibrated.data_ptr();
  in.args.component_weights = component_weights.data_ptr();
  in.args.triplet_weights = triplet_weights.data_ptr();
  run(kernels().entropy_forward[in.dtype], in.args, in.B, grain_of(3 * in.args.K * in.args.D));
  return {calibrated, component_weights, triplet_weights};
}

std::tuple<Tensor, Tensor> entropy_calibration_backward(const Tensor& grad_calibrated, const Tensor& triplets,
                                                        const Tensor& similarity, std::optional<Tensor> groups,
                                                        bool self_refine, bool cross_refine) {
  EntropyInputs in(triplets, similarity, groups, self_refine, cross_refine);
  const std::vector<int64_t> sizes{in.B, in.args.K, 3, in.args.D};
  Tensor grad = checked(grad_calibrated, "grad_calibrated", sizes, triplets.scalar_type());
  Tensor grad_triplets = empty(in.triplets, sizes);
  Tensor grad_similarity = empty(in.similarity, {in.B, in.args.K});
  in.args.grad_calibrated = grad.data_ptr();
  in.args.grad_triplets = grad_triplets.data_ptr();
  in.args.grad_similarity = grad_similarity.data_ptr();
  run(kernels().entropy_backward[in.dtype], in.args, in.B, grain_of(3 * in.args.K * in.args.D));
  return {grad_triplets, grad_similarity};
}

// ---- emotion_attention ----

struct EmotionInputs {
  Tensor query, key, value, gate_query, gate_key, dictionary;
  Dtype dtype;
  ScalarType type;
  std::vector<int64_t> sizes;
  EmotionArgs args{};

  EmotionInputs(const Tensor& query_, const Tensor& key_, const Tensor& value_, const Tensor& gate_query_,
                const Tensor& gate_key_, int64_t heads)
      : dtype(dtype_of(query_)), type(query_.scalar_type()) {
    check_first(query_, "query", 4);
    STD_TORCH_CHECK(key_.dim() == 2 && key_.size(0) > 0, "evc_fast: key must have 2 dimensions and a word or more");
    args.B = query_.size(0);
    args.K = query_.size(1);
    args.N = query_.size(2);
    args.d = query_.size(3);
    args.W = key_.size(0);
    args.heads = heads;
    STD_TORCH_CHECK(heads > 0 && args.d % heads == 0, "evc_fast: num_heads must divide d");
    sizes = {args.B, args.K, args.N, args.d};
    query = checked(query_, "query", sizes, type);
    key = checked(key_, "key", {args.W, args.d}, type);
    value = checked(value_, "value", {args.W, args.d}, type);
    gate_query = checked(gate_query_, "gate_query", sizes, type);
    gate_key = checked(gate_key_, "gate_key", {args.B, args.N, args.d}, type);
    args.query = query.data_ptr();
    args.key = key.data_ptr();
    args.value = value.data_ptr();
    args.gate_query = gate_query.data_ptr();
    args.gate_key = gate_key.data_ptr();
  }

  void pack(bool backward) {
    const auto bytes = static_cast<int64_t>(kernels().emotion_dictionary_bytes[dtype](args, backward));
    dictionary = empty(query, {bytes}, ScalarType::Byte);
    args.dictionary = dictionary.data_ptr();
    run(kernels().emotion_pack[dtype], args, args.heads);
  }
};

std::tuple<Tensor, Tensor> emotion_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const Tensor& gate_query, const Tensor& gate_key, int64_t heads,
                                                     bool keep_candidates) {
  EmotionInputs in(query, key, value, gate_query, gate_key, heads);
  Tensor context = empty(in.query, in.sizes);
  Tensor candidates = empty(in.query, keep_candidates ? in.sizes : std::vector<int64_t>{0});
  in.args.context = context.data_ptr();
  in.args.candidates = keep_candidates ? candidates.data_ptr() : nullptr;
  if (in.args.B > 0) in.pack(false);
  run(kernels().emotion_forward[in.dtype], in.args, in.args.B * in.args.K);
  return {context, candidates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> emotion_attention_backward(
    const Tensor& grad_context, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& gate_query,
    const Tensor& gate_key, const Tensor& candidates_, int64_t heads) {
  EmotionInputs in(query, key, value, gate_query, gate_key, heads);
  EmotionArgs& args = in.args;
  Tensor grad = checked(grad_context, "grad_context", in.sizes, in.type);
  Tensor candidates = checked(candidates_, "candidates", in.sizes, in.type);
  Tensor grad_query = empty(in.query, in.sizes), grad_gate_query = empty(in.query, in.sizes);
  Tensor grad_key = empty(in.query, {args.W, args.d}), grad_value = empty(in.query, {args.W, args.d});
  Tensor grad_gate_key = empty(in.query, {args.B, args.N, args.d});
  const int64_t chunks = emotion_chunks(args.B);
  const auto chunk_bytes = static_cast<int64_t>(kernels().emotion_partial_bytes[in.dtype](args));
  Tensor partials = empty(in.query, {chunks * chunk_bytes}, ScalarType::Byte);
  args.grad_context = grad.data_ptr();
  args.candidates = candidates.data_ptr();
  args.grad_query = grad_query.data_ptr();
  args.grad_key = grad_key.data_ptr();
  args.grad_value = grad_value.data_ptr();
  args.grad_gate_query = grad_gate_query.data_ptr();
  args.grad_gate_key = grad_gate_key.data_ptr();
  args.partials = partials.data_ptr();
  if (args.B > 0) in.pack(true);
  run(kernels().emotion_backward[in.dtype], args, chunks);
  run(kernels().emotion_reduce[in.dtype], args, args.W, grain_of(args.d * chunks));
  return {grad_query, grad_key, grad_value, grad_gate_query, grad_gate_key};
}

// ---- routing_aggregation ----

struct RoutingInputs {
  Tensor facts, emotions;
  Dtype dtype;
  ScalarType type;
  int64_t B;
  std::vector<int64_t> sizes;
  RoutingArgs args{};

  RoutingInputs(const Tensor& facts_, const Tensor& emotions_) : dtype(dtype_of(facts_)), type(facts_.scalar_type()) {
    check_first(facts_, "facts", 4);
    B = facts_.size(0);
    args.K = facts_.size(1);
    args.N = facts_.size(2);
    args.d = facts_.size(3);
    sizes = {B, args.K, args.N, args.d};
    facts = checked(facts_, "facts", sizes, type);
    emotions = checked(emotions_, "emotions", sizes, type);
    args.facts = facts.data_ptr();
    args.emotions = emotions.data_ptr();
  }
};

std::tuple<Tensor, Tensor, Tensor> routing_aggregation_forward(const Tensor& facts, const Tensor& emotions,
                                                               const Tensor& logits_) {
  RoutingInputs in(facts, emotions);
  RoutingArgs& args = in.args;
  Tensor logits = checked(logits_, "logits", {in.B, args.N, args.K}, accumulator(in.dtype));
  Tensor routed = empty(in.facts, {in.B, 2 * args.N, args.d});
  Tensor pooled = empty(in.facts, {in.B, 2 * args.d});
  Tensor weights = empty(logits, {in.B, args.N, args.K});
  args.logits = logits.data_ptr();
  args.routed = routed.data_ptr();
  args.pooled = pooled.data_ptr();
  args.weights = weights.data_ptr();
  run(kernels().routing_forward[in.dtype], args, 2 * in.B, grain_of(args.K * args.N * args.d));
  return {routed, pooled, weights};
}

std::tuple<Tensor, Tensor, Tensor> routing_aggregation_backward(const Tensor& grad_routed_, const Tensor& grad_pooled_,
                                                                const Tensor& facts, const Tensor& emotions,
                                                                const Tensor& weights_) {
  RoutingInputs in(facts, emotions);
  RoutingArgs& args = in.args;
  Tensor grad_routed = checked(grad_routed_, "grad_routed", {in.B, 2 * args.N, args.d}, in.type);
  Tensor grad_pooled = checked(grad_pooled_, "grad_pooled", {in.B, 2 * args.d}, in.type);
  Tensor weights = checked(weights_, "weights", {in.B, args.N, args.K}, accumulator(in.dtype));
  Tensor grad_facts = empty(in.facts, in.sizes), grad_emotions = empty(in.facts, in.sizes);
  Tensor grad_logits = empty(weights, {in.B, args.N, args.K});
  args.grad_routed = grad_routed.data_ptr();
  args.grad_pooled = grad_pooled.data_ptr();
  args.weights = weights.data_ptr();
  args.grad_facts = grad_facts.data_ptr();
  args.grad_emotions = grad_emotions.data_ptr();
  args.grad_logits = grad_logits.data_ptr();
  run(kernels().routing_backward[in.dtype], args, in.B * args.N, grain_of(2 * args.K * args.d));
  return {grad_facts, grad_emotions, grad_logits};
}

// ---- factored_hidden ----

struct HiddenInputs {
  Tensor weights, values, visual;
  Dtype dtype;
  ScalarType type;
  int64_t B;
  HiddenArgs args{};

  HiddenInputs(const Tensor& weights_, const Tensor& values_, const Tensor& visual_)
      : dtype(dtype_of(weights_)), type(weights_.scalar_type()) {
    check_first(weights_, "weights", 4);
    STD_TORCH_CHECK(values_.dim() == 4 && values_.size(3) > 0, "evc_fast: values must be [B, K, T, F]");
    B = weights_.size(0);
    args.K = weights_.size(1);
    args.N = weights_.size(2);
    args.T = weights_.size(3);
    args.F = values_.size(3);
    weights = checked(weights_, "weights", {B, args.K, args.N, args.T}, type);
    values = checked(values_, "values", {B, args.K, args.T, args.F}, type);
    visual = checked(visual_, "visual", {B, args.N, args.F}, type);
    args.weights = weights.data_ptr();
    args.values = values.data_ptr();
    args.visual = visual.data_ptr();
  }
};

Tensor factored_hidden_forward(const Tensor& weights, const Tensor& values, const Tensor& visual) {
  HiddenInputs in(weights, values, visual);
  Tensor hidden = empty(in.weights, {in.B, in.args.K, in.args.N, in.args.F});
  in.args.hidden = hidden.data_ptr();
  run(kernels().hidden_forward[in.dtype], in.args, in.B * in.args.K, grain_of(in.args.N * in.args.F));
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> factored_hidden_backward(const Tensor& grad_hidden, const Tensor& weights,
                                                            const Tensor& values, const Tensor& visual) {
  HiddenInputs in(weights, values, visual);
  HiddenArgs& args = in.args;
  Tensor grad = checked(grad_hidden, "grad_hidden", {in.B, args.K, args.N, args.F}, in.type);
  Tensor grad_weights = empty(in.weights, {in.B, args.K, args.N, args.T});
  Tensor grad_values = empty(in.weights, {in.B, args.K, args.T, args.F});
  Tensor grad_visual = empty(in.weights, {in.B, args.N, args.F});
  args.grad_hidden = grad.data_ptr();
  args.grad_weights = grad_weights.data_ptr();
  args.grad_values = grad_values.data_ptr();
  args.grad_visual = grad_visual.data_ptr();
  run(kernels().hidden_backward[in.dtype], args, in.B, grain_of(args.K * args.N * args.F));
  return {grad_weights, grad_values, grad_visual};
}

}  // namespace
}  // namespace evc

STABLE_TORCH_LIBRARY_IMPL(evc_fast, CPU, m) {
  m.impl("entropy_calibration_forward", TORCH_BOX(&evc::entropy_calibration_forward));
  m.impl("entropy_calibration_backward", TORCH_BOX(&evc::entropy_calibration_backward));
  m.impl("emotion_attention_forward", TORCH_BOX(&evc::emotion_attention_forward));
  m.impl("emotion_attention_backward", TORCH_BOX(&evc::emotion_attention_backward));
  m.impl("routing_aggregation_forward", TORCH_BOX(&evc::routing_aggregation_forward));
  m.impl("routing_aggregation_backward", TORCH_BOX(&evc::routing_aggregation_backward));
  m.impl("factored_hidden_forward", TORCH_BOX(&evc::factored_hidden_forward));
  m.impl("factored_hidden_backward", TORCH_BOX(&evc::factored_hidden_backward));
}
