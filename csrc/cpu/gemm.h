// Small products on chip: C [M, N] (+)= A [M, D] B [D, N], everything in L1 and L2.
#pragma once

#include "simd.h"

namespace evc::EVC_NAMESPACE {
namespace {

constexpr int kTileVectors = 2;

// A may be read along rows or along columns (a transposed operand costs nothing: its elements are broadcast).
template <class T>
struct Broadcast {
  const T* data;
  int64_t row, column;  // strides in elements
};

// B rows start on any element; `width` columns rounded up to whole vectors must be readable;
// what stands beyond the real ones comes out beyond them.
// ahead: elements from a row to one that will be read later and should be fetched from memory meanwhile; 0 for none.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int64_t ahead = 0;
};

// Each element of C is one chain of multiply-adds over D in order, whatever the tile: results do not depend on M.
template <class T, int kRows, int kVectors, bool kAdd, bool kFetch>
EVC_INLINE void tile(int64_t depth, Broadcast<T> a, Rows<T> b, T* c, int64_t c_stride) {
  Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sum[i][j] = Vec<T>{};
  const T* pa = a.data;
  const T* pb = b.data;
  for (int64_t k = 0; k < depth; ++k, pa += a.column, pb += b.stride) {
    Vec<T> column[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) column[j] = load(pb + j * kLanes<T>);
    if constexpr (kFetch)
      for (int64_t line = 0; line < kVectors * kVectorBytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(pb + b.ahead) + line, 0, 2);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      Vec<T> x = splat(pa[i * a.row]);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sum[i][j] += x * column[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      T* to = c + i * c_stride + j * kLanes<T>;
      store(kAdd ? load(to) + sum[i][j] : sum[i][j], to);  // added at the end: a sum of sums, not one long chain
    }
}

template <class T, int kVectors, bool kAdd, bool kFetch, int kRows = kTileRows>
EVC_INLINE void tile_rows(int64_t rows, int64_t depth, Broadcast<T> a, Rows<T> b, T* c, int64_t c_stride) {
  if (rows == kRows) return tile<T, kRows, kVectors, kAdd, kFetch>(depth, a, b, c, c_stride);
  if constexpr (kRows > 1) tile_rows<T, kVectors, kAdd, kFetch, kRows - 1>(rows, depth, a, b, c, c_stride);
}

template <class T, int kVectors, bool kAdd, bool kFetch = false>
__attribute__((noinline)) void panel(int64_t M, int64_t depth, Broadcast<T> a, Rows<T> b, T* c, int64_t c_stride) {
  int64_t tiles = (M + kTileRows - 1) / kTileRows;
  for (int64_t t = 0, m = 0; t < tiles; ++t) {
    int64_t rows = (M - m) / (tiles - t);  // even tiles: a last tile of few rows would wait for its own sums
    tile_rows<T, kVectors, kAdd, kFetch>(rows, depth, {a.data + m * a.row, a.row, a.column}, b, c + m * c_stride, c_stride);
    m += rows;
  }
}

template <class T, bool kAdd>
void multiply_block(int64_t M, int64_t width, int64_t depth, Broadcast<T> a, Rows<T> b, T* c, int64_t c_stride) {
  constexpr int64_t kPanel = kTileVectors * kLanes<T>;
  int64_t n = 0;
  for (; n + kPanel - kLanes<T> < width; n += kPanel)
    panel<T, kTileVectors, kAdd>(M, depth, a, {b.data + n, b.stride}, c + n, c_stride);
  if (n < width) panel<T, 1, kAdd>(M, depth, a, {b.data + n, b.stride}, c + n, c_stride);
}

// width: columns of C to compute, rounded up here to whole vectors. Long sums are split evenly: chains of at most
// kDepth terms round fewer times, and a block of B stays in L1.
template <class T, bool kAdd>
void multiply(int64_t M, int64_t width, int64_t depth, Broadcast<T> a, Rows<T> b, T* c, int64_t c_stride) {
  constexpr int64_t kDepth = 96;
  const int64_t blocks = (depth + kDepth - 1) / kDepth;
  int64_t begin = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t end = depth * (i + 1) / blocks;
    const Broadcast<T> a_block{a.data + begin * a.column, a.row, a.column};
    const Rows<T> b_block{b.data + begin * b.stride, b.stride};
    if (kAdd || i > 0)
      multiply_block<T, true>(M, width, end - begin, a_block, b_block, c, c_stride);
    else
      multiply_block<T, false>(M, width, end - begin, a_block, b_block, c, c_stride);
    begin = end;
  }
}

}  // namespace
}  // namespace evc::EVC_NAMESPACE
