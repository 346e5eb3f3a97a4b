// One warp's tile of a product A B: A in the block's scratch, B anywhere, sums in registers. 16-bit types meet on tensor
// cores; float is multiplied as it is.
#pragma once

#include "mma.cuh"

namespace evc {

template <class S>
constexpr int kDepthStep = std::is_same_v<S, float> ? 4 : 16;

// Elements from one row of A to the next: room for zeros up to a whole step of the depth, and for 16-bit types such that
// the 8 rows that a warp reads at once lie in different banks of shared memory.
template <class S>
__host__ __device__ inline int row_stride(int64_t depth) {
  constexpr int kStep = kDepthStep<S>;
  return static_cast<int>((depth + kStep - 1) / kStep) * kStep + 16 / static_cast<int>(sizeof(S));
}

// B [depth, columns]: in memory by columns, neighbours along the depth side by side, or `across`, by rows.
template <class S, bool across>
struct Operand {
  const S* at;
  int64_t stride;  // elements from one column to the next, or from one row to the next
  int columns, depth;

  // A column's elements along the depth. Beyond the last one any column serves: its sums are not kept.
  struct Column {
    const S* at;
    int64_t stride;
    int depth;
    bool pairs;  // two neighbours lie in 4 aligned bytes

    __device__ S operator[](int k) const { return at[across ? k * stride : k]; }
    __device__ S checked(int k) const { return k < depth ? (*this)[k] : S{}; }
    // Elements k and k + 1, k even; `checked`: zero from the depth on.
    __device__ uint32_t pair(int k) const {
      if (pairs) return *reinterpret_cast<const uint32_t*>(at + k);
      return (*this)[k].bits | static_cast<uint32_t>((*this)[k + 1].bits) << 16;
    }
    __device__ uint32_t checked_pair(int k) const {
      return checked(k).bits | static_cast<uint32_t>(checked(k + 1).bits) << 16;
    }
  };
  __device__ Column column(int column) const {
    const int64_t own = column < columns ? column : columns - 1;
    const S* p = at + (across ? own : own * stride);
    return {p, stride, depth, !across && reinterpret_cast<uintptr_t>(p) % 4 == 0};
  }
};

// kTall times 16 rows, 8 columns.
template <class S, int kTall>
struct Tile {
  static constexpr int kRows = 16 * kTall, kColumns = 8;
  float c[kTall][4] = {};

  // a: the tile's first row, zero from b.depth to a whole step; column: the tile's first.
  template <class B>
  __device__ void multiply(const S* a, int stride, const B& b, int column) {
    const int lane = threadIdx.x % kWarp, t = lane % 4;
    const auto own = b.column(column + lane / 4);
    a += lane / 4 * stride + 2 * t;
    constexpr int kAhead = kTall == 1 ? 4 : 2;  // loads in flight, as registers allow
    int k = 0;
#pragma unroll kAhead
    for (; k + 16 <= b.depth; k += 16) step(a + k, stride, {own.pair(k + 2 * t), own.pair(k + 2 * t + 8)});
    if (k < b.depth) step(a + k, stride, {own.checked_pair(k + 2 * t), own.checked_pair(k + 2 * t + 8)});
  }
  // f(row, column, sum) for the lane's part of the tile.
  template <class F>
  __device__ void each(F f) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kTall; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) f(i * 16 + lane / 4 + j / 2 * 8, lane % 4 * 2 + j % 2, c[i][j]);
  }

 private:
  __device__ void step(const S* a, int stride, const uint32_t (&pairs)[2]) {
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
      const auto* low = reinterpret_cast<const uint32_t*>(a + i * 16 * stride);
      const uint32_t* high = low + 4 * stride;  // 8 rows below
      mma<S>(c[i], {low[0], high[0], low[4], high[4]}, pairs);
    }
  }
};

// 8 rows, a column a lane.
template <int kTall>
struct Tile<float, kTall> {
  static constexpr int kRows = 8, kColumns = kWarp;
  float c[kRows] = {};

  template <class B>
  __device__ void multiply(const float* a, int stride, const B& b, int column) {
    const auto own = b.column(column + threadIdx.x % kWarp);
    int k = 0;
#pragma unroll 2
    for (; k + 4 <= b.depth; k += 4) step(a + k, stride, {own[k], own[k + 1], own[k + 2], own[k + 3]});
    if (k < b.depth) step(a + k, stride, {own[k], own.checked(k + 1), own.checked(k + 2), 0.0f});
  }
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) f(i, static_cast<int>(threadIdx.x % kWarp), c[i]);
  }

 private:
  __device__ void step(const float* a, int stride, const float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float row[4];
      load_vector(a + i * stride, row);
      c[i] += row[0] * x[0] + row[1] * x[1] + (row[2] * x[2] + row[3] * x[3]);
    }
  }
};

}  // namespace evc
