// What the ops that run on csrc/cuda share: the library that Python asked for, and one call of it on a tensor's device
// and torch's current stream. On CPU tensors they run only where that library is the tests' emulation.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "cuda.h"
#include "tensors.h"

namespace evc {

// The library of CUDA kernels that serves CUDA tensors, or the CPU's; refuses where there is none.
const CudaKernels& cuda_kernels(bool on_cpu);

// cudaStream_t of torch's current stream on that device.
void* current_cuda_stream(int32_t device);

// Grid size of every launch, 0: the kernels' own choice.
int cuda_blocks();

namespace {

// From construction on, the device of `like` is the current one.
class CudaCall {
 public:
  const CudaKernels& kernels;
  CudaLaunch launch{};

  CudaCall(const Tensor& like, int64_t videos) : kernels(cuda_kernels(like.is_cpu())), like_(like) {
    launch.dtype = dtype_of(like);
    launch.videos = videos;
    launch.blocks = cuda_blocks();
    if (kernels.emulated) return;
    guard_.emplace(like.get_device_index());
    launch.stream = current_cuda_stream(like.get_device_index());
  }

  // As `checked` of the CPU's ops.
  Tensor checked(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, ScalarType type) const {
    STD_TORCH_CHECK(tensor.is_cpu() == like_.is_cpu() && tensor.get_device_index() == like_.get_device_index(),
                    "evc_fast: ", name, " is on another device than the op's first tensor");
    return checked_memory(tensor, name, sizes, type);
  }

  Tensor output(const std::vector<int64_t>& sizes, ScalarType type) const {
    Tensor made = empty(like_, sizes, type);
    // A GPU's fresh memory holds anything; NaN shows what is never written.
    if (kernels.emulated && made.numel() > 0) memset(made.data_ptr(), 0xff, made.numel() * made.element_size());
    return made;
  }
  // Keeps the workspace until the call ends: torch gives its memory to none but later work of the same stream.
  void allocate_workspace(int64_t bytes) {
    if (bytes == 0) return;
    workspace_ = output({bytes}, ScalarType::Byte);
    launch.workspace = workspace_->data_ptr();
  }

  void check(int error) const {
    STD_TORCH_CHECK(error == 0, "evc_fast: CUDA error ", error, ": ", kernels.error_text(error));
  }

  static CudaDtype dtype_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case ScalarType::Float: return kCudaFloat32;
      case ScalarType::BFloat16: return kCudaBFloat16;
      case ScalarType::Half: return kCudaFloat16;
      default: STD_TORCH_CHECK(false, "evc_fast: the CUDA kernels take float32, bfloat16 and float16");
    }
  }

 private:
  Tensor like_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::optional<Tensor> workspace_;
};

}  // namespace
}  // namespace evc
