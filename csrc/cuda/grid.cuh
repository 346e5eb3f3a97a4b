// A barrier for all blocks of a cooperative launch.
#pragma once

#include "launch.cuh"

namespace evc {

// Every thread of the grid must call. What a thread wrote before is visible to all afterwards. `state`: 0 before its
// first use, then left ready for the next barrier and the next launch; no two launches may use it at the same time.
//
// Each barrier adds 2^31 in all, so that its top bit turns when the last block arrives.
__device__ inline void grid_barrier(unsigned* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    constexpr unsigned kTop = 0x80000000u;
    const unsigned add = blockIdx.x == 0 ? kTop - (gridDim.x - 1) : 1;
#ifdef __CUDA_ARCH__
    __threadfence();
    unsigned before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(__cvta_generic_to_global(state)), "r"(add) : "memory");
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(__cvta_generic_to_global(state)) : "memory");
    while (((before ^ now) & kTop) == 0);
    __threadfence();
#else
    const unsigned before = atomicAdd(state, add);
    while (((before ^ *state) & kTop) == 0) __nanosleep(0);  // tests: lets other threads run
#endif
  }
  __syncthreads();
}

}  // namespace evc
