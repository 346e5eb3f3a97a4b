// What the implementations of all schemas share, against torch's stable ABI alone: checks that raw pointers need,
// allocation, and the split of a kernel's tasks among torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "ops.h"

namespace evc {

// Scratch of one thread, kept for the next call: a fresh block of this size would fault in page by page every time.
enum Slot { kScratch, kWorkspace, kSlots };
void* thread_scratch(size_t bytes, Slot slot = kScratch);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Double: return kFloat64;
    default: STD_TORCH_CHECK(false, "evc_fast: the CPU kernels take float32, bfloat16 and float64");
  }
}
inline ScalarType accumulator(Dtype dtype) { return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float; }

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) { return torch::stable::new_empty(like, sizes); }
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// A kernel reads raw memory: every argument must be what the schema's caller promised.
inline Tensor checked_memory(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "evc_fast: ", name, " has another type than the op's first tensor");
  bool match = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; match && i < sizes.size(); ++i) match = tensor.size(static_cast<int64_t>(i)) == sizes[i];
  STD_TORCH_CHECK(match, "evc_fast: ", name, " does not have the size that the op's other tensors ask for");
  return torch::stable::contiguous(tensor);
}
inline Tensor checked(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cpu(), "evc_fast: ", name, " must be a CPU tensor");
  return checked_memory(tensor, name, sizes, type);
}
// The first tensor of an op tells the sizes; all but the batch's are 1 or more.
inline void check_first(const Tensor& tensor, const char* name, int64_t rank) {
  STD_TORCH_CHECK(tensor.dim() == rank, "evc_fast: ", name, " must have ", rank, " dimensions");
  for (int64_t i = 1; i < rank; ++i)
    STD_TORCH_CHECK(tensor.size(i) > 0, "evc_fast: ", name, " must not be empty but for the batch");
}

template <class Args>
void run(const Kernel<Args>& kernel, const Args& args, int64_t tasks, int64_t grain = 1) {
  if (tasks == 0) return;
  const size_t bytes = kernel.scratch_bytes(args);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    kernel.run(args, begin, end, thread_scratch(bytes));
  });
}

// Tasks below this many elements are not worth a thread of their own.
constexpr int64_t kGrainElements = 16384;
inline int64_t grain_of(int64_t elements_per_task) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements_per_task)); }

}  // namespace
}  // namespace evc
