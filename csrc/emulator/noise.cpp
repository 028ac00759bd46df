// Family noise in `bicm_emulator`: CPU kernels by instruction set, and "cuda", the emulated CUDA kernels.
#define BICM_EMULATE 1
#define BICM_ISA emulated
#include "../cuda/noise.cu"

#include "../cpu/kernels.h"
#include "arrays.h"
#include "polynomials.h"
#include "probes.h"

namespace bicm {
namespace emulator {
namespace {

const Kernels& kernels_of(const std::string& target) {
  const Kernels* kernels = find_kernels(target.c_str());
  if (kernels == nullptr || target.empty()) throw py::value_error("this processor has no instruction set " + target);
  return *kernels;
}

Probes probes(const std::string& target) { return probes_of(kernels_of(target).name); }

void noise(const std::string& target, py::object out, py::object seed, py::object step, py::object sample, bool counts,
           const std::string& distribution, bool merge, bool streams, const Units& units) {
  Noise problem = {};
  lay_out({{view_of(out), &problem.out}}, merge, problem.layout);
  problem.out.streams = streams;
  problem.distribution = distribution == "normal" ? Distribution::normal : Distribution::uniform;
  problem.key = key_of(seed, step, sample, counts, problem.layout.batch);
  if (target == "cuda") {
    if (cuda::noise(problem, nullptr) != cudaSuccess) throw std::runtime_error("cuda::noise returned an error");
  } else {
    run_units(kernels_of(target).noise, problem, problem.layout.batch * units_per_sample(problem.layout), units);
  }
}

void noisy_pair(const std::string& target, py::object low, py::object high, py::object x, py::object sigma_low,
                py::object sigma_high, py::object x_hat, py::object mask, py::object sigma_data, py::object seed,
                py::object step, py::object sample, bool counts, bool merge, bool streams, const Units& units,
                py::object F, py::object end, bool to_least, bool scales) {
  NoisyPair p = {};
  p.generates = !F.is_none();
  p.to_least = to_least;
  const View first = view_of(x);
  View other = view_of(p.generates ? F : x_hat.is_none() ? x : x_hat);
  watch({{other, nullptr}});
  const auto watched = ranges.back();
  const int64_t others = other.sizes.at(0);
  if (p.generates) other.sizes[0] = first.sizes.at(0);
  lay_out({{first, &p.x}, {other, &p.x_hat}, {view_of(low), &p.low}, {view_of(high), &p.high}}, merge, p.layout);
  ranges[1] = watched;  // x_hat has a size of its own
  const int64_t batch = p.layout.batch;
  p.low.streams = p.high.streams = streams;
  p.float64 = p.x.dtype == DType::float64 || p.x_hat.dtype == DType::float64;
  p.end = number_of(end, batch);
  p.sigma_low = number_of(sigma_low, batch);
  p.sigma_high = number_of(sigma_high, batch);
  p.scales = scales && !sigma_data.is_none();
  p.sigma_data = number_of(sigma_data, batch);
  p.key = key_of(seed, step, sample, counts, batch);
  if (!mask.is_none()) {
    const auto numbers = py::reinterpret_borrow<py::array>(mask);
    if (numbers.ndim() != 1 || numbers.shape(0) != batch) throw py::value_error("mask must be (B,)");
    const int64_t size = numbers.itemsize();
    if (py::isinstance<py::array_t<bool, 0>>(mask)) {
      p.mask = static_cast<const bool*>(numbers.data());
    } else if (py::isinstance<py::array_t<int64_t, 0>>(mask)) {
      p.places = static_cast<const int64_t*>(numbers.data());
      p.last_place = others - 1;
    } else {
      throw py::type_error("mask must be a bool or int64 array");
    }
    p.mask_stride = numbers.strides(0) / size;
    const int64_t first = reinterpret_cast<int64_t>(numbers.data()), last = first + (batch - 1) * numbers.strides(0);
    ranges.push_back({static_cast<uintptr_t>(first < last ? first : last),
                      static_cast<uintptr_t>((first < last ? last : first) + size)});
  }
  if (target == "cuda") {
    if (cuda::noisy_pair(p, nullptr) != cudaSuccess) throw std::runtime_error("cuda::noisy_pair returned an error");
  } else {
    run_units(kernels_of(target).noisy_pair, p, batch * units_per_sample(p.layout), units);
  }
}

void fold_in_all(py::object seed, py::object data, py::array_t<int64_t, py::array::c_style> out) {
  const int64_t count = out.size();
  ranges.clear();
  ranges.push_back({reinterpret_cast<uintptr_t>(out.data()), reinterpret_cast<uintptr_t>(out.data() + count)});
  const cudaError_t error =
      cuda::fold_in(integer_of(seed, count), integer_of(data, count), out.mutable_data(), count, nullptr);
  if (error != cudaSuccess) throw std::runtime_error("cuda::fold_in returned an error");
}

void philox_emulated(int64_t seed, const uint32_t* counters, uint32_t* words, int64_t count) {
  for (int64_t i = 0; i < 4 * count; i += 4) {
    const Quad<uint32_t> counter = {{counters[i], counters[i + 1], counters[i + 2], counters[i + 3]}};
    const Quad<uint32_t> result = bicm::philox(counter, make_key(seed));
    for (int lane = 0; lane < 4; ++lane) words[i + lane] = result.lane[lane];
  }
}

py::array philox(const std::string& target, int64_t seed, py::array_t<uint32_t, py::array::c_style> counters) {
  if (counters.ndim() != 2 || counters.shape(1) != 4) throw py::value_error("counters must be (n, 4)");
  py::array_t<uint32_t> words({counters.shape(0), py::ssize_t{4}});
  const auto kernel = target == "cuda" ? philox_emulated : probes(target).philox_all;
  kernel(seed, counters.data(), words.mutable_data(), counters.shape(0));
  return words;
}

void log_emulated(const float* u, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = minus_two_log<0>(u[i]) * -0.5f;
}

void cos_sin_emulated(const float* u, float* cosine, float* sine, int64_t count) {
  for (int64_t i = 0; i < count; ++i) cos_sin_quarters(u[i] * 4.0f, cosine[i], sine[i]);
}

// A logarithm has one result; the second is zero.
Evaluate evaluator(const std::string& target, const std::string& function) {
  const bool cuda = target == "cuda";
  if (function != "log") return cuda ? cos_sin_emulated : probes(target).cos_sin_all;
  const auto log = cuda ? log_emulated : probes(target).log_all;
  return [log](const float* u, float* first, float* second, int64_t count) {
    log(u, first, count);
    for (int64_t i = 0; i < count; ++i) second[i] = 0.0f;
  };
}

double logarithm(double u) { return ::log(u); }

Reference reference_of(const std::string& function) {
  if (function == "log") return {0, logarithm};
  return function == "cos" ? Reference{0, cosine_of_turns} : Reference{1, sine_of_turns};
}

std::pair<double, float> polynomial_error(const std::string& target, const std::string& function, uint32_t low,
                                          uint32_t high, uint32_t stride) {
  const Worst worst = worst_error(evaluator(target, function), reference_of(function), low, high, stride);
  return {worst.ulps, worst.at};
}

int64_t polynomial_differences(const std::string& a, const std::string& b, const std::string& function, uint32_t low,
                               uint32_t high, uint32_t stride) {
  return differences(evaluator(a, function), evaluator(b, function), low, high, stride);
}

py::array evaluate(const std::string& target, const std::string& function, py::array_t<float, py::array::c_style> u) {
  py::array_t<float> first(u.size()), second(u.size());
  evaluator(target, function)(u.data(), first.mutable_data(), second.mutable_data(), u.size());
  return function == "sin" ? second : first;
}

}  // namespace

void bind_noise(py::module_& module) {
  module.def("noise", &noise, py::arg("target"), py::arg("out"), py::kw_only(), py::arg("seed"), py::arg("step") = 0,
             py::arg("sample") = 0, py::arg("counts") = true, py::arg("distribution") = "normal",
             py::arg("merge") = true, py::arg("streams") = false, py::arg("units") = py::none());
  module.def("noisy_pair", &noisy_pair, py::arg("target"), py::arg("low"), py::arg("high"), py::arg("x"),
             py::arg("sigma_low"), py::arg("sigma_high"), py::kw_only(), py::arg("x_hat") = py::none(),
             py::arg("mask") = py::none(), py::arg("sigma_data") = py::none(), py::arg("seed") = 0, py::arg("step") = 0,
             py::arg("sample") = 0, py::arg("counts") = true, py::arg("merge") = true, py::arg("streams") = false,
             py::arg("units") = py::none(), py::arg("F") = py::none(), py::arg("end") = 0.0, py::arg("cm") = false,
             py::arg("scales") = true);
  module.def("fold_in", &fold_in_all, py::arg("seed"), py::arg("data"), py::arg("out"));
  module.def("philox", &philox, py::arg("target"), py::arg("seed"), py::arg("counters"));
  module.def("evaluate", &evaluate, py::arg("target"), py::arg("function"), py::arg("u"));
  module.def("polynomial_error", &polynomial_error, "The largest error in ulp over a range of bit patterns, and where",
             py::arg("target"), py::arg("function"), py::arg("low"), py::arg("high"), py::arg("stride") = 1);
  module.def("polynomial_differences", &polynomial_differences, "How many results of two targets differ in a bit",
             py::arg("a"), py::arg("b"), py::arg("function"), py::arg("low"), py::arg("high"), py::arg("stride") = 1);
}

}  // namespace emulator
}  // namespace bicm
