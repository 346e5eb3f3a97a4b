// The library's one export, and what it tells of the device.
#include <cstdio>

#include "kernels.cuh"
#include "launch.cuh"

namespace evc {
namespace {

__global__ void probe() {}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// A kernel's attributes are known only where the library holds code for the device, and the driver knows that code.
const char* obstacle() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  static thread_local char text[512];
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
      snprintf(text, sizeof(text),
               "this GPU has compute capability %d.%d and the CUDA library was built for %s: rebuild it with "
               "EVC_FAST_CUDA_ARCHS=%d%d pip install .",
               device_attribute(cudaDevAttrComputeCapabilityMajor), device_attribute(cudaDevAttrComputeCapabilityMinor),
               EVC_CUDA_ARCHS, device_attribute(cudaDevAttrComputeCapabilityMajor),
               device_attribute(cudaDevAttrComputeCapabilityMinor));
      break;
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      snprintf(text, sizeof(text),
               "the GPU's driver is older than the CUDA toolkit that the CUDA library was built with (%s): install a newer "
               "driver, or rebuild with an older toolkit",
               error_text(error));
      break;
    default:
      snprintf(text, sizeof(text), "the CUDA library finds no GPU that it can use (%s): see nvidia-smi", error_text(error));
  }
  return text;
}

#ifdef EVC_EMULATION
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

constexpr CudaKernels kKernels{kCudaKernelsVersion,   kEmulated,
                               EVC_CUDA_ARCHS,        obstacle,
                               error_text,            entropy_calibration,
                               emotion_attention,     emotion_attention_workspace,
                               routing_aggregation,   nullptr};

}  // namespace
}  // namespace evc

extern "C" __attribute__((visibility("default"))) const evc::CudaKernels* evc_fast_cuda_kernels() { return &evc::kKernels; }
