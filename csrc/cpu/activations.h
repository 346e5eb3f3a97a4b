// What stands between two products, a vector at a time.
#pragma once

#include "simd.h"

namespace evc::EVC_NAMESPACE {
namespace {

template <class T>
EVC_INLINE Vec<T> absolute(Vec<T> x) {
  return x < 0 ? -x : x;
}

EVC_INLINE Vec<double> erf_of(Vec<double> x) {
  double lanes[kLanes<double>];
  store(x, lanes);
  for (int64_t i = 0; i < kLanes<double>; ++i) lanes[i] = std::erf(lanes[i]);
  return load(lanes);
}
// x p(x^2) / q(x^2) on [-3.85, 3.85], our own fit for least relative error (1.5e-8 before rounding). Beyond, erf is +-1
// to an ulp, and must be just that: GELU multiplies 1 + erf by x.
EVC_INLINE Vec<float> erf_of(Vec<float> x) {
  constexpr float kEnd = 3.85f;
  const Vec<float> u = x * x;
  Vec<float> p = u * 2.1082651073811576e-06f + 0.000285663700196892f;
  p = p * u + 0.00367364170961082f;
  p = p * u + 0.052478790283203125f;
  p = p * u + 0.1878916174173355f;
  p = p * u + 1.1283791065216064f;
  Vec<float> q = u * 3.8731188396923244e-05f + 0.0011454224586486816f;
  q = q * u + 0.014784314669668674f;
  q = q * u + 0.11312634497880936f;
  q = q * u + 0.4998474717140198f;
  q = q * u + 1.0f;
  const Vec<float> y = x * p / q;  // a NaN stays
  return x >= kEnd ? splat(1.0f) : x <= -kEnd ? splat(-1.0f) : y;
}

template <class T>
EVC_INLINE Vec<T> gelu(Vec<T> x) {
  return T(0.5) * x * (1 + erf_of(x * T(0.70710678118654752440)));
}

template <class T>
EVC_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp_nonpositive<T>(-absolute<T>(x));
  return (x < 0 ? e : splat(T(1))) / (1 + e);
}
template <class T>
EVC_INLINE Vec<T> quick_gelu(Vec<T> x) {  // CLIP's
  return x * sigmoid<T>(T(1.702) * x);
}

// 1 - e loses digits near 0, where tanh x is x - x^3 / 3 + ...; its own ulps there are far below those of a gate's.
template <class T>
EVC_INLINE Vec<T> tanh_of(Vec<T> x) {
  const Vec<T> e = exp_nonpositive<T>(-2 * absolute<T>(x));
  const Vec<T> y = (1 - e) / (1 + e);
  return x < 0 ? -y : y;
}

}  // namespace
}  // namespace evc::EVC_NAMESPACE
