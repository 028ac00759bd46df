// The CUDA kernels: problems whose pointers are device memory, launched on a stream. Nothing is read on the host, so a
// launch can be captured. Returns the runtime's error; an empty problem launches nothing.
#pragma once

#include "../core/gaussian.h"
#include "../core/multistep.h"
#include "../core/noise.h"
#include "../core/pseudo_huber.h"
#include "../core/reversible.h"

#if defined(BICM_EMULATE)
#include "../emulator/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace bicm {
namespace cuda {

cudaError_t noise(const Noise& problem, cudaStream_t stream);
cudaError_t noisy_pair(const NoisyPair& problem, cudaStream_t stream);
cudaError_t multistep(const Multistep& problem, cudaStream_t stream);
cudaError_t reversible(const Reversible& problem, cudaStream_t stream);
cudaError_t fixed_point_decode(const FixedPointDecode& problem, cudaStream_t stream);

// The loss, in the compute type, one number or one per sample; the sum of every sample at `p.sums`. Needs as many
// doubles of scratch memory as pseudo_huber_scratch returns.
int64_t pseudo_huber_scratch(const PseudoHuber& p);
cudaError_t pseudo_huber(const PseudoHuber& p, void* loss, double* scratch, cudaStream_t stream);
cudaError_t pseudo_huber_gradient(const PseudoHuber& p, cudaStream_t stream);
// Both, with the same bits: in one launch and with one reading of the inputs where a sample fits on chip.
cudaError_t pseudo_huber_with_gradient(const PseudoHuber& p, void* loss, double* scratch, cudaStream_t stream);
cudaError_t scale_gradient(const KeptGradient& p, cudaStream_t stream);

// A step or a density: one number per sample at `g.results`, the next state, and gradients where they are wanted.
// Needs as many doubles of scratch memory as gaussian_scratch returns.
int64_t gaussian_scratch(const Gaussian& g);
cudaError_t gaussian(const Gaussian& g, double* scratch, cudaStream_t stream);
cudaError_t gaussian_gradient(const Gaussian& g, cudaStream_t stream);

// out[i] = the seed for another purpose, from seed i and data i.
cudaError_t fold_in(const Integer& seed, const Integer& data, int64_t* out, int64_t count, cudaStream_t stream);

}  // namespace cuda
}  // namespace bicm
