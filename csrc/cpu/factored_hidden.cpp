// The FFN's hidden layer of (18), H in factors: gelu(P U + V). Backward makes the sum anew, a panel of columns at a time.
#include "activations.h"
#include "gemm.h"
#include "kernels.h"
#include "rows.h"

namespace evc::EVC_NAMESPACE {
namespace {

constexpr int64_t kRowBlock = 64;  // rows whose sums of one panel are in scratch

template <class T>
constexpr int64_t kColumns = kTileVectors * kLanes<T>;

template <class S>
void widen_row(const S* from, int64_t n, Acc<S>* to) {
  for_row<Acc<S>>(n, [&](int64_t i, auto part) { part.put(part.get(from + i, 0), to + i); });
}

template <class S, class T = Acc<S>>
struct HiddenScratch {
  int64_t width;  // a row of F, whole panels
  T *weights, *values, *sums, *grad, *grad_visual, *grad_values;
  size_t bytes;
  HiddenScratch(const HiddenArgs& a, void* base) : width(round_up(a.F, kColumns<T>)) {
    Arena<T> arena{static_cast<T*>(base)};
    weights = arena.take(a.N * a.T);
    values = arena.take(a.T * width);
    sums = arena.take(kRowBlock * kColumns<T>);
    grad = arena.take(a.grad_hidden ? a.N * width : 0);
    grad_visual = arena.take(a.grad_hidden ? a.N * width : 0);
    grad_values = arena.take(a.grad_hidden ? a.T * width : 0);
    bytes = arena.used * sizeof(T);
  }
  void read(const HiddenArgs& a, int64_t pair) const {
    widen_row(static_cast<const S*>(a.weights) + pair * a.N * a.T, a.N * a.T, weights);
    for (int64_t t = 0; t < a.T; ++t) {
      widen_row(static_cast<const S*>(a.values) + (pair * a.T + t) * a.F, a.F, values + t * width);
      for (int64_t i = a.F; i < width; ++i) values[t * width + i] = 0;
    }
  }
};

// body(row, column, sum of P U, part): every vector of the pair's [N, F].
template <class S, class T = Acc<S>, class Body>
EVC_INLINE void for_sums(const HiddenArgs& a, const HiddenScratch<S>& s, const Body& body) {
  for (int64_t n = 0; n < a.N; n += kRowBlock) {
    const int64_t rows = a.N - n < kRowBlock ? a.N - n : kRowBlock;
    for (int64_t column = 0; column < a.F; column += kColumns<T>) {
      multiply_block<T, false>(rows, kColumns<T>, a.T, {s.weights + n * a.T, a.T, 1}, {s.values + column, s.width}, s.sums,
                               kColumns<T>);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < kColumns<T> && column + j < a.F; j += kLanes<T>) {
          const Vec<T> sum = load(s.sums + i * kColumns<T> + j);
          const int64_t left = a.F - column - j;
          left < kLanes<T> ? body(n + i, column + j, sum, Part{left}) : body(n + i, column + j, sum, Whole{});
        }
    }
  }
}

// A task is one (video, triplet).
template <class S>
void forward(const HiddenArgs& a, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const HiddenScratch<S> s(a, scratch);
  for (int64_t pair = begin; pair < end; ++pair) {
    s.read(a, pair);
    const S* visual = static_cast<const S*>(a.visual) + pair / a.K * a.N * a.F;
    S* hidden = static_cast<S*>(a.hidden) + pair * a.N * a.F;
    for_sums(a, s, [&](int64_t row, int64_t column, Vec<T> sum, auto part) {
      const int64_t at = row * a.F + column;
      part.put(gelu<T>(sum + part.get(visual + at, 0)), hidden + at);
    });
  }
}

// out[i][j] = <x_i, y_j> for kRows rows of x and kOthers of y, of n elements up to whole vectors of zeros.
template <class T, int kRows, int kOthers>
EVC_INLINE void dots(const T* x, const T* y, int64_t stride, int64_t n, T* out, int64_t out_stride) {
  Vec<T> sum[kRows][kOthers] = {};
  for (int64_t k = 0; k < n; k += kLanes<T>)
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kOthers; ++j) sum[i][j] += load(x + i * stride + k) * load(y + j * stride + k);
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kOthers; ++j) out[i * out_stride + j] = sum_lanes<T>(sum[i][j]);
}
template <class T, int kRows>
EVC_INLINE void dots_of(const T* x, const T* y, int64_t others, int64_t stride, int64_t n, T* out, int64_t out_stride) {
  int64_t j = 0;
  for (; j + 3 <= others; j += 3) dots<T, kRows, 3>(x, y + j * stride, stride, n, out + j, out_stride);
  for (; j < others; ++j) dots<T, kRows, 1>(x, y + j * stride, stride, n, out + j, out_stride);
}

// A task is one video: its triplets' gradients of the visual half add up in order.
template <class S>
void backward(const HiddenArgs& a, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  constexpr T kInverseRootTwoPi = T(0.39894228040143267794);
  const HiddenScratch<S> s(a, scratch);
  for (int64_t b = begin; b < end; ++b) {
    memset(s.grad_visual, 0, a.N * s.width * sizeof(T));
    const S* visual = static_cast<const S*>(a.visual) + b * a.N * a.F;
    for (int64_t pair = b * a.K; pair < (b + 1) * a.K; ++pair) {
      s.read(a, pair);
      const S* grad_hidden = static_cast<const S*>(a.grad_hidden) + pair * a.N * a.F;
      for_sums(a, s, [&](int64_t row, int64_t column, Vec<T> sum, auto part) {
        const int64_t at = row * a.F + column, to = row * s.width + column;
        const Vec<T> z = sum + part.get(visual + at, 0);
        const Vec<T> density = exp_nonpositive<T>(T(-0.5) * z * z) * kInverseRootTwoPi;
        const Vec<T> slope = T(0.5) * (1 + erf_of(z * T(0.70710678118654752440))) + z * density;
        const Vec<T> grad = slope * part.get(grad_hidden + at, 0);
        store(grad, s.grad + to);  // zeros beyond F: so is grad_hidden there
        store(load(s.grad_visual + to) + grad, s.grad_visual + to);
      });
      for (int64_t row = 0; row < a.N; ++row)  // whole vectors up to the panel's end are read below
        for (int64_t i = round_up(a.F, kLanes<T>); i < s.width; ++i) s.grad[row * s.width + i] = 0;
      // dU = P^T dZ
      multiply<T, false>(a.T, a.F, a.N, {s.weights, 1, a.T}, {s.grad, s.width}, s.grad_values, s.width);
      S* grad_values = static_cast<S*>(a.grad_values) + pair * a.T * a.F;
      for (int64_t t = 0; t < a.T; ++t)
        for_row<T>(a.F, [&](int64_t i, auto part) { part.put(part.get(s.grad_values + t * s.width + i, 0), grad_values + t * a.F + i); });
      // dP = dZ U^T
      T* grad_weights = s.weights;  // P is not read again
      int64_t n = 0;
      for (; n + 2 <= a.N; n += 2) dots_of<T, 2>(s.grad + n * s.width, s.values, a.T, s.width, s.width, grad_weights + n * a.T, a.T);
      for (; n < a.N; ++n) dots_of<T, 1>(s.grad + n * s.width, s.values, a.T, s.width, s.width, grad_weights + n * a.T, a.T);
      S* out = static_cast<S*>(a.grad_weights) + pair * a.N * a.T;
      for_row<T>(a.N * a.T, [&](int64_t i, auto part) { part.put(part.get(grad_weights + i, 0), out + i); });
    }
    S* grad_visual = static_cast<S*>(a.grad_visual) + b * a.N * a.F;
    for (int64_t row = 0; row < a.N; ++row)
      for_row<T>(a.F, [&](int64_t i, auto part) { part.put(part.get(s.grad_visual + row * s.width + i, 0), grad_visual + row * a.F + i); });
  }
}

}  // namespace

void add_factored_hidden(Kernels& kernels) {
  for_each_dtype([&](Dtype dtype, auto storage) {
    typedef decltype(storage) S;
    const auto scratch = [](const HiddenArgs& a) -> size_t { return HiddenScratch<S>(a, nullptr).bytes; };
    kernels.hidden_forward[dtype] = {scratch, forward<S>};
    kernels.hidden_backward[dtype] = {scratch, backward<S>};
  });
}

}  // namespace evc::EVC_NAMESPACE
