// Packing of weights, and activation(x W^T + bias) + residual in one pass over the output.
#include "activations.h"
#include "kernels.h"
#include "packed.h"

namespace evc::EVC_NAMESPACE {
namespace {

template <class S>
void pack(const PackArgs& args, int64_t begin, int64_t end, void*) {
  const int64_t size = Packed<S>::size(args.columns, args.depth);
  for (int64_t group = begin; group < end; ++group)
    pack_panels(static_cast<const S*>(args.weight) + group * args.columns * args.depth, args.columns, args.depth, 0,
                Packed<S>::panels(args.columns), static_cast<S*>(args.packed) + group * size);
}

template <Activation kActivation, class T>
EVC_INLINE Vec<T> activate(Vec<T> x) {
  if constexpr (kActivation == kGelu) return gelu<T>(x);
  if constexpr (kActivation == kQuickGelu) return quick_gelu<T>(x);
  return x;
}

template <class S, Activation kActivation>
void block(const LinearArgs& args, int64_t first, int64_t rows, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const T* input = static_cast<const T*>(args.input) + first * args.depth;
  const T* bias = static_cast<const T*>(args.bias);
  const T* residual = static_cast<const T*>(args.residual);
  T* output = static_cast<T*>(args.output);
  const Packed<S> weight{static_cast<const S*>(args.packed), args.columns, args.depth};
  multiply_packed<S>(rows, input, args.depth, weight, begin, end, static_cast<T*>(scratch),
                     [&](int64_t row, int64_t column, Vec<T> x) {
    const int64_t at = (first + row) * args.columns + column, left = args.columns - column;
    const auto put = [&](auto part) {
      Vec<T> y = bias ? x + part.get(bias + column, 0) : x;
      y = activate<kActivation, T>(y);
      part.put(residual ? y + part.get(residual + at, 0) : y, output + at);
    };
    left < kLanes<T> ? put(Part{left}) : put(Whole{});
  });
}

template <class S>
void linear(const LinearArgs& args, int64_t begin, int64_t end, void* scratch) {
  const int64_t panels = Packed<S>::panels(args.columns);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t r = task / args.column_groups, c = task % args.column_groups;
    const int64_t first = args.rows * r / args.row_blocks, last = args.rows * (r + 1) / args.row_blocks;
    const int64_t from = panels * c / args.column_groups, to = panels * (c + 1) / args.column_groups;
    switch (args.activation) {
      case kGelu: block<S, kGelu>(args, first, last - first, from, to, scratch); break;
      case kQuickGelu: block<S, kQuickGelu>(args, first, last - first, from, to, scratch); break;
      default: block<S, kNone>(args, first, last - first, from, to, scratch);
    }
  }
}

}  // namespace

void add_packed_linear(Kernels& kernels) {
  for_each_dtype([&](Dtype dtype, auto storage) {
    typedef decltype(storage) S;
    kernels.packed_size[dtype] = Packed<S>::size;
    kernels.pack[dtype] = {[](const PackArgs&) -> size_t { return 0; }, pack<S>};
    kernels.linear[dtype] = {
        [](const LinearArgs& args) -> size_t { return packed_scratch<S>(args.depth) * sizeof(Acc<S>); }, linear<S>};
  });
}

}  // namespace evc::EVC_NAMESPACE
