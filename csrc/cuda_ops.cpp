// The library of CUDA kernels, loaded by path where Python asks for it, and the three ops' inference on it. Nothing here
// needs CUDA to be compiled or loaded: torch's CUDA symbols are looked up when the first CUDA tensor is there.
#include "cuda_tensors.h"

#include <dlfcn.h>

#include <atomic>
#include <cstring>

namespace evc {
namespace {

std::atomic<const CudaKernels*> loaded[2];  // for CUDA tensors, and the emulation for CPU tensors
std::atomic<int> blocks{0};

typedef AOTITorchError (*CurrentStream)(int32_t device, void** stream);

// torch's CUDA half may be loaded for its own users alone: then it is not in the global scope.
CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  void* found = dlsym(RTLD_DEFAULT, kName);
  if (!found) {
    if (void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
      found = dlsym(torch_cuda, kName);
      dlclose(torch_cuda);
    }
  }
  STD_TORCH_CHECK(found, "evc_fast: this torch has no CUDA streams: install a CUDA build of torch 2.11 or later");
  return reinterpret_cast<CurrentStream>(found);
}

}  // namespace

const CudaKernels& cuda_kernels(bool on_cpu) {
  const CudaKernels* kernels = loaded[on_cpu];
  STD_TORCH_CHECK(kernels, "evc_fast: no library of CUDA kernels for tensors of this device is loaded");
  return *kernels;
}

void* current_cuda_stream(int32_t device) {
  static const CurrentStream current = find_current_stream();
  void* stream = nullptr;
  STD_TORCH_CHECK(current(device, &stream) == 0, "evc_fast: torch tells no current CUDA stream");
  return stream;
}

int cuda_blocks() { return blocks; }

namespace {

// Loads the kernels; why they do not run on the current device, or null.
const char* load(const char* path) {
  static thread_local std::string reason;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);  // for good: its kernels may still be running
  if (!library) {
    reason = std::string("the CUDA library does not load (") + dlerror() + "): pip install . rebuilds it";
    return reason.c_str();
  }
  const auto entry = reinterpret_cast<CudaKernelsEntry>(dlsym(library, "evc_fast_cuda_kernels"));
  const CudaKernels* kernels = entry ? entry() : nullptr;
  if (!kernels || kernels->version != kCudaKernelsVersion) {
    reason = std::string(path) + " was built from other sources than the rest of the package: pip install . rebuilds it";
    return reason.c_str();
  }
  if (const char* obstacle = kernels->obstacle()) {
    reason = obstacle;
    return reason.c_str();
  }
  loaded[kernels->emulated] = kernels;
  return nullptr;
}

std::tuple<Tensor, Tensor, Tensor> entropy_calibration_inference(const Tensor& triplets_, const Tensor& similarity_,
                                                                 std::optional<Tensor> groups_, bool self_refine,
                                                                 bool cross_refine) {
  check_first(triplets_, "triplets", 4);
  const int64_t B = triplets_.size(0);
  CudaCall call(triplets_, B);
  EntropyArgs args{};
  args.K = triplets_.size(1);
  args.D = triplets_.size(3);
  args.self_refine = self_refine;
  args.cross_refine = cross_refine;
  const std::vector<int64_t> sizes{B, args.K, 3, args.D};
  const Tensor triplets = call.checked(triplets_, "triplets", sizes, triplets_.scalar_type());
  const Tensor similarity = call.checked(similarity_, "similarity", {B, args.K}, ScalarType::Float);
  std::optional<Tensor> groups;
  if (groups_) groups = call.checked(*groups_, "groups", {B, args.K}, ScalarType::Long);
  Tensor calibrated = call.output(sizes, triplets.scalar_type());
  Tensor component_weights = call.output({B, args.K, 3}, ScalarType::Float);
  Tensor triplet_weights = call.output({B, args.K}, ScalarType::Float);
  args.triplets = triplets.data_ptr();
  args.similarity = similarity.data_ptr();
  args.groups = groups ? static_cast<const int64_t*>(groups->data_ptr()) : nullptr;
  args.calibrated = calibrated.data_ptr();
  args.component_weights = component_weights.data_ptr();
  args.triplet_weights = triplet_weights.data_ptr();
  if (B > 0) call.check(call.kernels.entropy_calibration(args, call.launch));
  return {calibrated, component_weights, triplet_weights};
}

Tensor emotion_attention_inference(const Tensor& query_, const Tensor& key_, const Tensor& value_,
                                   const Tensor& gate_query_, const Tensor& gate_key_, int64_t heads) {
  check_first(query_, "query", 4);
  STD_TORCH_CHECK(key_.dim() == 2 && key_.size(0) > 0, "evc_fast: key must have 2 dimensions and a word or more");
  EmotionArgs args{};
  args.B = query_.size(0);
  args.K = query_.size(1);
  args.N = query_.size(2);
  args.d = query_.size(3);
  args.W = key_.size(0);
  args.heads = heads;
  STD_TORCH_CHECK(heads > 0 && args.d % heads == 0, "evc_fast: num_heads must divide d");
  CudaCall call(query_, args.B);
  const ScalarType type = query_.scalar_type();
  const std::vector<int64_t> sizes{args.B, args.K, args.N, args.d};
  const Tensor query = call.checked(query_, "query", sizes, type);
  const Tensor key = call.checked(key_, "key", {args.W, args.d}, type);
  const Tensor value = call.checked(value_, "value", {args.W, args.d}, type);
  const Tensor gate_query = call.checked(gate_query_, "gate_query", sizes, type);
  const Tensor gate_key = call.checked(gate_key_, "gate_key", {args.B, args.N, args.d}, type);
  Tensor context = call.output(sizes, type);
  args.query = query.data_ptr();
  args.key = key.data_ptr();
  args.value = value.data_ptr();
  args.gate_query = gate_query.data_ptr();
  args.gate_key = gate_key.data_ptr();
  args.context = context.data_ptr();
  if (args.B > 0) {
    call.allocate_workspace(call.kernels.emotion_attention_workspace(args, call.launch));
    call.check(call.kernels.emotion_attention(args, call.launch));
  }
  return context;
}

std::tuple<Tensor, Tensor, Tensor> routing_aggregation_inference(const Tensor& facts_, const Tensor& emotions_,
                                                                 const Tensor& logits_) {
  check_first(facts_, "facts", 4);
  const int64_t B = facts_.size(0);
  CudaCall call(facts_, B);
  const ScalarType type = facts_.scalar_type();
  RoutingArgs args{};
  args.K = facts_.size(1);
  args.N = facts_.size(2);
  args.d = facts_.size(3);
  const std::vector<int64_t> sizes{B, args.K, args.N, args.d};
  const Tensor facts = call.checked(facts_, "facts", sizes, type);
  const Tensor emotions = call.checked(emotions_, "emotions", sizes, type);
  const Tensor logits = call.checked(logits_, "logits", {B, args.N, args.K}, ScalarType::Float);
  Tensor routed = call.output({B, 2 * args.N, args.d}, type);
  Tensor pooled = call.output({B, 2 * args.d}, type);
  Tensor weights = call.output({B, args.N, args.K}, ScalarType::Float);
  args.facts = facts.data_ptr();
  args.emotions = emotions.data_ptr();
  args.logits = logits.data_ptr();
  args.routed = routed.data_ptr();
  args.pooled = pooled.data_ptr();
  args.weights = weights.data_ptr();
  if (B > 0) call.check(call.kernels.routing_aggregation(args, call.launch));
  return {routed, pooled, weights};
}

}  // namespace
}  // namespace evc

#define EVC_EXPORT extern "C" __attribute__((visibility("default")))

// Null, or one sentence: why the library at `path` does not run on the current device, and what mends it.
EVC_EXPORT const char* evc_fast_load_cuda(const char* path) { return evc::load(path); }
// What the library for CUDA tensors was compiled for; "" where none is loaded.
EVC_EXPORT const char* evc_fast_cuda_architectures() {
  const evc::CudaKernels* kernels = evc::loaded[0];
  return kernels ? kernels->architectures : "";
}
// Tests: every kernel is to be right at any grid size. 0 gives the choice back to the kernels.
EVC_EXPORT void evc_fast_cuda_blocks(int count) { evc::blocks = count; }

STABLE_TORCH_LIBRARY_IMPL(evc_fast, CUDA, m) {
  m.impl("entropy_calibration_inference", TORCH_BOX(&evc::entropy_calibration_inference));
  m.impl("emotion_attention_inference", TORCH_BOX(&evc::emotion_attention_inference));
  m.impl("routing_aggregation_inference", TORCH_BOX(&evc::routing_aggregation_inference));
}
STABLE_TORCH_LIBRARY_IMPL(evc_fast, CPU, m) {
  m.impl("entropy_calibration_inference", TORCH_BOX(&evc::entropy_calibration_inference));
  m.impl("emotion_attention_inference", TORCH_BOX(&evc::emotion_attention_inference));
  m.impl("routing_aggregation_inference", TORCH_BOX(&evc::routing_aggregation_inference));
}
