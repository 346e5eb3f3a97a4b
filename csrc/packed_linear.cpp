// Tensors in, tensors out: packed weights and products with them.
#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace evc {
namespace {

// Uninitialised, on pages of 2 MB where the system gives them and it is large enough to hold any. Weights are read from
// memory once a call, and a product that reads them fast waits for the translation of one 4 KB page after the other.
Tensor weight_buffer(const Tensor& like, int64_t elements) {
  Tensor buffer = empty(like, {elements});
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(buffer.data_ptr()), end = begin + buffer.numel() * buffer.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // It may decline: then the pages are small ones.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return buffer;
}

Tensor pack_weight(const Tensor& weight_) {
  check_first(weight_, "weight", 3);
  const Dtype dtype = dtype_of(weight_);
  const int64_t groups = weight_.size(0), columns = weight_.size(1), depth = weight_.size(2);
  Tensor weight = checked(weight_, "weight", {groups, columns, depth}, weight_.scalar_type());
  const int64_t size = kernels().packed_size[dtype](columns, depth);
  Tensor packed = torch::stable::view(weight_buffer(weight, groups * size), {groups, size});
  run(kernels().pack[dtype], PackArgs{columns, depth, weight.data_ptr(), packed.data_ptr()}, groups);
  return packed;
}

Tensor packed_linear(const Tensor& input_, const Tensor& packed_, const std::optional<Tensor>& bias_,
                     const std::optional<Tensor>& residual_, int64_t columns, int64_t activation) {
  check_first(input_, "input", 2);
  const Dtype dtype = dtype_of(packed_);
  const ScalarType acc = accumulator(dtype);
  STD_TORCH_CHECK(columns > 0 && activation >= 0 && activation < kActivations, "evc_fast: no such product");
  LinearArgs args{};
  args.rows = input_.size(0);
  args.depth = input_.size(1);
  args.columns = columns;
  args.activation = static_cast<Activation>(activation);
  const int64_t size = kernels().packed_size[dtype](columns, args.depth);
  Tensor input = checked(input_, "input", {args.rows, args.depth}, acc);
  Tensor packed = checked(packed_, "packed", {1, size}, packed_.scalar_type());
  std::optional<Tensor> bias, residual;
  if (bias_) bias = checked(*bias_, "bias", {columns}, acc);
  if (residual_) residual = checked(*residual_, "residual", {args.rows, columns}, acc);
  Tensor output = empty(input, {args.rows, columns});
  args.input = input.data_ptr();
  args.packed = packed.data_ptr();
  args.bias = bias ? bias->data_ptr() : nullptr;
  args.residual = residual ? residual->data_ptr() : nullptr;
  args.output = output.data_ptr();
  // Whole rounds of tasks for all threads: blocks of rows where there are many, else groups of columns too.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t blocks = (args.rows + kBlockRows - 1) / kBlockRows;
  args.row_blocks = blocks < threads ? blocks : (blocks + threads - 1) / threads * threads;
  args.column_groups = blocks < threads ? threads : 1;
  run(kernels().linear[dtype], args, args.row_blocks * args.column_groups);
  return output;
}

}  // namespace
}  // namespace evc

STABLE_TORCH_LIBRARY_IMPL(evc_fast, CPU, m) {
  m.impl("weight_buffer", TORCH_BOX(&evc::weight_buffer));
  m.impl("pack_weight", TORCH_BOX(&evc::pack_weight));
  m.impl("packed_linear", TORCH_BOX(&evc::packed_linear));
}
