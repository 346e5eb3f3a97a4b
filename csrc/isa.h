// Which instruction-set variant of the kernels runs: the best that was built and that this machine has, or the one that
// the environment variable EVC_FAST_ISA names.
#pragma once

#include "ops.h"

namespace evc {

const Kernels& kernels();

}  // namespace evc
