// The CUDA launchers as a table, for calls from Python that bypass the dispatcher: on the device and the stream on which
// the dispatcher's ops run.
#include "../../cuda/launchers.h"

#include "cuda.h"

namespace bicm {
namespace {

int32_t current_device() {
  int device;
  return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}

// An error is not reported: the caller goes through the dispatcher, which meets it again and raises torch's own.
template <auto Launch, class... Given>
struct Entry {
  static int32_t call(Given... given, int32_t device) {
    try {
      Cuda::on_device(device, [&](cudaStream_t stream) { return Launch(given..., stream); });
      return 0;
    } catch (const std::exception&) {
      return 1;
    }
  }
};

constexpr Launchers kLaunchers = {
    kLaunchersVersion,
    current_device,
    Entry<&cuda::noise, const Noise&>::call,
    Entry<&cuda::noisy_pair, const NoisyPair&>::call,
    Entry<&cuda::multistep, const Multistep&>::call,
    Entry<&cuda::reversible, const Reversible&>::call,
    Entry<&cuda::fixed_point_decode, const FixedPointDecode&>::call,
    cuda::gaussian_scratch,
    Entry<&cuda::gaussian, const Gaussian&, double*>::call,
    cuda::pseudo_huber_scratch,
    Entry<&cuda::pseudo_huber, const PseudoHuber&, void*, double*>::call,
    Entry<&cuda::pseudo_huber_with_gradient, const PseudoHuber&, void*, double*>::call,
    Entry<&cuda::pseudo_huber_gradient, const PseudoHuber&>::call,
    Entry<&cuda::scale_gradient, const KeptGradient&>::call,
};

}  // namespace
}  // namespace bicm

extern "C" __attribute__((visibility("default"))) const void* bicm_kernels_launchers() { return &bicm::kLaunchers; }

// What the library was built for, as CMake has it: "80-real 120" is machine code for both, and PTX of the latter.
extern "C" __attribute__((visibility("default"))) const char* bicm_kernels_architectures() {
  return BICM_ARCHITECTURES;
}
