// Storage types in registers: conversions, and 16 bytes of a row at a time whatever its alignment and length.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace evc {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(Float16 x) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest < 0x400) return (sign ? -1.0f : 1.0f) * (static_cast<float>(rest) / 16777216.0f);  // subnormal
  return __uint_as_float(sign | ((rest << 13) + (112u << 23)));
#endif
}

#ifndef __CUDA_ARCH__
__device__ inline uint32_t bits_of(float x, BFloat16) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
__device__ inline uint32_t bits_of(float x, Float16) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fff;
  if (rest >= 0x47800000u) return sign | 0x7c00;
  // Subnormal: a multiple of 2^-24, which is the last place of 0.5.
  if (rest < 0x38800000u) return sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000u);
  return sign | (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1)) >> 13;
}
#endif

// Two values in 16-bit storage, the first in the low half; rounded to nearest, ties to even.
template <class S>
__device__ inline uint32_t narrow_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  if constexpr (std::is_same_v<S, BFloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return bits_of(low, S()) | bits_of(high, S()) << 16;
#endif
}

template <class S>
__device__ inline S narrow(float x) {
  if constexpr (std::is_same_v<S, float>)
    return x;
  else
    return {static_cast<uint16_t>(narrow_pair<S>(x, 0.0f))};
}

// Elements in 16 bytes.
template <class S>
constexpr int kVector = 16 / static_cast<int>(sizeof(S));

inline __host__ __device__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// p: 16-byte aligned.
template <class S>
__device__ inline void load_vector(const S* p, float (&x)[kVector<S>]) {
  union {
    uint4 bits;
    S at[kVector<S>];
  } v;
  v.bits = *reinterpret_cast<const uint4*>(p);
#pragma unroll
  for (int i = 0; i < kVector<S>; ++i) x[i] = widen(v.at[i]);
}
__device__ inline void store_vector(const float (&x)[4], float* p) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
}
template <class S>
__device__ inline void store_vector(const float (&x)[8], S* p) {
  *reinterpret_cast<uint4*>(p) = make_uint4(narrow_pair<S>(x[0], x[1]), narrow_pair<S>(x[2], x[3]),
                                            narrow_pair<S>(x[4], x[5]), narrow_pair<S>(x[6], x[7]));
}

// Elements [i, i + kVector) of a row of n, `fill` beyond its end. aligned: `row` is, and so is i * sizeof(S).
template <class S>
__device__ inline void load_vector(const S* row, int64_t i, int64_t n, bool aligned, float (&x)[kVector<S>], float fill = 0) {
  if (aligned && i + kVector<S> <= n) {
    load_vector(row + i, x);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector<S>; ++j) x[j] = i + j < n ? widen(row[i + j]) : fill;
}
template <class S>
__device__ inline void store_vector(const float (&x)[kVector<S>], S* row, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + kVector<S> <= n) {
    store_vector(x, row + i);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector<S>; ++j)
    if (i + j < n) row[i + j] = narrow<S>(x[j]);
}

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752440f)); }

}  // namespace evc
