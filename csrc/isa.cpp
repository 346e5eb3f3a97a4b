#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace evc {
namespace {

struct Variant {
  const char* name;
  bool (*runs_here)();
  const Kernels& (*kernels)();
};

// Slowest first.
constexpr Variant kVariants[] = {
    {"default", [] { return true; }, isa_default::kernels},
#ifdef EVC_HAVE_AVX2
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, isa_avx2::kernels},
#endif
#ifdef EVC_HAVE_AVX512
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     isa_avx512::kernels},
#endif
#ifdef EVC_HAVE_AVX512_BF16
    {"avx512_bf16",
     [] {
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     isa_avx512_bf16::kernels},
#endif
};

const Variant* choose() {
  const char* wanted = std::getenv("EVC_FAST_ISA");
  const Variant* chosen = nullptr;
  for (const Variant& variant : kVariants)
    if (variant.runs_here() && (!wanted || !*wanted || std::string(wanted) == variant.name)) chosen = &variant;
  return chosen;
}

const Variant* active() {
  static const Variant* const variant = choose();
  return variant;
}

}  // namespace

const Kernels& kernels() {
  if (!active()) throw std::runtime_error("evc_fast: EVC_FAST_ISA names no variant that was built and runs here");
  return active()->kernels();
}

}  // namespace evc

extern "C" __attribute__((visibility("default"))) const char* evc_fast_cpu_isa() {
  return evc::active() ? evc::active()->name : "";  // "": EVC_FAST_ISA names none that can run
}

extern "C" __attribute__((visibility("default"))) const char* evc_fast_cpu_isas_supported() {
  static const std::string names = [] {
    std::string joined;
    for (const evc::Variant& variant : evc::kVariants) {
      if (!variant.runs_here()) continue;
      if (!joined.empty()) joined += ',';
      joined += variant.name;
    }
    return joined;
  }();
  return names.c_str();
}
