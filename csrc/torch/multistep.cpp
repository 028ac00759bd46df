#include "multistep.h"

#include "cpu.h"

namespace bicm {

void Cpu::run(const Multistep& problem) {
  split(problem, problem.layout, problem.draws ? kNoiseGrain : kGrain, active_kernels().multistep);
}

}  // namespace bicm

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_multistep<bicm::Cpu>(library); }
