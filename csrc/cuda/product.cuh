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

// B [depth, columns], 0 outside: by columns of neighbours along the depth (`across` false), or by rows.
template <class S, bool across>
struct Operand {
  const S* at;
  int64_t stride;  // elements from one column to the next, or from one row to the next
  int columns, depth;

  __device__ S get(int column, int k) const {
    if (column >= columns || k >= depth) return S{};
    return across ? at[k * stride + column] : at[column * stride + k];
  }
  // Two neighbours along the depth, k even.
  __device__ uint32_t pair(int column, int k) const {
    if constexpr (!across) {
      const S* p = at + column * stride + k;
      if (column < columns && k + 1 < depth && reinterpret_cast<uintptr_t>(p) % 4 == 0)
        return *reinterpret_cast<const uint32_t*>(p);
    }
    return get(column, k).bits | static_cast<uint32_t>(get(column, k + 1).bits) << 16;
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
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll 4
    for (int k = 0; k < b.depth; k += 16) {
      const uint32_t pairs[2] = {b.pair(column + g, k + 2 * t), b.pair(column + g, k + 2 * t + 8)};
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
        const auto* low = reinterpret_cast<const uint32_t*>(a + (i * 16 + g) * stride + k + 2 * t);
        const uint32_t* high = low + 4 * stride;  // 8 rows below
        mma<S>(c[i], {low[0], high[0], low[4], high[4]}, pairs);
      }
    }
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
};

// 8 rows, a column a lane.
template <int kTall>
struct Tile<float, kTall> {
  static constexpr int kRows = 8, kColumns = kWarp;
  float c[kRows] = {};

  template <class B>
  __device__ void multiply(const float* a, int stride, const B& b, int column) {
    const int own = column + threadIdx.x % kWarp;
#pragma unroll 2
    for (int k = 0; k < b.depth; k += 4) {
      const float x[4] = {b.get(own, k), b.get(own, k + 1), b.get(own, k + 2), b.get(own, k + 3)};
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        float row[4];
        load_vector(a + i * stride + k, row);
        c[i] += row[0] * x[0] + row[1] * x[1] + (row[2] * x[2] + row[3] * x[3]);
      }
    }
  }
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) f(i, static_cast<int>(threadIdx.x % kWarp), c[i]);
  }
};

}  // namespace evc
