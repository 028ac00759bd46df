#include "reversible.h"

#include "cpu.h"

namespace bicm {

void Cpu::run(const Reversible& problem) { split(problem, problem.layout, kGrain, active_kernels().reversible); }

void Cpu::run(const FixedPointDecode& problem) {
  split(problem, problem.layout, kGrain, active_kernels().fixed_point_decode);
}

}  // namespace bicm

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_reversible<bicm::Cpu>(library); }
