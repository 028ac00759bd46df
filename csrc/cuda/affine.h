// Shared by the kernels of affine maps: the fold.
#pragma once

#include "../core/platform.h"

#include "access.h"

namespace bicm {
namespace cuda {

// A step of a left fold: y = weight x for the first term, y + weight x for the others.
template <int G, class C>
BICM_DEVICE void fold(bool first, C weight, const C* x, C* y) {
  BICM_UNROLL(8)
  for (int i = 0; i < G; ++i) {
    const C product = weight * x[i];
    y[i] = first ? product : y[i] + product;
  }
}

}  // namespace cuda
}  // namespace bicm
