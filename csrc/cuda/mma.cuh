// Tensor cores: one warp's product C [16, 8] += A [16, 16] B [16, 8] of 16-bit operands in float. Where the
// code is not compiled for a GPU, a plain twin on the same registers.
//
// Registers of a lane, with g = lane / 4 and t = lane % 4, two neighbours of the depth in each (the lower one in the low
// half): a[0], a[1]: rows g, g + 8 at depth 2t; a[2], a[3]: the same rows at depth 2t + 8.
// b[0], b[1]: column g at depth 2t, 2t + 8. c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8.
#pragma once

#include "numeric.cuh"

namespace evc {

template <class S>
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<S, BFloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(EVC_EMULATION)
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto element = [](uint32_t pair, int k) { return widen(S{static_cast<uint16_t>(k % 2 ? pair >> 16 : pair)}); };
  const Operands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Operands* lanes = evc_emulation::exchange("mma", mine);
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2, half = k / 8;
      sum += element(lanes[row * 4 + holder].a[half * 2 + i / 2], k) * element(lanes[column * 4 + holder].b[half], k);
    }
    c[i] += sum;
  }
#endif
}

}  // namespace evc
