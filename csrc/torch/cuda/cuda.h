// Launching on an NVIDIA GPU: on the tensors' device, on torch's current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../../cuda/kernels.h"
#include "../tensors.h"

namespace bicm {

struct Cuda {
  template <class Launch>
  static void on_stream(const Tensor& tensor, Launch launch) {
    const int32_t device = tensor.get_device();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    const cudaError_t error = launch(static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == cudaSuccess, "bicm_kernels: ", cudaGetErrorString(error));
  }

  static void run(const Multistep& problem, const Tensor& first) {
    on_stream(first, [&](cudaStream_t stream) { return cuda::multistep(problem, stream); });
  }
  static void run(const Noise& problem, const Tensor& out) {
    on_stream(out, [&](cudaStream_t stream) { return cuda::noise(problem, stream); });
  }
  static void fold_in(const Integer& seed, const Integer& data, const Tensor& out) {
    on_stream(out, [&](cudaStream_t stream) {
      return cuda::fold_in(seed, data, static_cast<int64_t*>(out.data_ptr()), out.numel(), stream);
    });
  }
};

}  // namespace bicm
