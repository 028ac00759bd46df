#include "noise.h"

#include "cpu.h"

namespace bicm {

void Cpu::run(const Noise& problem) { split(problem, problem.layout, kNoiseGrain, active_kernels().noise); }

void Cpu::run(const NoisyPair& problem) { split(problem, problem.layout, kNoiseGrain, active_kernels().noisy_pair); }

void Cpu::fold_in(const Integer& seed, const Integer& data, const Tensor& out) {
  int64_t* results = static_cast<int64_t*>(out.data_ptr());
  const int64_t count = out.numel();
  for (int64_t i = 0; i < count; ++i) results[i] = bicm::fold_in(load_integer(seed, i), load_integer(data, i));
}

}  // namespace bicm

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_noise<bicm::Cpu>(library); }
