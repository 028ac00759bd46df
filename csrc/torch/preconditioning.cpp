#include "preconditioning.h"

#include "cpu.h"

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CPU, library) { bicm::register_preconditioning<bicm::Cpu>(library); }
