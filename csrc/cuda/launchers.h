// The launchers of one library as another one calls them: a table of plain functions of a problem and its device's index.
// The CUDA library has one, which the Python module calls past torch's dispatcher without being linked with CUDA.
#pragma once

#include "../core/gaussian.h"
#include "../core/multistep.h"
#include "../core/noise.h"
#include "../core/pseudo_huber.h"
#include "../core/reversible.h"

namespace bicm {

// What both libraries have to be built with: a library that was left from other sources has problems of other sizes.
constexpr uint64_t mixed(uint64_t sum, uint64_t size) { return sum * 1000003 + size; }
constexpr uint64_t kLaunchersVersion = mixed(
    mixed(mixed(mixed(mixed(mixed(mixed(1, sizeof(Noise)), sizeof(NoisyPair)), sizeof(Multistep)), sizeof(Reversible)),
                sizeof(FixedPointDecode) + sizeof(KeptGradient)),
          sizeof(PseudoHuber)),
    sizeof(Gaussian));

constexpr char kLaunchersCapsule[] = "bicm_kernels.Launchers";

// Every launcher works on the device's current stream, waits for nothing, and returns 0 where it has launched; nothing
// is thrown. Results and scratch memory are given, as csrc/cuda/kernels.h says.
struct Launchers {
  uint64_t version;
  // The calling thread's; -1 where nobody knows.
  int32_t (*current_device)();

  int32_t (*noise)(const Noise& problem, int32_t device);
  int32_t (*noisy_pair)(const NoisyPair& problem, int32_t device);
  int32_t (*multistep)(const Multistep& problem, int32_t device);
  int32_t (*reversible)(const Reversible& problem, int32_t device);
  int32_t (*fixed_point_decode)(const FixedPointDecode& problem, int32_t device);

  int64_t (*gaussian_scratch)(const Gaussian& g);
  int32_t (*gaussian)(const Gaussian& g, double* scratch, int32_t device);

  int64_t (*pseudo_huber_scratch)(const PseudoHuber& p);
  int32_t (*pseudo_huber)(const PseudoHuber& p, void* loss, double* scratch, int32_t device);
  int32_t (*pseudo_huber_with_gradient)(const PseudoHuber& p, void* loss, double* scratch, int32_t device);
  int32_t (*pseudo_huber_gradient)(const PseudoHuber& p, int32_t device);
  int32_t (*scale_gradient)(const KeptGradient& p, int32_t device);
};

}  // namespace bicm
