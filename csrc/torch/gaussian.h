// The ops of the gaussian family for any device: a step with its log-probability, and densities with their gradients.
#pragma once

#include <tuple>

#include "../core/gaussian.h"
#include "multistep.h"

namespace bicm {

inline void check_deviation(const Gaussian& g) {
  const Number& s = g.noise_weight;
  STD_TORCH_CHECK(s.data != nullptr || s.value >= 0.0, "bicm_kernels: std must not be negative");
}

inline DType compute_type_of(const Gaussian& g) { return g.float64 ? DType::float64 : DType::float32; }

template <class Device>
struct GaussianStep {
  template <class A>
  static std::tuple<typename A::Tensor, typename A::Tensor> run(typename A::Tensors tensors,
                                                                typename A::Coefficients weights,
                                                                typename A::Guidance guidance_scale,
                                                                typename A::Coefficient std, bool adds_up,
                                                                typename A::Seed seed, typename A::Counter at,
                                                                typename A::Counter sample_id) {
    Step<A> step(tensors, terms_of<Form::affine>(weights));
    prepare<Form::affine, A>(step, weights, guidance_scale);
    step.m.noise_weight = given(step, std);
    draw_noise(step, std, seed, at, sample_id);
    auto next = step.output(step.m.out);
    step.place(true, true);
    Gaussian g = {};
    static_cast<Multistep&>(g) = step.m;
    g.steps = true;
    g.adds_up = adds_up;
    check_deviation(g);
    auto log_prob = row_like(tensors[0], g.layout.batch, compute_type_of(g));
    g.results = view_of(log_prob).data;
    if (g.layout.batch > 0) Device::run(g, tensors[0]);
    return {std::move(next), std::move(log_prob)};
  }
};

// A density's operands: a given state and the mean of the other tensors; or two means with the same weights.
class Density {
 public:
  Density(const Tensors& tensors, size_t terms, bool diverges, bool adds_up) : tensors_(tensors) {
    const size_t count = tensors.size();
    const bool fits = diverges ? count == 2 * terms : count == terms + 1 || count == terms + 2;
    STD_TORCH_CHECK(terms >= 1 && terms <= kMaxTerms && fits, "bicm_kernels: wrong number of tensors or weights");
    g.terms = static_cast<int32_t>(terms);
    g.diverges = diverges;
    g.adds_up = adds_up;
    g.guided = !diverges && count == terms + 2;
    const size_t given = diverges ? terms : 1;
    for (size_t i = 0; i < count; ++i) {
      const View& view = views_[i] = view_of(tensors[i]);
      const bool agrees = view.dim > 0 && same_sizes(view, views_[0]) && view.device == views_[0].device;
      STD_TORCH_CHECK(agrees, "bicm_kernels: tensors differ in shape or device");
      g.float64 = g.float64 || view.dtype == DType::float64;
      Operand& of_mean = i < given + terms ? g.input[i < given ? 0 : i - given] : g.conditional;
      add(view, i >= given ? of_mean : diverges ? g.reference[i] : g.next);
    }
  }

  Number number(double value) const { return number_of(value); }
  Number number(const Tensor& value) const { return number_of(value, views_[0].sizes[0], views_[0].device); }
  Number number(const std::optional<Tensor>& value) const {
    return value.has_value() ? number(*value) : number_of(0.0);
  }

  template <class Device>
  Tensor value() {
    merge_all();
    return result<Device>();
  }

  // The density, and the gradients of `needs` for an upstream of 1.
  template <class Device>
  std::tuple<Tensor, std::vector<Tensor>> value_and_gradients(int64_t needs) {
    g.upstream = number_of(1.0);
    std::vector<Tensor> results = outputs(needs);
    Tensor value = result<Device>();
    return {std::move(value), std::move(results)};
  }

  // The gradients of the tensors whose bit is set in `needs`, in order.
  template <class Device>
  std::vector<Tensor> gradients(const Tensor& upstream, int64_t needs) {
    STD_TORCH_CHECK(upstream.dim() == 1, "bicm_kernels: the gradient must have the shape of the result");
    g.upstream = number(upstream);
    std::vector<Tensor> results = outputs(needs);
    if (g.layout.batch > 0 && g.layout.elements > 0 && !results.empty()) Device::gradients(g, tensors_[0]);
    return results;
  }

  Gaussian g = {};

 private:
  template <class Device>
  Tensor result() {
    Tensor value = row_like(tensors_[0], g.layout.batch, compute_type_of(g));
    g.results = value.data_ptr();
    if (g.layout.batch > 0) Device::run(g, tensors_[0]);
    return value;
  }

  std::vector<Tensor> outputs(int64_t needs) {
    std::vector<Tensor> results;
    const int inputs = used_;
    for (int i = 0; i < inputs; ++i) {
      g.wanted[i] = (needs >> i & 1) != 0;
      if (!g.wanted[i]) continue;
      results.push_back(like(tensors_[static_cast<size_t>(i)], views_[i]));
      outputs_[i] = view_of(results.back());
      add(outputs_[i], g.gradient[i]);
    }
    merge_all();
    for (int i = 0; i < inputs; ++i) {
      const int64_t bytes = g.layout.batch * g.layout.elements * size_of(views_[i].dtype);
      g.gradient[i].streams = g.wanted[i] && streams(bytes, inputs, 1);
    }
    g.differentiates = !results.empty();
    return results;
  }

  void add(const View& view, Operand& operand) {
    pointers_[used_] = &view;
    operands_[used_++] = &operand;
  }

  // In the logical order of elements, as in the step that drew the next state.
  void merge_all() { merge(pointers_, operands_, used_, true, true, g.layout); }

  const Tensors& tensors_;
  View views_[kGaussianInputs], outputs_[kGaussianInputs];
  const View* pointers_[2 * kGaussianInputs];
  Operand* operands_[2 * kGaussianInputs];
  int used_ = 0;
};

// The three ops of a density: its value, its derivative, and both at once.
template <class Device, class A, bool Diverges>
struct DensityOps {
  using Weights = typename A::Coefficients;
  using Guidance = typename A::Guidance;
  using Std = typename A::Coefficient;

  static Tensor value(Tensors tensors, Weights weights, Guidance guidance_scale, Std std, bool adds_up) {
    Density density(tensors, weights.size(), Diverges, adds_up);
    read(density, weights, guidance_scale, std);
    return density.value<Device>();
  }
  static std::tuple<Tensor, std::vector<Tensor>> with_gradients(int64_t needs, Tensors tensors, Weights weights,
                                                                Guidance guidance_scale, Std std, bool adds_up) {
    Density density(tensors, weights.size(), Diverges, adds_up);
    read(density, weights, guidance_scale, std);
    return density.value_and_gradients<Device>(needs);
  }
  static std::vector<Tensor> backward(Tensor upstream, int64_t needs, Tensors tensors, Weights weights,
                                      Guidance guidance_scale, Std std, bool adds_up) {
    Density density(tensors, weights.size(), Diverges, adds_up);
    read(density, weights, guidance_scale, std);
    return density.gradients<Device>(upstream, needs);
  }

 private:
  static void read(Density& density, const Weights& weights, const Guidance& guidance_scale, const Std& std) {
    for (size_t k = 0; k < weights.size(); ++k) density.g.coefficient[k] = density.number(weights[k]);
    density.g.guidance_scale = density.number(guidance_scale);
    density.g.noise_weight = density.number(std);
    check_deviation(density.g);
  }
};

template <class Ops>
void register_density(Library& library, const std::string& name, const std::string& overload) {
  register_function<&Ops::value>(library, name + overload);
  register_function<&Ops::backward>(library, name + "_backward" + overload);
  register_function<&Ops::with_gradients>(library, name + "_with_gradients" + overload);
}

template <class Device>
void register_gaussian(Library& library) {
  register_op<GaussianStep<Device>, NumberArguments, TensorArguments>(library, "gaussian_step");
  register_density<DensityOps<Device, NumberArguments, false>>(library, "gaussian_log_prob", "");
  register_density<DensityOps<Device, TensorArguments, false>>(library, "gaussian_log_prob", ".tensor");
  register_density<DensityOps<Device, NumberArguments, true>>(library, "gaussian_kl", "");
  register_density<DensityOps<Device, TensorArguments, true>>(library, "gaussian_kl", ".tensor");
}

}  // namespace bicm
