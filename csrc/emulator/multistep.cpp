// Family multistep in `bicm_emulator`: CPU kernels by instruction set, and "cuda", the emulated CUDA kernels.
#define BICM_EMULATE 1
#define BICM_ISA emulated
#include "../cuda/multistep.cu"

#include "../cpu/kernels.h"
#include "arrays.h"

namespace bicm {
namespace emulator {
namespace {

Form form_of(const std::string& name) {
  static const std::pair<const char*, Form> forms[] = {{"affine", Form::affine},
                                                       {"bdia", Form::bdia},
                                                       {"bdia_inverse", Form::bdia_inverse},
                                                       {"bcm", Form::bcm},
                                                       {"cm", Form::cm},
                                                       {"bcm_scaled", Form::bcm_scaled},
                                                       {"cm_scaled", Form::cm_scaled},
                                                       {"input", Form::input}};
  for (const auto& [known, form] : forms) {
    if (name == known) return form;
  }
  throw py::value_error("no such form: " + name);
}

void numbers_of(const py::sequence& values, int64_t batch, Number* into) {
  if (values.size() > kMaxTerms) throw py::value_error("at most 5 coefficients");
  for (size_t k = 0; k < values.size(); ++k) into[k] = number_of(values[k], batch);
}

void multistep(const std::string& target, py::object out, const py::sequence& inputs, const py::sequence& coefficients,
               const std::string& form, py::object conditional, py::object guidance_scale, py::object noise_weight,
               py::object seed, py::object step, py::object sample, bool counts, py::object x0, py::object next,
               const py::sequence& x0_coefficients, py::object x0_weight, py::object clip, py::object next_scale,
               bool takes_second, bool next_scale_is_sigma, bool merge, bool streams, std::optional<bool> float64,
               const Units& units) {
  if (inputs.size() < 1 || inputs.size() > kMaxTerms) throw py::value_error("1 to 5 inputs");
  Multistep m = {};
  m.terms = static_cast<int32_t>(inputs.size());
  m.form = form_of(form);
  m.takes_second = takes_second;
  m.next_scale_is_sigma = next_scale_is_sigma;
  m.guided = !conditional.is_none();
  m.draws = !noise_weight.is_none();
  m.denoises = !x0.is_none();
  m.clips = !clip.is_none();
  m.scales = !next.is_none();

  Views views;
  for (size_t k = 0; k < inputs.size(); ++k) views.push_back({view_of(inputs[k]), &m.input[k]});
  if (m.guided) views.push_back({view_of(conditional), &m.conditional});
  const size_t first_output = views.size();
  for (const auto& view : views) m.float64 = m.float64 || view.first.dtype == DType::float64;
  m.float64 = float64.value_or(m.float64);
  views.push_back({view_of(out), &m.out});
  if (m.denoises) views.push_back({view_of(x0), &m.x0});
  if (m.scales) views.push_back({view_of(next), &m.next});
  lay_out(views, merge, m.layout);
  for (size_t i = first_output; i < views.size(); ++i) views[i].second->streams = streams;

  const int64_t batch = m.layout.batch;
  numbers_of(coefficients, batch, m.coefficient);
  numbers_of(x0_coefficients, batch, m.x0_coefficient);
  m.guidance_scale = number_of(guidance_scale, batch);
  m.noise_weight = number_of(noise_weight, batch);
  m.x0_weight = number_of(x0_weight, batch);
  m.clip = number_of(clip, batch);
  m.next_scale = number_of(next_scale, batch);
  m.key = key_of(seed, step, sample, counts, batch);

  if (target == "cuda") {
    if (cuda::multistep(m, nullptr) != cudaSuccess) throw std::runtime_error("cuda::multistep returned an error");
    return;
  }
  const Kernels* kernels = find_kernels(target.c_str());
  if (kernels == nullptr || target.empty()) throw py::value_error("this processor has no instruction set " + target);
  run_units(kernels->multistep, m, batch * units_per_sample(m.layout), units);
}

}  // namespace

void bind_multistep(py::module_& module) {
  // How kernels on any strides divide: a position below 2^31 by a size.
  module.def("quotient", [](uint32_t position, int64_t size) {
    const int64_t rest = cuda::take_index(false, cuda::reciprocal_of(size), size, position);
    return std::make_pair(position, rest);
  });
  module.def("multistep", &multistep, py::arg("target"), py::arg("out"), py::arg("inputs"), py::arg("coefficients"),
             py::kw_only(), py::arg("form") = "affine", py::arg("conditional") = py::none(),
             py::arg("guidance_scale") = py::none(), py::arg("noise_weight") = py::none(), py::arg("seed") = 0,
             py::arg("step") = 0, py::arg("sample") = 0, py::arg("counts") = true, py::arg("x0") = py::none(),
             py::arg("next") = py::none(), py::arg("x0_coefficients") = py::tuple(), py::arg("x0_weight") = 0.0,
             py::arg("clip") = py::none(), py::arg("next_scale") = py::none(), py::arg("takes_second") = false,
             py::arg("next_scale_is_sigma") = false, py::arg("merge") = true, py::arg("streams") = false,
             py::arg("float64") = py::none(), py::arg("units") = py::none());
}

}  // namespace emulator
}  // namespace bicm
