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

// Asks for what the calling warp is about to read, while it still has other things to do.
__device__ inline void expect([[maybe_unused]] const void* from, [[maybe_unused]] int64_t bytes) {
#ifdef __CUDA_ARCH__
  constexpr int kLine = 128;
#pragma unroll 1
  for (int64_t at = lane_of() * kLine; at < bytes; at += kWarp * kLine)
    asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(static_cast<const char*>(from) + at)));
#endif
}

// Steps of the depth: [begin, end).
struct Range {
  int begin, end;
};
__device__ inline Range part_of(int steps, int part, int of) { return {steps * part / of, steps * (part + 1) / of}; }

// Rows g and g + 8 of a left operand, at depth 0, 16-byte aligned; null: zeros.
template <class S>
struct Rows {
  const S* at[2];
};

// 16 rows of a left operand, one step deep.
template <class S>
struct Left {
  uint4 row[2];

  // Zeros where it is not to be: what a register held before must not live on.
  __device__ void load(const Rows<S>& rows, int step, bool some) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      row[i] = some && rows.at[i] ? *reinterpret_cast<const uint4*>(rows.at[i] + step * kDeep + lane_of() % 4 * 8) : make_uint4(0, 0, 0, 0);
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

  __device__ void load(const Rows<float>& rows, int step, bool some) {
#pragma unroll
    for (int i = 0; i < 2; ++i) row[i] = some && rows.at[i] ? rows.at[i] + step * kDeep : nullptr;
  }
  // exchange: shared, a warp's own [kExchange].
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
  __device__ Right next(int64_t apart) const { return {at + apart, stride}; }
  __device__ Step load(int step, bool some) const {
    return {some ? *reinterpret_cast<const uint4*>(at + static_cast<int64_t>(step) * stride) : make_uint4(0, 0, 0, 0)};
  }
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
  __device__ Right next(int64_t apart) const { return {{at[0] + apart, at[1] + apart}, stride}; }
  __device__ Step load(int step, bool) const {
    const int64_t from = static_cast<int64_t>(step) * (kDeep / 4) * stride;
    return {{at[0] + from, at[1] + from}, stride};
  }
};

// The lane's part of a tile: row g, columns 2t and 2t + 1, then row g + 8. Sums in turns, so that products need not wait for
// each other.
template <class S, int kChains = 2>
struct Sums {
  float chain[kChains][4] = {};

  __device__ float total(int i) const { return kChains == 2 ? chain[0][i] + chain[kChains - 1][i] : chain[0][i]; }

  __device__ void add(const Left<S>& left, const typename Right<S>::Step& right) {
    if constexpr (sizeof(S) == 2) {
      const uint4 &x = left.row[0], &y = left.row[1], &w = right.bits;
      mma<S>(chain[0], {x.x, y.x, x.y, y.y}, {w.x, w.y});
      mma<S>(chain[kChains - 1], {x.z, y.z, x.w, y.w}, {w.z, w.w});
    } else {
#pragma unroll 2
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
          for (int i = 0; i < 4; ++i) chain[j % kChains][i] = fmaf(x[i / 2][j], w[i % 2][j], chain[j % kChains][i]);
      }
    }
  }
};

// Steps of a tile's product. The loads of kAhead steps are under way before the first of them is multiplied, the left
// operand's too unless it lies in shared memory, close by.
template <int kAhead, bool shared, class S>
__device__ void multiply(Sums<S>& sums, const Rows<S>& rows, const Right<S>& right, Range steps) {
  constexpr int kOwn = sizeof(S) == 2 ? kAhead : 1;
#pragma unroll 1
  for (int step = steps.begin; step < steps.end; step += kOwn) {
    Left<S> left[kOwn];
    typename Right<S>::Step columns[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      columns[i] = right.load(step + i, step + i < steps.end);
      if (!shared) left[i].load(rows, step + i, step + i < steps.end);
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (step + i < steps.end) {
        if (shared) left[i].load(rows, step + i, true);
        sums.add(left[i], columns[i]);
      }
  }
}

// The caller's features as a left operand: any depth, float32 or the weights' type.
template <class In>
struct Features {
  const In* at[2];  // the lane's rows; null: zeros
  int depth;
  bool aligned;  // every row, and its length, to 16 bytes

  // The lane's part of a step of both rows, as it lies in memory.
  union Part {
    uint4 bits[2][sizeof(In) / 2];
    In at[2][8];
  };
  __device__ void load(Part& part, int step, bool some) const {
    constexpr int kPer = 16 / static_cast<int>(sizeof(In));
    const int k = step * kDeep + lane_of() % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8 / kPer; ++j)
        part.bits[i][j] = some && at[i] && k + j * kPer < depth ? reinterpret_cast<const uint4*>(at[i] + k)[j] : make_uint4(0, 0, 0, 0);
  }
  // The same of any row, one by one.
  __device__ void load_each(Part& part, int step) const {
    const int k = step * kDeep + lane_of() % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) part.at[i][j] = at[i] && k + j < depth ? at[i][k + j] : In{};
  }
  template <class S>
  __device__ static void add(Sums<S>& sums, const Part& part, const typename Right<S>::Step& columns, float* exchange) {
    Left<S> left;
    if constexpr (std::is_same_v<S, In> && sizeof(S) == 2) {
      left.row[0] = part.bits[0][0], left.row[1] = part.bits[1][0];
    } else {
      float x[2][8];
#pragma unroll
      for (int j = 0; j < 8; ++j) x[0][j] = widen(part.at[0][j]), x[1][j] = widen(part.at[1][j]);
      left.make(x, exchange);
    }
    sums.add(left, columns);
  }
};

// exchange: as of Left::make.
template <class S, class In>
__device__ void multiply(Sums<S>& sums, const Features<In>& features, const Right<S>& right, Range steps, float* exchange) {
  constexpr int kAhead = sizeof(S) == 4 ? 1 : sizeof(In) == 4 ? 4 : 8;
  typedef typename Features<In>::Part Part;
  if (!features.aligned) {
#pragma unroll 1
    for (int step = steps.begin; step < steps.end; ++step) {
      Part part;
      features.load_each(part, step);
      features.template add<S>(sums, part, right.load(step, true), exchange);
    }
    return;
  }
#pragma unroll 1
  for (int step = steps.begin; step < steps.end; step += kAhead) {
    Part parts[kAhead];
    typename Right<S>::Step columns[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      columns[i] = right.load(step + i, step + i < steps.end);
      features.load(parts[i], step + i, step + i < steps.end);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      if (step + i < steps.end) features.template add<S>(sums, parts[i], columns[i], exchange);
  }
}

// 8 elements of a row from a multiple of 8 on; null: zeros.
__device__ inline void load_eight(const float* row, int i, float (&x)[8]) {
  float half[2][4] = {};
  if (row) {
    load_vector(row + i, half[0]);
    load_vector(row + i + 4, half[1]);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] = half[j / 4][j % 4];
}

// softmax(scores) times the first `tiles` of kTiles tiles of 8 columns, whose right operands are `apart` elements apart.
// scores: the lane's two rows, -inf where there is none, but one or more in each step. The weights are rounded as a left
// operand before they are summed: they add up to 1.
template <int kAhead, int kTiles, class S>
__device__ void attend(float (&result)[kTiles][4], const Rows<float>& scores, const Right<S>& right, int64_t apart, int tiles, int steps,
                       float* exchange) {
  float best[2] = {-INFINITY, -INFINITY}, total[2] = {};
  Sums<S, 1> sums[kTiles];
#pragma unroll 1
  for (int step = 0; step < steps; step += kAhead) {
    float x[kAhead][2][8], most[2] = {best[0], best[1]};
    typename Right<S>::Step columns[kAhead][kTiles];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_eight(step + k < steps ? scores.at[i] : nullptr, (step + k) * kDeep + lane_of() % 4 * 8, x[k][i]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        columns[k][tile] = right.next(tile * apart).load(step + k, step + k < steps && tile < tiles);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (step + k < steps)
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) most[i] = fmaxf(x[k][i][j], most[i]);  // a NaN shows in the sum
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAllLanes, most[i], 1));
      most[i] = fmaxf(most[i], __shfl_xor_sync(kAllLanes, most[i], 2));
      const float factor = expf(best[i] - most[i]);  // what was summed so far was relative to a lower one
      total[i] *= factor;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) sums[tile].chain[0][2 * i] *= factor, sums[tile].chain[0][2 * i + 1] *= factor;
      best[i] = most[i];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (step + k < steps) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) x[k][i][j] = expf(x[k][i][j] - best[i]);
        Left<S> left;
        left.make(x[k], exchange);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) total[i] += x[k][i][j];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          if (tile < tiles) sums[tile].add(left, columns[k][tile]);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) total[i] = 1 / warp_sum<4>(total[i]);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) result[tile][i] = sums[tile].total(i) * total[i / 2];
}

// Tiles [first, last) by the block's warps, kSplit of them for each: product(sums, tile, part) adds one of kSplit parts of
// the depth. finish(tile, row, column, sum) gets every element once, with addend(tile, row, column), which is asked for
// before the product, so that its loads wait beside the product's. Every thread of the block calls; partials: shared,
// [kWarps, 128], free again after the next barrier of the block.
template <int kSplit, class S, class Addend, class Product, class Finish>
__device__ void for_tiles(int first, int last, float* partials, const Addend& addend, const Product& product, const Finish& finish) {
  constexpr int kTogether = kWarps / kSplit;
  const int lane = lane_of(), part = warp_of() % kSplit;
  const auto row_of = [&](int i) { return lane / 4 + i / 2 * 8; };
  const auto column_of = [&](int i) { return lane % 4 * 2 + i % 2; };
#pragma unroll 1
  for (int base = first; base < last; base += kTogether) {
    const int tile = base + warp_of() / kSplit;
    float added[4 / kSplit];
#pragma unroll
    for (int j = 0; j < 4 / kSplit; ++j) added[j] = tile < last ? addend(tile, row_of(j * kSplit + part), column_of(j * kSplit + part)) : 0;
    Sums<S> sums;
    if (tile < last) product(sums, tile, part);
    if constexpr (kSplit > 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) partials[(warp_of() * 4 + i) * kWarp + lane] = sums.total(i);
      __syncthreads();
    }
    if (tile < last)
#pragma unroll
      for (int j = 0; j < 4 / kSplit; ++j) {
        const int i = j * kSplit + part;
        float sum = sums.total(j);
        if constexpr (kSplit > 1) {
          const float* of_tile = partials + ((warp_of() - part) * 4 + i) * kWarp + lane;
          sum = of_tile[0];
#pragma unroll
          for (int p = 1; p < kSplit; ++p) sum += of_tile[p * 4 * kWarp];
        }
        finish(tile, row_of(i), column_of(i), sum + added[j]);
      }
    if constexpr (kSplit > 1) __syncthreads();
  }
}

}  // namespace evc::folded
