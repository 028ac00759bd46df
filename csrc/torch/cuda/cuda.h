// Launching on an NVIDIA GPU: on the tensors' device, on torch's current stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../../cuda/kernels.h"
#include "../tensors.h"

namespace bicm {

struct Cuda {
  static constexpr bool kOnHost = false;

  template <class Launch>
  static void on_stream(const Tensor& tensor, Launch launch) {
    on_device(tensor.device_index(), launch);
  }

  template <class Launch>
  static void on_device(int32_t device, Launch launch) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    // Torch's own message: the error may come from an earlier kernel and not from this call's arguments.
    STD_CUDA_CHECK(launch(static_cast<cudaStream_t>(stream)));
  }

  static void run(const Multistep& problem, const Tensor& first) {
    on_stream(first, [&](cudaStream_t stream) { return cuda::multistep(problem, stream); });
  }
  static void run(const Reversible& problem, const Tensor& first) {
    on_stream(first, [&](cudaStream_t stream) { return cuda::reversible(problem, stream); });
  }
  static void run(const FixedPointDecode& problem, const Tensor& first) {
    on_stream(first, [&](cudaStream_t stream) { return cuda::fixed_point_decode(problem, stream); });
  }
  static void run(const Noise& problem, const Tensor& out) {
    on_stream(out, [&](cudaStream_t stream) { return cuda::noise(problem, stream); });
  }
  static void run(const NoisyPair& problem, const Tensor& x) {
    on_stream(x, [&](cudaStream_t stream) { return cuda::noisy_pair(problem, stream); });
  }
  static void run(const Gaussian& problem, const Tensor& first) {
    const Tensor scratch = row_like(first, cuda::gaussian_scratch(problem), DType::float64);
    on_stream(first, [&](cudaStream_t stream) {
      return cuda::gaussian(problem, static_cast<double*>(scratch.data_ptr()), stream);
    });
  }
  static void gradients(const Gaussian& problem, const Tensor& first) {
    on_stream(first, [&](cudaStream_t stream) { return cuda::gaussian_gradient(problem, stream); });
  }
  // Allocates the scratch memory first.
  template <class Launch>
  static void loss(PseudoHuber& problem, const Tensor& loss, const Tensor& sums, Launch launch) {
    problem.sums = static_cast<double*>(sums.data_ptr());
    const int64_t doubles = cuda::pseudo_huber_scratch(problem);
    const Tensor scratch = empty_tensor(sums, 1, doubles, aoti_torch_dtype_float64());
    on_stream(sums, [&](cudaStream_t stream) {
      return launch(problem, loss.data_ptr(), static_cast<double*>(scratch.data_ptr()), stream);
    });
  }
  static void sums(PseudoHuber& problem, const Tensor& value, const Tensor& sums) {
    loss(problem, value, sums, cuda::pseudo_huber);
  }
  static void sums_and_gradients(PseudoHuber& problem, const Tensor& value, const Tensor& sums) {
    loss(problem, value, sums, cuda::pseudo_huber_with_gradient);
  }
  static void gradients(const PseudoHuber& problem, const Tensor& sums) {
    on_stream(sums, [&](cudaStream_t stream) { return cuda::pseudo_huber_gradient(problem, stream); });
  }
  static void scale(const KeptGradient& problem, const Tensor& gradient) {
    on_stream(gradient, [&](cudaStream_t stream) { return cuda::scale_gradient(problem, stream); });
  }
  static void fold_in(const Integer& seed, const Integer& data, const Tensor& out) {
    on_stream(out, [&](cudaStream_t stream) {
      return cuda::fold_in(seed, data, static_cast<int64_t*>(out.data_ptr()), out.numel(), stream);
    });
  }
};

}  // namespace bicm
