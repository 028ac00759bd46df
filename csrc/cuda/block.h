// Sums over a block's threads: compensated float32, in one fixed order.
#pragma once

#include "launch.h"

#if defined(BICM_EMULATE)
#define BICM_SHARED(type, name, count) static ::bicm::emulator::Shared<type, count> name
#else
#define BICM_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace bicm {
namespace cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kLanesOfWarp = 32;

// A sum and its rounding error: twice the digits of C, without double precision, which is slow on most GPUs.
template <class C>
struct Sum {
  C high, low;
};

// The exact error of a + b (Knuth, TAOCP vol. 2, 4.2.2): no size of one relative to the other is assumed.
template <class C>
BICM_DEVICE C lost(C a, C b, C sum) {
  const C part = sum - a;
  return (a - (sum - part)) + (b - part);
}

template <class C>
BICM_DEVICE Sum<C> add(const Sum<C>& a, const Sum<C>& b) {
  const C sum = a.high + b.high;
  return {sum, (a.low + b.low) + lost(a.high, b.high, sum)};
}

// The rounding error of an infinite sum is NaN and is dropped.
template <class C>
BICM_DEVICE double value_of(const Sum<C>& sum) {
  const double low = sum.low == sum.low ? static_cast<double>(sum.low) : 0.0;
  return static_cast<double>(sum.high) + low;
}

template <class C>
BICM_DEVICE Sum<C> warp_sum(Sum<C> x) {
  BICM_UNROLL(5)
  for (int lanes = kLanesOfWarp / 2; lanes > 0; lanes /= 2) {
    const C high = __shfl_xor_sync(kAllLanes, x.high, lanes);
    const C low = __shfl_xor_sync(kAllLanes, x.low, lanes);
    x = add(x, {high, low});
  }
  return x;
}

// The sum over a block of whole warps; thread 0 gets it. Every thread of the block must call this.
template <class C>
BICM_DEVICE Sum<C> block_sum(Sum<C> x) {
  constexpr int kWarps = kThreads / kLanesOfWarp;
  BICM_SHARED(C, high, kWarps);
  BICM_SHARED(C, low, kWarps);
  x = warp_sum(x);
  if (blockDim.x <= kLanesOfWarp) return x;
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kLanesOfWarp;
  if (thread % kLanesOfWarp == 0) {
    high[thread / kLanesOfWarp] = x.high;
    low[thread / kLanesOfWarp] = x.low;
  }
  __syncthreads();
  if (thread == 0) {
    BICM_LOOP
    for (int warp = 1; warp < warps; ++warp) x = add(x, {high[warp], low[warp]});
  }
  __syncthreads();  // the next sum writes there again
  return x;
}

// The same, for every thread of the block.
template <class C>
BICM_DEVICE double block_total(const Sum<C>& x) {
  BICM_SHARED(double, total, 1);
  const Sum<C> sum = block_sum(x);
  if (threadIdx.x == 0) total[0] = value_of(sum);
  __syncthreads();
  const double result = total[0];
  __syncthreads();  // the next total is written there
  return result;
}

}  // namespace cuda
}  // namespace bicm
