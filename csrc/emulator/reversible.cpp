// Family reversible in `bicm_emulator`: CPU kernels by instruction set, and "cuda", the emulated CUDA kernels.
#define BICM_EMULATE 1
#define BICM_ISA emulated
#include "../cuda/reversible.cu"

#include "../cpu/kernels.h"
#include "arrays.h"

namespace bicm {
namespace emulator {
namespace {

template <class Problem>
using CudaKernel = cudaError_t (*)(const Problem&, cudaStream_t);
template <class Problem>
using CpuKernel = void (*Kernels::*)(const Problem&, int64_t, int64_t);

template <class Problem>
void run_on(const std::string& target, const Problem& p, CudaKernel<Problem> cuda, CpuKernel<Problem> cpu,
            const Units& units) {
  if (target == "cuda") {
    if (cuda(p, nullptr) != cudaSuccess) throw std::runtime_error("the CUDA kernel returned an error");
    return;
  }
  const Kernels* kernels = find_kernels(target.c_str());
  if (kernels == nullptr || target.empty()) throw py::value_error("this processor has no instruction set " + target);
  run_units(kernels->*cpu, p, p.layout.batch * units_per_sample(p.layout), units);
}

// A (B,) array that kernels may write.
void note_in(Reversible& p, const py::array_t<int64_t>& overflow, py::handle mark) {
  if (overflow.ndim() != 1 || overflow.shape(0) != p.layout.batch) throw py::value_error("overflow must be (B,)");
  p.overflow = const_cast<int64_t*>(overflow.data());
  p.overflow_stride = overflow.strides(0) / 8;
  p.mark = integer_of(mark, p.layout.batch);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p.overflow);
  ranges.push_back({begin, begin + static_cast<uintptr_t>(8 * ((p.layout.batch - 1) * p.overflow_stride + 1))});
}

void reversible(const std::string& target, py::object out, const py::sequence& inputs, const py::sequence& coefficients,
                const std::string& form, bool inverse, py::object last, py::object info, py::object info_out,
                py::object conditional, py::object guidance_scale, py::object n, py::object m, int32_t fraction_bits,
                py::object overflow, py::object mark, bool merge, bool streams, const Units& units) {
  if (inputs.size() < 1 || inputs.size() > kMaxTerms || coefficients.size() > kMaxTerms) {
    throw py::value_error("1 to 5 inputs and coefficients");
  }
  Reversible p = {};
  p.steps = !last.is_none();
  p.inverse = inverse;
  p.terms = static_cast<int32_t>(inputs.size());
  p.increment = form == "bdia" ? Increment::bdia : Increment::affine;
  p.fraction_bits = fraction_bits;
  p.guided = !conditional.is_none();
  p.multiplies = !info_out.is_none();

  Views views;
  for (size_t k = 0; k < inputs.size(); ++k) views.push_back({view_of(inputs[k]), &p.input[k]});
  if (p.guided) views.push_back({view_of(conditional), &p.conditional});
  if (p.steps) views.push_back({view_of(last), &p.last});
  if (p.multiplies) views.push_back({view_of(info), &p.info});
  const size_t first_output = views.size();
  views.push_back({view_of(out), &p.out});
  if (p.multiplies) views.push_back({view_of(info_out), &p.info_out});
  lay_out(views, merge, p.layout);
  for (size_t i = first_output; i < views.size(); ++i) views[i].second->streams = streams;

  const int64_t batch = p.layout.batch;
  for (size_t k = 0; k < coefficients.size(); ++k) p.coefficient[k] = number_of(coefficients[k], batch);
  p.guidance_scale = number_of(guidance_scale, batch);
  if (p.multiplies) {
    p.n = integer_of(n, batch);
    p.m = integer_of(m, batch);
  }
  if (!overflow.is_none()) note_in(p, overflow.cast<py::array_t<int64_t>>(), mark);
  run_on(target, p, cuda::reversible, &Kernels::reversible, units);
}

void fixed_point_decode(const std::string& target, py::object out, py::object q, int32_t fraction_bits, bool merge,
                        bool streams, const Units& units) {
  FixedPointDecode p = {};
  p.fraction_bits = fraction_bits;
  lay_out({{view_of(q), &p.q}, {view_of(out), &p.out}}, merge, p.layout);
  p.out.streams = streams;
  run_on(target, p, cuda::fixed_point_decode, &Kernels::fixed_point_decode, units);
}

}  // namespace

void bind_reversible(py::module_& module) {
  module.def("reversible", &reversible, py::arg("target"), py::arg("out"), py::arg("inputs"), py::arg("coefficients"),
             py::kw_only(), py::arg("form") = "affine", py::arg("inverse") = false, py::arg("last") = py::none(),
             py::arg("info") = py::none(), py::arg("info_out") = py::none(), py::arg("conditional") = py::none(),
             py::arg("guidance_scale") = py::none(), py::arg("n") = 1, py::arg("m") = 1, py::arg("fraction_bits") = 32,
             py::arg("overflow") = py::none(), py::arg("mark") = 1, py::arg("merge") = true, py::arg("streams") = false,
             py::arg("units") = py::none());
  module.def("fixed_point_decode", &fixed_point_decode, py::arg("target"), py::arg("out"), py::arg("q"), py::kw_only(),
             py::arg("fraction_bits") = 32, py::arg("merge") = true, py::arg("streams") = false,
             py::arg("units") = py::none());
}

}  // namespace emulator
}  // namespace bicm
