#include "../pseudo_huber.h"

#include "cuda.h"

STABLE_TORCH_LIBRARY_IMPL(bicm_kernels, CUDA, library) { bicm::register_pseudo_huber<bicm::Cuda>(library); }
