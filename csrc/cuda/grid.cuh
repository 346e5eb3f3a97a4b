// A barrier for all blocks of a cooperative launch, in two halves: what needs no other block can be done between them.
#pragma once

#include "launch.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

namespace evc {

// Every thread of the grid must call; then every thread waits with what it got, before it arrives again. What a thread
// wrote before it arrived is visible to all that have waited. The barrier's state is the launch's own.
__device__ inline unsigned grid_arrive() {
#ifdef EVC_EMULATION
  return evc_emulation::grid_arrive();
#else
  return cooperative_groups::this_grid().barrier_arrive();
#endif
}
__device__ inline void grid_wait(unsigned token) {
#ifdef EVC_EMULATION
  evc_emulation::grid_wait(token);
#else
  cooperative_groups::this_grid().barrier_wait(static_cast<unsigned&&>(token));
#endif
}
__device__ inline void grid_barrier() { grid_wait(grid_arrive()); }

}  // namespace evc
