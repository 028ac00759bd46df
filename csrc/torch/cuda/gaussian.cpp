#include "../gaussian.h"

#include "cuda.h"

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CUDA, library) { bicm::register_gaussian<bicm::Cuda>(library); }
