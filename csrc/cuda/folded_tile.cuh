// The folded encoder's products: a warp multiplies 16 rows by 8 columns, operands 16 bytes a lane straight from where they
// lie. 16-bit types meet on tensor cores, float is multiplied as it is; sums are float.
//
// Of a step of 32 along the depth, lane (g, t) = (lane / 4, lane % 4) holds elements 8t .. 8t + 7 of rows g and g + 8 of
// the left operand and of column g of the right one. A tensor core takes 16 at a time and believes that they are
// 2t, 2t + 1, 2t + 8 and 2t + 9 of its step: a sum does not mind the order of its terms.
#pragma once

#include "folded_layout.cuh"
#include "mma.cuh"
#include "reduce.cuh"

namespace evc::folded {

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x % kWarp); }
__device__ inline int warp_of() { return static_cast<int>(threadIdx.x / kWarp); }

// Steps of the depth: [begin, end).
struct Range {
  int begin, end;
};
__device__ inline Range part_of(int steps, int part, int of) { return {steps * part / of, steps * (part + 1) / of}; }

// 16 rows of a left operand, one step deep.
template <class S>
struct Left {
  uint4 row[2];  // g and g + 8

  // rows: at depth 0, or null: zeros. Each 16-byte aligned.
  __device__ void load(const S* const (&rows)[2], int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      row[i] = rows[i] ? *reinterpret_cast<const uint4*>(rows[i] + step * kDeep + lane_of() % 4 * 8) : make_uint4(0, 0, 0, 0);
  }
  // x: the lane's own part, which comes back as it was rounded.
  __device__ void make(float (&x)[2][8], float*) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        pairs[j] = narrow_pair<S>(x[i][2 * j], x[i][2 * j + 1]);
        x[i][2 * j] = widen(S{static_cast<uint16_t>(pairs[j])});
        x[i][2 * j + 1] = widen(S{static_cast<uint16_t>(pairs[j] >> 16)});
      }
      row[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
};

template <>
struct Left<float> {
  const float* row[2];  // at the step, or null

  __device__ void load(const float* const (&rows)[2], int step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row[i] = rows[i] ? rows[i] + step * kDeep : nullptr;
  }
  __device__ void make(float (&x)[2][8], float* exchange) {
    const int lane = lane_of();
    __syncwarp();  // the last step has been read
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* own = exchange + (lane / 4 + 8 * i) * (kDeep + 4);
      row[i] = own;
#pragma unroll
      for (int j = 0; j < 8; ++j) own[lane % 4 * 8 + j] = x[i][j];
    }
    __syncwarp();
  }
};

// A right operand: 8 columns, all their depth.
template <class S>
struct Right {
  const S* at;  // the lane's part of the first step
  int stride;   // elements from one step to the next

  struct Step {
    uint4 bits;
  };
  // tile: of packed columns (cuda_folded.h).
  static __device__ Right packed(const S* matrix, int depth, int tile) {
    return {matrix + static_cast<int64_t>(tile) * kColumns * depth + lane_of() * 8, kColumns * kDeep};
  }
  // rows: of the columns' transpose, [8, ...], `stride` apart, 16-byte aligned.
  static __device__ Right of_rows(const S* rows, int stride) {
    return {rows + static_cast<int64_t>(lane_of() / 4) * stride + lane_of() % 4 * 8, kDeep};
  }
  __device__ Step load(int step) const { return {*reinterpret_cast<const uint4*>(at + static_cast<int64_t>(step) * stride)}; }
};

template <>
struct Right<float> {
  const float* at[2];  // columns 2t and 2t + 1
  int stride;          // elements from four along the depth to the next four

  struct Step {
    const float* at[2];
    int stride;
  };
  static __device__ Right packed(const float* matrix, int depth, int tile) {
    const float* own = matrix + static_cast<int64_t>(tile) * kColumns * depth + lane_of() % 4 * 8;
    return {{own, own + 4}, kColumns * 4};
  }
  static __device__ Right of_rows(const float* rows, int stride) {
    const float* own = rows + static_cast<int64_t>(lane_of() % 4 * 2) * stride;
    return {{own, own + stride}, 4};
  }
  __device__ Step load(int step) const {
    const int64_t from = static_cast<int64_t>(step) * (kDeep / 4) * stride;
    return {{at[0] + from, at[1] + from}, stride};
  }
};

// The lane's part of a tile: row g, columns 2t and 2t + 1, then row g + 8. Two sums each, so that products need not wait
// for each other.
template <class S>
struct Sums {
  float chain[2][4] = {};

  __device__ float total(int i) const { return chain[0][i] + chain[1][i]; }

  __device__ void add(const Left<S>& left, const typename Right<S>::Step& right) {
    const uint4 &x = left.row[0], &y = left.row[1], &w = right.bits;
    mma<S>(chain[0], {x.x, y.x, x.y, y.y}, {w.x, w.y});
    mma<S>(chain[1], {x.z, y.z, x.w, y.w}, {w.z, w.w});
  }
  // rows: as of Left::load; all loads of kAhead steps are under way before the first product.
  __device__ void multiply(const S* const (&rows)[2], const Right<S>& right, Range steps) {
    constexpr int kAhead = 10;
    for (int step = steps.begin; step < steps.end; step += kAhead) {
      Left<S> left[kAhead];
      typename Right<S>::Step columns[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (step + i < steps.end) {
          columns[i] = right.load(step + i);
          left[i].load(rows, step + i);
        }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (step + i < steps.end) add(left[i], columns[i]);
    }
  }
};

template <>
struct Sums<float> {
  float chain[2][4] = {};

  __device__ float total(int i) const { return chain[0][i] + chain[1][i]; }

  __device__ void add(const Left<float>& left, const Right<float>::Step& right) {
#pragma unroll
    for (int k = 0; k < kDeep / 4; ++k) {
      float x[2][4] = {}, w[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (left.row[i]) load_vector(left.row[i] + k * 4, x[i]);
        load_vector(right.at[i] + k * right.stride, w[i]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) chain[k % 2][i] = fmaf(x[i / 2][j], w[i % 2][j], chain[k % 2][i]);
    }
  }
  __device__ void multiply(const float* const (&rows)[2], const Right<float>& right, Range steps) {
    for (int step = steps.begin; step < steps.end; ++step) {
      Left<float> left;
      left.load(rows, step);
      add(left, right.load(step));
    }
  }
};

// The caller's features as a left operand: any depth, float32 or the weights' type.
template <class S, class In>
struct Features {
  const In* at;
  int depth;
  bool aligned;  // every row, to 16 bytes

  // The lane's part of a step of one row, as it lies in memory.
  union Part {
    uint4 bits[sizeof(In) / 2];
    In at[8];
  };
  __device__ void load(Part& part, int64_t row, int step) const {
    const int k = step * kDeep + lane_of() % 4 * 8;
    const In* from = at + row * depth + k;
    if (row >= 0 && aligned && k + 8 <= depth) {
#pragma unroll
      for (int i = 0; i < int(sizeof(In)) / 2; ++i) part.bits[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) part.at[j] = row >= 0 && k + j < depth ? from[j] : In{};
    }
  }
  // rows: the lane's two, -1 for zeros; exchange: as of Left::make.
  __device__ void multiply(Sums<S>& sums, const int64_t (&rows)[2], const Right<S>& right, Range steps, float* exchange) const {
    constexpr int kAhead = sizeof(In) == 2 ? 8 : sizeof(S) == 2 ? 4 : 1;
    for (int step = steps.begin; step < steps.end; step += kAhead) {
      Part parts[kAhead][2];
      typename Right<S>::Step columns[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (step + i < steps.end) {
          columns[i] = right.load(step + i);
          load(parts[i][0], rows[0], step + i);
          load(parts[i][1], rows[1], step + i);
        }
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (step + i < steps.end) {
          float x[2][8];
#pragma unroll
          for (int j = 0; j < 8; ++j) x[0][j] = widen(parts[i][0].at[j]), x[1][j] = widen(parts[i][1].at[j]);
          Left<S> left;
          left.make(x, exchange);
          sums.add(left, columns[i]);
        }
    }
  }
};

// softmax(scores) times kTiles tiles of 8 columns. score(i, column): of the lane's row i (0: g, 1: g + 8), -inf where there
// is none, of 8 neighbours from a multiple of 8 on. The weights are rounded as a left operand before they are summed: they
// add up to 1.
template <class S, int kTiles, class Score>
__device__ void attend(float (&result)[kTiles][4], const Right<S> (&right)[kTiles], int tiles, int steps, const Score& score,
                       float* exchange) {
  float best[2] = {-INFINITY, -INFINITY}, total[2] = {}, x[2][8];
  const int own = lane_of() % 4 * 8;
#pragma unroll 4
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      score(i, step * kDeep + own, x[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) best[i] = Max::join(x[i][j], best[i]);
    }
#pragma unroll
  for (int i = 0; i < 2; ++i) best[i] = warp_max<4>(best[i]);
  Sums<S> sums[kTiles];
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      score(i, step * kDeep + own, x[i]);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][j] = expf(x[i][j] - best[i]);
    }
    Left<S> left;
    left.make(x, exchange);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) total[i] += x[i][j];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      if (tile < tiles) sums[tile].add(left, right[tile].load(step));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) total[i] = 1 / warp_sum<4>(total[i]);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) result[tile][i] = sums[tile].total(i) * total[i / 2];
}

// Tiles [first, last) by the block's warps, kSplit of them for each: product(tile, part, sums) adds one of kSplit parts of
// the depth, finish(tile, row, column, sum) gets every element once. Every thread of the block calls; partials: shared,
// [kWarps * 128], free again after the next barrier of the block.
template <int kSplit, class S, class Product, class Finish>
__device__ void for_tiles(int first, int last, float* partials, const Product& product, const Finish& finish) {
  constexpr int kTogether = kWarps / kSplit;
  const int lane = lane_of(), part = warp_of() % kSplit;
  for (int base = first; base < last; base += kTogether) {
    const int tile = base + warp_of() / kSplit;
    Sums<S> sums;
    if (tile < last) product(tile, part, sums);
    if constexpr (kSplit > 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) partials[(warp_of() * 4 + i) * kWarp + lane] = sums.total(i);
      __syncthreads();
    }
    if (tile < last)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i % kSplit != part) continue;
        float sum = sums.total(i);
        if constexpr (kSplit > 1) {
          const float* of_tile = partials + ((warp_of() - part) * 4 + i) * kWarp + lane;
          sum = of_tile[0];
#pragma unroll
          for (int p = 1; p < kSplit; ++p) sum += of_tile[p * 4 * kWarp];
        }
        finish(tile, lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, sum);
      }
    if constexpr (kSplit > 1) __syncthreads();
  }
}

}  // namespace evc::folded
