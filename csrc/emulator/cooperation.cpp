// Small kernels whose threads cooperate, correct and faulty, to test the emulator itself.
#define BICM_EMULATE 1
#define BICM_ISA emulated
#include "../core/half.h"
#include "../cuda/access.h"
#include "../cuda/cluster.h"
#include "arrays.h"

namespace bicm {
namespace emulator {
namespace {

using cuda::kAllLanes;
using cuda::kThreads;
using cuda::load_at;
using cuda::store_at;

struct Lines {
  const float* in;
  float* out;
  int64_t count;
};

void block_sum(const Lines& lines) {
  const float x = load_at(lines.in + threadIdx.x);
  const cuda::Sum<float> sum = cuda::block_sum(cuda::Sum<float>{x, 0.0f});
  if (threadIdx.x == 0) store_at(lines.out, static_cast<float>(cuda::value_of(sum)));
}

// out[i] = in[count - 1 - i], through shared memory.
template <bool Waits>
void reverse(const Lines& lines) {
  BICM_SHARED(float, line, 1024);
  const int i = static_cast<int>(threadIdx.x), last = static_cast<int>(lines.count) - 1;
  line[i] = load_at(lines.in + i);
  if (Waits) __syncthreads();
  store_at(lines.out + i, static_cast<float>(line[last - i]));
}

void barrier_of_some(const Lines& lines) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  store_at(lines.out + threadIdx.x, 1.0f);
}

void barriers_apart(const Lines& lines) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  store_at(lines.out + threadIdx.x, 1.0f);
}

void uninitialised(const Lines& lines) {
  BICM_SHARED(float, line, 1024);
  store_at(lines.out + threadIdx.x, static_cast<float>(line[static_cast<int>(threadIdx.x)]));
}

void all_write(const Lines& lines) {
  BICM_SHARED(float, line, 1);
  line[0] = load_at(lines.in);
}

void absent_lanes(const Lines& lines) {
  if (threadIdx.x % 2 == 0) return;
  store_at(lines.out + threadIdx.x, __shfl_xor_sync(kAllLanes, 1.0f, 1));
}

void missing_lane(const Lines& lines) { store_at(lines.out + threadIdx.x, __shfl_xor_sync(kAllLanes >> 1, 1.0f, 1)); }

void one_too_far(const Lines& lines) { store_at(lines.out + threadIdx.x, load_at(lines.in + threadIdx.x + 1)); }

// 1 where any of the warp's numbers is positive, 2 where all are, and their count above that.
void votes(const Lines& lines) {
  const bool positive = load_at(lines.in + threadIdx.x) > 0.0f;
  const unsigned ballot = __ballot_sync(kAllLanes, positive);
  const float any = __any_sync(kAllLanes, positive) ? 1.0f : 0.0f;
  const float all = __all_sync(kAllLanes, positive) ? 2.0f : 0.0f;
  store_at(lines.out + threadIdx.x, static_cast<float>(__builtin_popcount(ballot)) * 4.0f + any + all);
}

// Every block's first number, added up by the first thread of each.
void cluster_sum(const Lines& lines) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x;
  const double sum = cuda::cluster_sum(load_at(lines.in + first));
  if (threadIdx.x == 0) store_at(lines.out + first, static_cast<float>(sum));
}

enum class Fault { none, no_barrier, no_last_barrier, peer_too_far, of_some, no_wait, no_arrival, twice };

// out = the number of the next block, which its first thread wrote.
template <Fault fault>
void next_block(const Lines& lines) {
  BICM_SHARED(float, mine, 1);
  const unsigned rank = __clusterRelativeBlockRank(), blocks = __clusterSizeInBlocks();
  if (threadIdx.x == 0) mine[0] = load_at(lines.in + rank);
  if (fault == Fault::no_barrier) __syncthreads();
  if (fault == Fault::no_wait) return __cluster_barrier_arrive();
  if (fault == Fault::no_arrival) __cluster_barrier_wait();
  if (fault == Fault::twice) __cluster_barrier_arrive();
  if (fault != Fault::no_barrier && (fault != Fault::of_some || rank > 0)) cuda::cluster_barrier();
  const unsigned next = fault == Fault::peer_too_far ? rank + 1 : (rank + 1) % blocks;
  if (threadIdx.x == 0) store_at(lines.out + rank, cuda::of_peer(mine, next, 0));
  if (fault != Fault::no_last_barrier) cuda::cluster_barrier();
  if (threadIdx.x == 0) mine[0] = 0.0f;
}

// A block overwrites what another may still be reading.
void overwritten(const Lines& lines) {
  BICM_SHARED(float, mine, 1);
  const unsigned rank = __clusterRelativeBlockRank();
  if (threadIdx.x == 0) mine[0] = load_at(lines.in + rank);
  cuda::cluster_barrier();
  if (threadIdx.x == 0) store_at(lines.out + rank, cuda::of_peer(mine, 1 - rank, 0));
  __syncthreads();
  if (threadIdx.x == 0) mine[0] = 0.0f;
  cuda::cluster_barrier();
}

using Kernel = void (*)(const Lines&);

const std::vector<std::pair<std::string, Kernel>> kernels = {{"block_sum", block_sum},
                                                             {"reverse", reverse<true>},
                                                             {"missing_barrier", reverse<false>},
                                                             {"barrier_of_some", barrier_of_some},
                                                             {"barriers_apart", barriers_apart},
                                                             {"uninitialised", uninitialised},
                                                             {"all_write", all_write},
                                                             {"absent_lanes", absent_lanes},
                                                             {"missing_lane", missing_lane},
                                                             {"one_too_far", one_too_far},
                                                             {"votes", votes},
                                                             {"cluster_sum", cluster_sum},
                                                             {"next_block", next_block<Fault::none>},
                                                             {"no_barrier", next_block<Fault::no_barrier>},
                                                             {"no_last_barrier", next_block<Fault::no_last_barrier>},
                                                             {"peer_too_far", next_block<Fault::peer_too_far>},
                                                             {"of_some", next_block<Fault::of_some>},
                                                             {"no_wait", next_block<Fault::no_wait>},
                                                             {"no_arrival", next_block<Fault::no_arrival>},
                                                             {"twice", next_block<Fault::twice>},
                                                             {"overwritten", overwritten}};

void cooperate(const std::string& name, py::array_t<float, py::array::c_style> in,
               py::array_t<float, py::array::c_style> out, unsigned blocks, bool synchronises, unsigned cluster) {
  watch({});
  for (const auto* array : {&in, &out}) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(array->data());
    ranges.push_back({begin, begin + static_cast<uintptr_t>(array->nbytes())});
  }
  const unsigned threads = static_cast<unsigned>(in.size()) / (cluster > 1 ? blocks : 1);
  const cuda::Grid grid = {blocks, 1, threads, synchronises, cluster};
  for (const auto& [known, kernel] : kernels) {
    if (name != known) continue;
    const cudaError_t error = cuda::launch(kernel, grid, nullptr, Lines{in.data(), out.mutable_data(), in.size()});
    if (error != cudaSuccess) throw std::runtime_error("the launch returned an error");
    return;
  }
  throw py::value_error("no such kernel: " + name);
}

}  // namespace

void bind_cooperation(py::module_& module) {
  module.def("cooperate", &cooperate, py::arg("name"), py::arg("in"), py::arg("out"), py::arg("blocks") = 1,
             py::arg("synchronises") = true, py::arg("cluster") = 1);
}

}  // namespace emulator
}  // namespace bicm
