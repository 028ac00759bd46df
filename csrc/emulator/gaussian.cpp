// Family gaussian in `bicm_emulator`: CPU kernels by instruction set, and "cuda", the emulated CUDA kernels.
#define BICM_EMULATE 1
#define BICM_ISA emulated
#include "../cuda/gaussian.cu"

#include "../cpu/kernels.h"
#include "arrays.h"

namespace bicm {
namespace emulator {
namespace {

// Of the mean; `other`: the next state, which a step writes, or the reference's tensors.
Gaussian problem_of(const py::dict& d, const py::sequence& gradients) {
  const py::sequence inputs = d["inputs"], weights = d["weights"], references = d["references"];
  if (inputs.size() < 1 || inputs.size() > kMaxTerms || weights.size() != inputs.size()) {
    throw py::value_error("1 to 5 inputs, and as many weights");
  }
  Gaussian g = {};
  g.terms = static_cast<int32_t>(inputs.size());
  g.steps = d["steps"].cast<bool>();
  g.diverges = references.size() > 0;
  g.guided = !d["conditional"].is_none();
  g.adds_up = d["adds_up"].cast<bool>();
  Views views;
  for (size_t k = 0; k < references.size(); ++k) views.push_back({view_of(references[k]), &g.reference[k]});
  if (!g.diverges) views.push_back({view_of(d["next"]), g.steps ? &g.out : &g.next});
  for (size_t k = 0; k < inputs.size(); ++k) views.push_back({view_of(inputs[k]), &g.input[k]});
  if (g.guided) views.push_back({view_of(d["conditional"]), &g.conditional});
  for (const auto& view : views) g.float64 = g.float64 || view.first.dtype == DType::float64;
  for (size_t k = 0; k < gradients.size(); ++k) {
    g.wanted[k] = !gradients[k].is_none();
    g.differentiates = g.differentiates || g.wanted[k];
    if (g.wanted[k]) views.push_back({view_of(gradients[k]), &g.gradient[k]});
  }
  lay_out(views, d["merge"].cast<bool>(), g.layout);
  const int64_t batch = g.layout.batch;
  for (size_t k = 0; k < weights.size(); ++k) g.coefficient[k] = number_of(weights[k], batch);
  g.guidance_scale = number_of(d["guidance_scale"], batch);
  g.noise_weight = number_of(d["std"], batch);
  g.draws = g.steps;
  g.key = key_of(d["seed"], d["step"], d["sample"], true, batch);
  g.upstream = number_of(d["upstream"], batch);
  return g;
}

const Kernels& kernels_of(const std::string& target) {
  const Kernels* kernels = find_kernels(target.c_str());
  if (kernels == nullptr || target.empty()) throw py::value_error("this processor has no instruction set " + target);
  return *kernels;
}

void watch_also(const void* data, size_t bytes) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  ranges.push_back({begin, begin + bytes});
}

template <class C>
void finish(const Gaussian& g, const std::vector<double>& totals, C* results) {
  const size_t chunks = static_cast<size_t>(sum_chunks(g.layout));
  for (size_t sample = 0; sample < static_cast<size_t>(g.layout.batch); ++sample) {
    double total = 0.0;
    for (size_t i = 0; i < chunks; ++i) total = total + totals[sample * chunks + i];
    results[sample] = static_cast<C>(density_of<C>(g, static_cast<int64_t>(sample), total));
  }
}

// One number per sample, in the compute type; with gradients, for the given upstream.
void gaussian(const std::string& target, py::array results, const py::sequence& gradients, const py::dict& arguments) {
  Gaussian g = problem_of(arguments, gradients);
  g.results = results.mutable_data();
  if (target == "cuda") {
    // Poison the output: its previous contents must not matter.
    std::vector<double> scratch(static_cast<size_t>(cuda::gaussian_scratch(g)), -1.0);
    watch_also(g.results, static_cast<size_t>(results.nbytes()));
    watch_also(scratch.data(), scratch.size() * sizeof(double));
    if (cuda::gaussian(g, scratch.data(), nullptr) != cudaSuccess) {
      throw std::runtime_error("cuda::gaussian returned an error");
    }
    return;
  }
  const Kernels& kernels = kernels_of(target);
  const int64_t items = g.layout.batch * sum_chunks(g.layout);
  std::vector<double> totals(static_cast<size_t>(items));
  g.totals = totals.data();
  (g.differentiates ? kernels.gaussian_with_gradient : kernels.gaussian)(g, 0, items);
  g.float64 ? finish(g, totals, static_cast<double*>(g.results)) : finish(g, totals, static_cast<float*>(g.results));
}

void gaussian_gradient(const std::string& target, const py::sequence& gradients, const py::dict& arguments) {
  const Gaussian g = problem_of(arguments, gradients);
  if (target != "cuda") {
    kernels_of(target).gaussian_gradient(g, 0, g.layout.batch * units_per_sample(g.layout));
    return;
  }
  if (cuda::gaussian_gradient(g, nullptr) != cudaSuccess) {
    throw std::runtime_error("cuda::gaussian_gradient returned an error");
  }
}

}  // namespace

void bind_gaussian(py::module_& module) {
  module.attr("GAUSSIAN_CHUNK") = cuda::kGaussianChunk;
  module.def("gaussian", &gaussian, py::arg("target"), py::arg("results"), py::arg("gradients"), py::arg("arguments"));
  module.def("gaussian_gradient", &gaussian_gradient, py::arg("target"), py::arg("gradients"), py::arg("arguments"));
}

}  // namespace emulator
}  // namespace bicm
