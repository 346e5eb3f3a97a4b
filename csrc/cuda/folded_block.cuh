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
  __device__ static void for_units(int units, const Unit& unit) {
#pragma unroll 1
    for (int u = blockIdx.x; u < units; u += gridDim.x) {
      unit(u);
      __syncthreads();  // the next unit writes the shared memory that this one has read
    }
  }
  // Units of `together` of the tiles, in their order.
  template <class Tiles>
  __device__ static void for_units_of(int tiles, int together, const Tiles& run) {
    for_units(parts(tiles, together), [&](int unit) {
      run(unit * together, least((unit + 1) * together, tiles));
    });
  }
  // Blocks that share the work on one of `count` equal things, which has `pieces`.
  __device__ static int groups(int count, int pieces) {
    const int most = least(static_cast<int>(gridDim.x) / count, pieces);
    return most > 1 ? most : 1;
  }
  __device__ Right<S> packed(Weight w, int tile) const { return Right<S>::packed(p.matrix(w), p.size(w).depth, tile); }
  __device__ void expect_packed(Weight w, int tile) const {
    const int elements = kColumns * p.size(w).depth;
    expect(p.matrix(w) + int64_t(tile) * elements, elements * int64_t(sizeof(S)));
  }
  __device__ int steps(Weight w) const { return p.size(w).depth / kDeep; }
  __device__ float* exchange() const { return floats(p.shared.exchange) + warp * kExchange; }

  // From row `first` on of a matrix whose rows are `stride` apart; null from the `count`th of them on.
  __device__ Rows<S> rows_of(const S* matrix, int64_t first, int stride, int count = kRows) const {
    const S* own = matrix + (first + g) * stride;
    return {{g < count ? own : nullptr, g + 8 < count ? own + 8 * int64_t(stride) : nullptr}};
  }
  // Adds one of some parts of the depth.
  template <int kAhead = 5, bool shared = false>
  __device__ void multiply_packed(Sums<S>& sums, const Rows<S>& rows, Weight w, int tile, int part = 0, int of = 1) const {
    multiply<kAhead, shared>(sums, rows, packed(w, tile), part_of(steps(w), part, of));
  }

  // A column of kMemory's product of frame n among the tokens of one kind: what Attn_d reads, token by token.
  __device__ void remember(int b, int kind, int n, int column, float x) const {
    const int slot = kind * p.frames + n;
    const bool some = n < p.N;
    // Half a step that no token fills is read, too.
    const int rest = kind == p.kinds - 1 && n >= p.frames - kRows && p.kinds * p.frames < p.slots ? kRows : 0;
    if (column < p.scores) {
      float* to = p.memory_scores + (int64_t(b) * p.scores + column) * p.slots + slot;
      *to = some ? x : -INFINITY;
      if (rest > 0) to[rest] = -INFINITY;
    } else {
      S* to = p.memory_values + (int64_t(b) * p.by_head + column - p.scores) * p.slots + slot;
      *to = narrow<S>(some ? x : 0.0f);
      if (rest > 0) to[rest] = narrow<S>(0.0f);
    }
  }
};

}  // namespace evc::folded
