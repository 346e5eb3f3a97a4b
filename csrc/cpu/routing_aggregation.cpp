// Dynamic bias routing, equations (22), (23), (26) and the sums of (27): one read of the facts and of the emotions.
#include "kernels.h"

namespace evc::EVC_NAMESPACE {
namespace {

// weights: softmax over K of each frame's logits (26); [N, K].
template <class T>
void softmax_rows(const T* logits, int64_t N, int64_t K, T* weights) {
  for (int64_t n = 0; n < N; ++n) {
    const T* row = logits + n * K;
    T best = row[0];
    for (int64_t k = 1; k < K; ++k) best = max_of(best, row[k]);
    for (int64_t k = 0; k < K; ++k) weights[n * K + k] = row[k] - best;
  }
  for_row<T>(N * K, [&](int64_t i, auto part) { part.put(exp_nonpositive<T>(part.get(weights + i, 0)), weights + i); });
  for (int64_t n = 0; n < N; ++n) {
    T* row = weights + n * K;
    double total = 0;
    for (int64_t k = 0; k < K; ++k) total += row[k];
    for (int64_t k = 0; k < K; ++k) row[k] = T(row[k] / total);
  }
}

// A task is the facts (even) or the emotions (odd) of one video.
template <class S>
void forward(const RoutingArgs& args, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  constexpr int64_t kFrames = 16, kTriplets = 8;  // summed before they join the total: shorter chains, smaller error
  const int64_t K = args.K, N = args.N, d = args.d;
  T* weights = static_cast<T*>(scratch);  // [N, K]
  T* block = weights + N * K;             // [d]
  T* total = block + d;                   // [d], with what its rounding lost so far:
  T* lost = total + d;                    // [d]
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / 2;
    const bool emotions = task % 2;
    const S* x = static_cast<const S*>(emotions ? args.emotions : args.facts) + b * K * N * d;
    S* routed = static_cast<S*>(args.routed) + (b * 2 + emotions) * N * d;
    S* pooled = static_cast<S*>(args.pooled) + (b * 2 + emotions) * d;
    softmax_rows(static_cast<const T*>(args.logits) + b * N * K, N, K, weights);
    if (!emotions) memcpy(static_cast<T*>(args.weights) + b * N * K, weights, N * K * sizeof(T));
    memset(total, 0, 2 * d * sizeof(T));
    for (int64_t n = 0; n < N; ++n) {
      if (n % kFrames == 0) memset(block, 0, d * sizeof(T));
      for_row<T>(d, [&](int64_t i, auto part) {
        Vec<T> sum{}, weighted{};
        for (int64_t first = 0; first < K; first += kTriplets) {
          Vec<T> few{}, few_weighted{};
          for (int64_t k = first; k < K && k < first + kTriplets; ++k) {
            Vec<T> v = part.get(x + (k * N + n) * d + i, 0);
            few += v;
            few_weighted += weights[n * K + k] * v;
          }
          sum += few;
          weighted += few_weighted;
        }
        part.put(weighted, routed + n * d + i);                // (27)
        part.put(part.get(block + i, 0) + sum, block + i);
      });
      if (n % kFrames == kFrames - 1 || n == N - 1)
        for_row<T>(d, [&](int64_t i, auto part) {
          Vec<T> sum = part.get(total + i, 0), more = part.get(block + i, 0) - part.get(lost + i, 0);
          Vec<T> next = sum + more;  // Kahan's sum
          part.put((next - sum) - more, lost + i);
          part.put(next, total + i);
        });
    }
    for_row<T>(d, [&](int64_t i, auto part) { part.put(part.get(total + i, 0) * (1 / T(K * N)), pooled + i); });  // (22), (23)
  }
}

// A task is one frame of one video.
template <class S>
void backward(const RoutingArgs& args, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const int64_t K = args.K, N = args.N, d = args.d;
  T* grad_weights = static_cast<T*>(scratch);  // [K]
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / N, n = task % N;
    const T* weights = static_cast<const T*>(args.weights) + task * K;
    for (int64_t k = 0; k < K; ++k) grad_weights[k] = 0;
    for (int of = 0; of < 2; ++of) {
      const S* x = static_cast<const S*>(of ? args.emotions : args.facts);
      S* grad_x = static_cast<S*>(of ? args.grad_emotions : args.grad_facts);
      const S* grad_routed = static_cast<const S*>(args.grad_routed) + ((b * 2 + of) * N + n) * d;
      const S* grad_pooled = static_cast<const S*>(args.grad_pooled) + (b * 2 + of) * d;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t row = ((b * K + k) * N + n) * d;
        RowSum<T> dot;
        for_row_sums<T>(d, [&](int64_t i, auto part, int chain) {
          Vec<T> g = part.get(grad_routed + i, 0);
          dot.chain[chain] += g * part.get(x + row + i, 0);
          part.put(weights[k] * g + part.get(grad_pooled + i, 0) * (1 / T(K * N)), grad_x + row + i);
        });
        grad_weights[k] += dot.total();
      }
    }
    double mean = 0;
    for (int64_t k = 0; k < K; ++k) mean += double(weights[k]) * grad_weights[k];
    T* grad_logits = static_cast<T*>(args.grad_logits) + task * K;
    for (int64_t k = 0; k < K; ++k) grad_logits[k] = T(weights[k] * (grad_weights[k] - mean));
  }
}

template <class S>
size_t forward_scratch(const RoutingArgs& args) {
  return (args.N * args.K + 3 * args.d) * sizeof(Acc<S>);
}
template <class S>
size_t backward_scratch(const RoutingArgs& args) {
  return args.K * sizeof(Acc<S>);
}

}  // namespace

void add_routing_aggregation(Kernels& kernels) {
  for_each_dtype([&](Dtype dtype, auto storage) {
    typedef decltype(storage) S;
    kernels.routing_forward[dtype] = {forward_scratch<S>, forward<S>};
    kernels.routing_backward[dtype] = {backward_scratch<S>, backward<S>};
  });
}

}  // namespace evc::EVC_NAMESPACE
