// Blocks that run together on GPUs that have clusters (sm_90 and later) and read one another's shared memory.
#pragma once

#include "block.h"

// Elsewhere the kernels that need them are not launched: bicm_kernels/architectures.py.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BICM_CLUSTERS 1
#endif

namespace bicm {
namespace cuda {

constexpr int kMaxCluster = 8;  // blocks, on every such GPU

inline cudaError_t has_clusters(bool& result) {
  int device, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, cudaDevAttrClusterLaunch, device);
  result = value != 0;
  return error;
}

#if defined(BICM_CLUSTERS)
// Every thread of the cluster must call this. Earlier writes are visible afterwards.
BICM_DEVICE void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// Another block's element of a shared array.
#if defined(BICM_EMULATE)
template <class T, int Count>
T of_peer(emulator::Shared<T, Count>& shared, unsigned rank, int i) {
  return shared.of_peer(rank, i);
}
#else
template <class T>
BICM_DEVICE T of_peer(const T* shared, unsigned rank, int i) {
  return static_cast<const T*>(__cluster_map_shared_rank(shared, rank))[i];
}
#endif

// The blocks' numbers added in the order of their ranks; every block's thread 0 has the sum.
BICM_DEVICE double cluster_sum(double number) {
  BICM_SHARED(double, mine, 1);
  if (threadIdx.x == 0) mine[0] = number;
  cluster_barrier();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (unsigned rank = 0; rank < __clusterSizeInBlocks(); ++rank) sum = sum + of_peer(mine, rank, 0);
  }
  cluster_barrier();  // no block exits or overwrites while others read
  return sum;
}
#endif

}  // namespace cuda
}  // namespace bicm
