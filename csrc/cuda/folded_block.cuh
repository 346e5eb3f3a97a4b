// A block of the folded encoder's kernel, and what its stages share.
#pragma once

#include "folded_tile.cuh"

namespace evc::folded {

// A block at work. A stage is units of work that need no other unit of it; a block takes those of its number, and so on in
// steps of the grid. The operations that make an element of a result are the same whatever the grid and the batch, and in
// the same order.
template <class S>
struct Block {
  typedef FoldedCudaWeight Weight;

  const Layout<S>& p;
  unsigned char* const memory;  // shared
  const int lane = lane_of(), warp = warp_of(), g = lane / 4, t = lane % 4;

  __device__ Block(const Layout<S>& layout, unsigned char* shared) : p(layout), memory(shared) {}

  __device__ float* floats(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ S* operands(int offset) const { return reinterpret_cast<S*>(memory + offset); }
  __device__ float* partials() const { return floats(0); }

  template <class Unit>
  __device__ static void for_units(int64_t units, const Unit& unit) {
    for (int64_t u = blockIdx.x; u < units; u += gridDim.x) {
      unit(static_cast<int>(u));
      __syncthreads();  // the next unit writes the shared memory that this one has read
    }
  }
  // Blocks that share the work on one of `count` equal things, which has `pieces`.
  __device__ static int groups(int count, int pieces) {
    const int each = static_cast<int>(gridDim.x) / count, most = each < pieces ? each : pieces;
    return most > 1 ? most : 1;
  }
  __device__ Right<S> packed(Weight w, int tile) const { return Right<S>::packed(p.matrix(w), p.size(w).depth, tile); }
  __device__ int steps(Weight w) const { return p.size(w).depth / kDeep; }
  __device__ float* exchange() const { return floats(p.shared.exchange) + warp * kExchange; }

  // Rows g and g + 8 of a left operand whose rows are `stride` apart, from `first` on; null from the `count`th of them on.
  struct Rows {
    const S* at[2];
  };
  __device__ Rows rows_of(const S* matrix, int64_t first, int stride, int count = kRows) const {
    const S* own = matrix + (first + g) * stride;
    return {{g < count ? own : nullptr, g + 8 < count ? own + 8 * int64_t(stride) : nullptr}};
  }
  __device__ void multiply(Sums<S>& sums, const Rows& rows, Weight w, int tile, int part = 0, int of = 1) const {
    sums.multiply(rows.at, packed(w, tile), part_of(steps(w), part, of));
  }

  // A column of kMemory's product of frame n among the tokens of one kind: what Attn_d reads, token by token.
  __device__ void remember(int b, int kind, int n, int column, float x) const {
    const int slot = kind * p.frames + n;
    if (column < p.scores) {
      p.memory_scores[(int64_t(b) * p.scores + column) * p.slots + slot] = x;
      return;
    }
    S* to = p.memory_values + (int64_t(b) * p.by_head + column - p.scores) * p.slots + slot;
    *to = narrow<S>(n < p.N ? x : 0.0f);
    // Half a step that no token fills is multiplied too.
    if (kind == p.kinds - 1 && n >= p.frames - kRows && p.kinds * p.frames < p.slots) to[kRows] = narrow<S>(0.0f);
  }
};

}  // namespace evc::folded
