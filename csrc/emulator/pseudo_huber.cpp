// Family pseudo_huber in `bicm_emulator`: CPU kernels by instruction set, and "cuda", the emulated CUDA kernels.
#define BICM_EMULATE 1
#define BICM_ISA emulated
#include "../cuda/pseudo_huber.cu"

#include "../cpu/kernels.h"
#include "arrays.h"

namespace bicm {
namespace emulator {
namespace {

using Doubles = py::array_t<double, py::array::c_style>;

template <class Code>
Code code_of(const std::string& name, const std::vector<const char*>& names) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Code>(i);
  }
  throw py::value_error("no such name: " + name);
}

struct Given {
  py::object prediction, target, x, t, u, sigma_data, sigma_min, c, weight;
  std::string parameterization;
  bool scaled;
  std::string kind, reduction;
  bool weighs;  // elements, not samples
  bool merge;
};

Given given_of(const py::dict& d) {
  return {d["prediction"],
          d["target"],
          d["x"],
          d["t"],
          d["u"],
          d["sigma_data"],
          d["sigma_min"],
          d["c"],
          d["weight"],
          d["parameterization"].cast<std::string>(),
          d["scaled"].cast<bool>(),
          d["kind"].cast<std::string>(),
          d["reduction"].cast<std::string>(),
          d["weighs"].cast<bool>(),
          d["merge"].cast<bool>()};
}

void watch_also(const py::array& array) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(array.data());
  ranges.push_back({begin, begin + static_cast<uintptr_t>(array.nbytes())});
}

// Fills all but the outputs; their views are laid out together with the inputs'.
PseudoHuber problem_of(const Given& g, const py::sequence& gradients) {
  PseudoHuber p = {};
  p.denoises = !g.x.is_none();
  Views views = {{view_of(g.prediction), &p.prediction}, {view_of(g.target), &p.target}};
  if (p.denoises) views.push_back({view_of(g.x), &p.x});
  for (const auto& view : views) p.float64 = p.float64 || view.first.dtype == DType::float64;
  for (size_t k = 0; k < gradients.size(); ++k) {
    p.wanted[k] = !gradients[k].is_none();
    if (p.wanted[k]) views.push_back({view_of(gradients[k]), &p.gradient[k]});
  }
  py::object weight = g.weight.is_none() ? py::object(py::float_(1.0)) : g.weight;
  if (g.weighs) {
    p.weighs = true;
    views.push_back({view_of(weight), &p.element_weight});
    weight = py::float_(1.0);
  }
  lay_out(views, g.merge, p.layout);
  const int64_t batch = p.layout.batch;
  p.parameterization = code_of<Parameterization>(g.parameterization, {"bcm", "cm", "edm"});
  p.scaled = g.scaled;
  p.distance = code_of<Distance>(g.kind, {"vector", "elementwise", "squared"});
  p.reduction = code_of<Reduction>(g.reduction, {"mean", "sum", "none"});
  p.t = number_of(g.t, batch);
  p.u = number_of(g.u, batch);
  p.sigma_data = number_of(g.sigma_data, batch);
  p.sigma_min = number_of(g.sigma_min, batch);
  p.given_c = !g.c.is_none();
  p.c = number_of(g.c, batch);
  p.weight = number_of(weight, batch);
  return p;
}

const Kernels& kernels_of(const std::string& target) {
  const Kernels* kernels = find_kernels(target.c_str());
  if (kernels == nullptr || target.empty()) throw py::value_error("this processor has no instruction set " + target);
  return *kernels;
}

using CudaLoss = cudaError_t (*)(const PseudoHuber&, void*, double*, cudaStream_t);

void run_cuda(CudaLoss launch, const PseudoHuber& p, py::array& loss, const Doubles& sums) {
  // Poison the output: its previous contents must not matter.
  std::vector<double> scratch(static_cast<size_t>(cuda::pseudo_huber_scratch(p)), -1.0);
  watch_also(loss);
  watch_also(sums);
  ranges.push_back(
      {reinterpret_cast<uintptr_t>(scratch.data()), reinterpret_cast<uintptr_t>(scratch.data() + scratch.size())});
  const cudaError_t error = launch(p, loss.mutable_data(), scratch.data(), nullptr);
  if (error != cudaSuccess) throw std::runtime_error("a loss returned an error");
}

using CpuLoss = void (*)(const PseudoHuber&, int64_t, int64_t);

void run_cpu(CpuLoss kernel, PseudoHuber& p, double* sums) {
  const int64_t chunks = sum_chunks(p.layout), items = p.layout.batch * chunks;
  std::vector<double> partial(static_cast<size_t>(items));
  p.sums = partial.data();
  kernel(p, 0, items);
  for (int64_t sample = 0; sample < p.layout.batch; ++sample) {
    double total = 0.0;
    for (int64_t i = 0; i < chunks; ++i)
      total = (p.float64 ? add_sums<double> : add_sums<float>)(p, total, partial[sample * chunks + i]);
    sums[sample] = total;
  }
  p.sums = sums;
}

// The sum of every sample, and with target "cuda" the loss too.
void pseudo_huber(const std::string& target, py::array loss, Doubles sums, const py::dict& arguments) {
  PseudoHuber p = problem_of(given_of(arguments), py::tuple());
  p.sums = sums.mutable_data();
  if (target == "cuda") return run_cuda(cuda::pseudo_huber, p, loss, sums);
  run_cpu(kernels_of(target).pseudo_huber, p, sums.mutable_data());
}

// The same with gradients, for an upstream of 1.
void pseudo_huber_with_gradient(const std::string& target, py::array loss, const py::sequence& gradients, Doubles sums,
                                const py::dict& arguments) {
  PseudoHuber p = problem_of(given_of(arguments), gradients);
  p.sums = sums.mutable_data();
  p.upstream = {1.0, nullptr, 0, DType::float64};
  if (target == "cuda") return run_cuda(cuda::pseudo_huber_with_gradient, p, loss, sums);
  const Kernels& kernels = kernels_of(target);
  const bool at_once = gradient_follows_sum(p);
  run_cpu(at_once ? kernels.pseudo_huber_with_gradient : kernels.pseudo_huber, p, sums.mutable_data());
  if (!at_once) kernels.pseudo_huber_gradient(p, 0, p.layout.batch * units_per_sample(p.layout));
}

void pseudo_huber_gradient(const std::string& target, const py::sequence& gradients, Doubles sums, py::object upstream,
                           const py::dict& arguments) {
  PseudoHuber p = problem_of(given_of(arguments), gradients);
  p.sums = sums.mutable_data();
  p.upstream = number_of(upstream, p.layout.batch);
  watch_also(sums);
  if (target != "cuda") {
    kernels_of(target).pseudo_huber_gradient(p, 0, p.layout.batch * units_per_sample(p.layout));
    return;
  }
  const cudaError_t error = cuda::pseudo_huber_gradient(p, nullptr);
  if (error != cudaSuccess) throw std::runtime_error("cuda::pseudo_huber_gradient returned an error");
}

// In place.
void scale_gradient(const std::string& target, py::object gradient, py::object upstream) {
  KeptGradient p = {};
  lay_out({{view_of(gradient), &p.gradient}}, true, p.layout);
  p.upstream = number_of(upstream, p.layout.batch);
  if (target != "cuda") {
    kernels_of(target).scale_gradient(p, 0, p.layout.batch * units_per_sample(p.layout));
    return;
  }
  const cudaError_t error = cuda::scale_gradient(p, nullptr);
  if (error != cudaSuccess) throw std::runtime_error("cuda::scale_gradient returned an error");
}

}  // namespace

void bind_pseudo_huber(py::module_& module) {
  module.attr("SUM_CHUNK") = cuda::kSumChunk;
  module.def("pseudo_huber", &pseudo_huber, py::arg("target"), py::arg("loss"), py::arg("sums"), py::arg("arguments"));
  module.def("pseudo_huber_gradient", &pseudo_huber_gradient, py::arg("target"), py::arg("gradients"), py::arg("sums"),
             py::arg("upstream"), py::arg("arguments"));
  module.def("pseudo_huber_with_gradient", &pseudo_huber_with_gradient, py::arg("target"), py::arg("loss"),
             py::arg("gradients"), py::arg("sums"), py::arg("arguments"));
  module.def("scale_gradient", &scale_gradient, py::arg("target"), py::arg("gradient"), py::arg("upstream"));
}

}  // namespace emulator
}  // namespace bicm
