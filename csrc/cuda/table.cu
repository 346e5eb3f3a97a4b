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
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor), minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion)
    snprintf(text, sizeof(text),
             "there is no driver of the GPU, or it is older than the CUDA toolkit that the CUDA library was built with (%s): "
             "install a newer driver, or rebuild with an older toolkit",
             error_text(error));
  else if (error != cudaErrorNoKernelImageForDevice)
    snprintf(text, sizeof(text), "the CUDA library finds no GPU that it can use (%s): see nvidia-smi", error_text(error));
  else if (major < 8)
    snprintf(text, sizeof(text), "the CUDA kernels need a GPU of compute capability 8.0 or later, this one has %d.%d", major, minor);
  else
    snprintf(text, sizeof(text),
             "this GPU has compute capability %d.%d and the CUDA library was built for %s: EVC_FAST_CUDA_ARCHS=%d%d pip "
             "install . rebuilds it",
             major, minor, EVC_CUDA_ARCHS, major, minor);
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
                               routing_aggregation,   &kFoldedKernels};

}  // namespace
}  // namespace evc

extern "C" __attribute__((visibility("default"))) const evc::CudaKernels* evc_fast_cuda_kernels() { return &evc::kKernels; }
