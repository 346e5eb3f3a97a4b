// Vectors of one instruction-set variant. This header and every file that includes it are compiled once per variant
// (-DEVC_ISA=avx2 ...), in a namespace of its own; no standard-library template may be used here, since the linker
// would merge an instance compiled for AVX-512 with the one that other machines run.
#pragma once

#include <cmath>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../ops.h"

#define EVC_CONCAT_(a, b) a##b
#define EVC_CONCAT(a, b) EVC_CONCAT_(a, b)
#define EVC_NAMESPACE EVC_CONCAT(isa_, EVC_ISA)
#define EVC_INLINE inline __attribute__((always_inline))

namespace evc::EVC_NAMESPACE {
namespace {

// Defined from outside only by the test that runs the wide variants' logic on machines without AVX-512.
#if !defined(EVC_VECTOR_BYTES)
#if defined(__AVX512F__)
#define EVC_VECTOR_BYTES 64
#define EVC_TILE_ROWS 12  // 12 x 2 sums, 2 of B and 1 of A in 32 registers
#elif defined(__AVX2__)
#define EVC_VECTOR_BYTES 32
#define EVC_TILE_ROWS 6  // 6 x 2 sums, 2 of B and 1 of A in 16 registers
#else
#define EVC_VECTOR_BYTES 16
#define EVC_TILE_ROWS 4
#endif
#endif
constexpr int kVectorBytes = EVC_VECTOR_BYTES;
constexpr int kTileRows = EVC_TILE_ROWS;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = kVectorBytes / sizeof(T);

template <class Storage>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};
template <class Storage>
using Acc = typename AccOf<Storage>::type;

template <class T>
EVC_INLINE T max_of(T a, T b) {
  return a < b ? b : a;  // a NaN in `a` stays
}
EVC_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
EVC_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x, also for -0 and NaN
}

// ---- storage <-> accumulation type ----

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfWordsUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

EVC_INLINE float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
EVC_INLINE float widen(float x) { return x; }
EVC_INLINE double widen(double x) { return x; }

EVC_INLINE void narrow(float x, BFloat16* to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
EVC_INLINE void narrow(float x, float* to) { *to = x; }
EVC_INLINE void narrow(double x, double* to) { *to = x; }

EVC_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const VectorOf<float>::unaligned*>(p); }
EVC_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const VectorOf<double>::unaligned*>(p); }
EVC_INLINE Vec<float> load(const BFloat16* p) {
  HalfWords half = *reinterpret_cast<const HalfWordsUnaligned*>(p);
  return (Vec<float>)(__builtin_convertvector(half, Words) << 16);
}

EVC_INLINE void store(Vec<float> x, float* p) { *reinterpret_cast<VectorOf<float>::unaligned*>(p) = x; }
EVC_INLINE void store(Vec<double> x, double* p) { *reinterpret_cast<VectorOf<double>::unaligned*>(p) = x; }
EVC_INLINE void store(Vec<float> x, BFloat16* p) {
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  memcpy(p, &half, sizeof half);
#else
  Words bits = (Words)x;
  Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  Words is_nan = (Words)(x != x);
  Words chosen = (is_nan & 0x7fc0) | (~is_nan & rounded);
  *reinterpret_cast<HalfWordsUnaligned*>(p) = __builtin_convertvector(chosen, HalfWords);
#endif
}

// The first n < kLanes elements, the rest `fill`; and the store that goes with it.
template <class S>
EVC_INLINE Vec<Acc<S>> load_part(const S* p, int64_t n, Acc<S> fill) {
  Acc<S> lanes[kLanes<Acc<S>>];
  for (int64_t i = 0; i < kLanes<Acc<S>>; ++i) lanes[i] = i < n ? widen(p[i]) : fill;
  return load(lanes);
}
template <class S>
EVC_INLINE void store_part(Vec<Acc<S>> x, S* p, int64_t n) {
  Acc<S> lanes[kLanes<Acc<S>>];
  store(x, lanes);
  for (int64_t i = 0; i < n; ++i) narrow(lanes[i], p + i);
}

// Where a row's body reads and writes: a whole vector, or the n elements that are left.
struct Whole {
  template <class S>
  EVC_INLINE Vec<Acc<S>> get(const S* p, Acc<S>) const { return load(p); }
  template <class S>
  EVC_INLINE void put(Vec<Acc<S>> x, S* p) const { store(x, p); }
};
struct Part {
  int64_t n;
  template <class S>
  EVC_INLINE Vec<Acc<S>> get(const S* p, Acc<S> fill) const { return load_part(p, n, fill); }
  template <class S>
  EVC_INLINE void put(Vec<Acc<S>> x, S* p) const { store_part(x, p, n); }
};

// body(offset, part): one call a vector of a row of n elements.
template <class T, class Body>
EVC_INLINE void for_row(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

// A sum along a row in kSums chains: they overlap in the pipeline, and each rounds fewer times than one chain would.
constexpr int kSums = 4;
template <class T>
struct RowSum {
  Vec<T> chain[kSums] = {};
  EVC_INLINE T total() const;
};

// body(offset, part, chain): as for_row, and which chain of a RowSum to add to.
template <class T, class Body>
EVC_INLINE void for_row_sums(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kSums * kLanes<T> <= n; i += kSums * kLanes<T>)
#pragma GCC unroll 4
    for (int chain = 0; chain < kSums; ++chain) body(i + chain * kLanes<T>, Whole{}, chain);
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(i, Whole{}, 0);
  if (i < n) body(i, Part{n - i}, 1);
}

// ---- reductions, in a fixed order of lanes ----

template <class T>
EVC_INLINE T sum_lanes(Vec<T> x) {
  T lanes[kLanes<T>];
  store(x, lanes);
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
template <class T>
EVC_INLINE T RowSum<T>::total() const {
  static_assert(kSums == 4);
  return sum_lanes<T>((chain[0] + chain[1]) + (chain[2] + chain[3]));
}
template <class T>
EVC_INLINE T max_lanes(Vec<T> x) {
  T best = x[0];
  for (int64_t i = 1; i < kLanes<T>; ++i) best = max_of(best, T(x[i]));
  return best;
}
template <class T>
EVC_INLINE Vec<T> max_vec(Vec<T> a, Vec<T> b) {
  return a < b ? b : a;
}

// ---- exp for x <= 0 (and NaN): a row's maximum is always subtracted first ----

template <class T>
struct ExpOf;
template <>
struct ExpOf<float> {
  typedef int32_t Int;
  static constexpr float kSmallestNormal = -87.33654f, kSmallest = -103.97208f;  // e^x is 2^-126, 2^-150
  static constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
};
template <>
struct ExpOf<double> {
  typedef int64_t Int;
  static constexpr double kSmallestNormal = -708.396418532264, kSmallest = -745.1332191019411;
  static constexpr double kMagic = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
};

// kGradual: subnormal results too, for callers that compare tiny values with each other; else 0 below 2^-126.
template <class T, bool kGradual = false>
EVC_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  typedef ExpOf<T> C;
  typedef typename C::Int Int;
  constexpr T kLog2E = T(1.44269504088896340736);
  constexpr T kLowest = kGradual ? C::kSmallest : C::kSmallestNormal;
  auto vanishes = x < kLowest;
  Vec<T> clamped = vanishes ? splat<T>(kLowest) : x;
  Vec<T> shifted = clamped * kLog2E + C::kMagic;
  Vec<T> n = shifted - C::kMagic;
  Vec<T> r = (clamped - n * C::kLn2High) - n * C::kLn2Low;  // |r| <= ln 2 / 2
  T inverse_factorial[C::kTerms + 1] = {1};
#pragma GCC unroll 16
  for (int i = 1; i <= C::kTerms; ++i) inverse_factorial[i] = inverse_factorial[i - 1] / i;
  Vec<T> p = splat(inverse_factorial[C::kTerms]);
#pragma GCC unroll 16
  for (int i = C::kTerms - 1; i >= 0; --i) p = p * r + inverse_factorial[i];
  Vec<Int> exponent = (Vec<Int>)shifted;  // n in the low bits; the magic number's own bits shift out
  Vec<T> result;
  if constexpr (kGradual) {  // 2^n in two normal factors
    Vec<Int> whole = (exponent << C::kMantissa) >> C::kMantissa;  // n, its sign extended
    Vec<Int> half = whole >> 1;
    result = p * (Vec<T>)((half + Int(C::kBias)) << C::kMantissa);
    result *= (Vec<T>)((whole - half + Int(C::kBias)) << C::kMantissa);
  } else {
    result = p * (Vec<T>)((exponent + Int(C::kBias)) << C::kMantissa);
  }
  return vanishes ? Vec<T>{} : result;
}

}  // namespace
}  // namespace evc::EVC_NAMESPACE
