// Factual calibration, equations (10)-(16). A task is one video: its K triplets weigh each other.
#include "kernels.h"

namespace evc::EVC_NAMESPACE {
namespace {

template <class T>
constexpr T kMinSimilarity = T(1e-6);

// e: [D], exp(T - max), for callers that need p again. Returns the entropy and what re-derives p and log p.
template <class T>
struct Entropy {
  T max, log_total, h;
};

template <class S, class T = Acc<S>>
Entropy<T> entropy(const S* x, int64_t D, T* e) {
  Vec<T> best = splat(-T(INFINITY));
  for_row<T>(D, [&](int64_t i, auto part) { best = max_vec<T>(best, part.get(x + i, -T(INFINITY))); });
  const T max = max_lanes<T>(best);
  RowSum<T> total, moment;
  for_row_sums<T>(D, [&](int64_t i, auto part, int chain) {
    Vec<T> shifted = part.get(x + i, -T(INFINITY)) - max;
    Vec<T> p = exp_nonpositive<T, true>(shifted);  // near certainty alpha is a ratio of tiny entropies
    part.put(p, e + i);
    total.chain[chain] += p;
    moment.chain[chain] += shifted < ExpOf<T>::kSmallest ? Vec<T>{} : p * shifted;  // 0 log 0 = 0, also for the padding's -inf
  });
  const T sum = total.total(), log_total = std::log(sum);
  return {max, log_total, log_total - moment.total() / sum};  // (11): logsumexp(T) - sum p T
}

template <class T>
void component_weights(const Entropy<T>* of, bool self_refine, T* alpha) {
  const T total = of[0].h + of[1].h + of[2].h;
  for (int c = 0; c < 3; ++c) alpha[c] = self_refine && total != 0 ? of[c].h / total : T(1) / 3;  // (12)
}

template <class T>
EVC_INLINE T clamped(T similarity) {
  return similarity < kMinSimilarity<T> ? kMinSimilarity<T> : similarity;
}

inline bool same_group(const int64_t* groups, int64_t i, int64_t j) { return groups ? groups[i] == groups[j] : i == j; }

inline bool single_group(const int64_t* groups, int64_t K) {
  for (int64_t i = 1; i < K; ++i)
    if (!same_group(groups, 0, i)) return false;
  return true;
}

// p: [K], each triplet's share of the similarity mass (14); returns the mass. In double: where one similarity outweighs
// all others, log p of a p near 1 keeps its digits.
template <class T>
double group_shares(const T* similarity, const int64_t* groups, int64_t K, double* p) {
  double all = 0;
  for (int64_t i = 0; i < K; ++i) {
    all += clamped(similarity[i]);
    p[i] = 0;
    for (int64_t j = 0; j < K; ++j)
      if (same_group(groups, i, j)) p[i] += clamped(similarity[j]);
  }
  for (int64_t i = 0; i < K; ++i) p[i] /= all;
  return all;
}

// p: [K], scratch.
template <class T>
void triplet_weights(const T* similarity, const int64_t* groups, int64_t K, bool cross_refine, double* p, T* theta) {
  if (!cross_refine || single_group(groups, K)) {
    for (int64_t i = 0; i < K; ++i) theta[i] = T(1) / K;
    return;
  }
  group_shares(similarity, groups, K, p);
  double total = 0;
  for (int64_t i = 0; i < K; ++i) total += p[i] * std::log(p[i]);
  for (int64_t i = 0; i < K; ++i) theta[i] = T(p[i] * std::log(p[i]) / total);  // (15)
}

template <class T>
void triplet_weights_backward(const T* similarity, const int64_t* groups, int64_t K, bool cross_refine,
                              const T* grad_theta, double* p, T* grad_similarity) {
  for (int64_t j = 0; j < K; ++j) grad_similarity[j] = 0;
  if (!cross_refine || single_group(groups, K)) return;
  const double all = group_shares(similarity, groups, K, p);
  double total = 0, mean = 0;
  for (int64_t i = 0; i < K; ++i) {
    total += p[i] * std::log(p[i]);
    mean += p[i] * std::log(p[i]) * grad_theta[i];
  }
  mean /= total;  // sum_i theta_i grad_theta_i
  for (int64_t j = 0; j < K; ++j) {
    if (similarity[j] < kMinSimilarity<T>) continue;
    double grad = 0;
    for (int64_t i = 0; i < K; ++i) {
      const double grad_p = (grad_theta[i] - mean) / total * (std::log(p[i]) + 1);
      grad += grad_p * ((same_group(groups, i, j) ? 1 : 0) - p[i]) / all;
    }
    grad_similarity[j] = T(grad);
  }
}

template <class S>
void forward(const EntropyArgs& args, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const int64_t K = args.K, D = args.D;
  double* p = static_cast<double*>(scratch);  // [K]
  T* e = reinterpret_cast<T*>(p + K);         // [D]
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* groups = args.groups ? args.groups + b * K : nullptr;
    T* theta = static_cast<T*>(args.triplet_weights) + b * K;
    triplet_weights(static_cast<const T*>(args.similarity) + b * K, groups, K, args.cross_refine, p, theta);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t first = (b * K + k) * 3;
      const S* x = static_cast<const S*>(args.triplets) + first * D;
      S* y = static_cast<S*>(args.calibrated) + first * D;
      T* alpha = static_cast<T*>(args.component_weights) + first;
      Entropy<T> of[3] = {};
      if (args.self_refine)
        for (int c = 0; c < 3; ++c) of[c] = entropy(x + c * D, D, e);
      component_weights(of, args.self_refine, alpha);
      for (int c = 0; c < 3; ++c) {
        const T scale = theta[k] * alpha[c];  // (13), (16)
        for_row<T>(D, [&](int64_t i, auto part) { part.put(scale * part.get(x + c * D + i, 0), y + c * D + i); });
      }
    }
  }
}

// With r_c = <grad, T_c>: grad_theta = sum_c alpha_c r_c, grad_alpha_c = theta r_c, grad_h from the quotient (12),
// and dh/dT = -p (log p + h).
template <class S>
void backward(const EntropyArgs& args, int64_t begin, int64_t end, void* scratch) {
  typedef Acc<S> T;
  const int64_t K = args.K, D = args.D;
  double* p = static_cast<double*>(scratch);  // [K]
  T* e = reinterpret_cast<T*>(p + K);         // [3, D]
  T* theta = e + 3 * D;                       // [K]
  T* grad_theta = theta + K;                  // [K]
  for (int64_t b = begin; b < end; ++b) {
    const int64_t* groups = args.groups ? args.groups + b * K : nullptr;
    const T* similarity = static_cast<const T*>(args.similarity) + b * K;
    triplet_weights(similarity, groups, K, args.cross_refine, p, theta);
    for (int64_t k = 0; k < K; ++k) {
      const int64_t first = (b * K + k) * 3 * D;
      const S* x = static_cast<const S*>(args.triplets) + first;
      const S* grad = static_cast<const S*>(args.grad_calibrated) + first;
      S* grad_x = static_cast<S*>(args.grad_triplets) + first;
      Entropy<T> of[3] = {};
      T alpha[3], r[3];
      for (int c = 0; c < 3; ++c) {
        if (args.self_refine) of[c] = entropy(x + c * D, D, e + c * D);
        RowSum<T> dot;
        for_row_sums<T>(D, [&](int64_t i, auto part, int chain) {
          dot.chain[chain] += part.get(x + c * D + i, 0) * part.get(grad + c * D + i, 0);
        });
        r[c] = dot.total();
      }
      component_weights(of, args.self_refine, alpha);
      grad_theta[k] = alpha[0] * r[0] + alpha[1] * r[1] + alpha[2] * r[2];
      const T total = of[0].h + of[1].h + of[2].h;
      const bool uncertain = args.self_refine && total != 0;
      for (int c = 0; c < 3; ++c) {
        const T scale = theta[k] * alpha[c];
        const T grad_h = theta[k] * (r[c] - grad_theta[k]);  // times the sum of entropies
        const T divisor = total * std::exp(of[c].log_total);
        const T offset = of[c].h - of[c].log_total;
        for_row<T>(D, [&](int64_t i, auto part) {
          Vec<T> g = scale * part.get(grad + c * D + i, 0);
          if (uncertain) {  // near certainty p (log p + h) and the sum vanish, their quotient does not
            Vec<T> shifted = part.get(x + c * D + i, 0) - of[c].max;
            Vec<T> slope = part.get(e + c * D + i, 0) * (shifted + offset) / divisor * grad_h;
            g -= shifted < ExpOf<T>::kSmallest ? Vec<T>{} : slope;
          }
          part.put(g, grad_x + c * D + i);
        });
      }
    }
    triplet_weights_backward(similarity, groups, K, args.cross_refine, grad_theta, p,
                             static_cast<T*>(args.grad_similarity) + b * K);
  }
}

template <class S>
size_t forward_scratch(const EntropyArgs& args) {
  return args.K * sizeof(double) + args.D * sizeof(Acc<S>);
}
template <class S>
size_t backward_scratch(const EntropyArgs& args) {
  return args.K * sizeof(double) + (3 * args.D + 2 * args.K) * sizeof(Acc<S>);
}

}  // namespace

void add_entropy_calibration(Kernels& kernels) {
  for_each_dtype([&](Dtype dtype, auto storage) {
    typedef decltype(storage) S;
    kernels.entropy_forward[dtype] = {forward_scratch<S>, forward<S>};
    kernels.entropy_backward[dtype] = {backward_scratch<S>, backward<S>};
  });
}

}  // namespace evc::EVC_NAMESPACE
