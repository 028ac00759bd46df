// The ops of the multistep family for any device: each chooses coefficients, one kernel runs them all.
#pragma once

#include <tuple>

#include "../core/multistep.h"
#include "numbers.h"

namespace bicm {

using Tensors = std::vector<Tensor>;

// The two flavours of every schema: numbers, for eager calls; tensors, for traced graphs and per-sample arguments.
// A third, of Python's objects, goes past the dispatcher (python.h).
struct NumberArguments {
  using Tensor = bicm::Tensor;
  using Tensors = std::vector<Tensor>;
  using Coefficients = std::vector<double>;
  using Coefficient = double;
  using Guidance = double;
  using Maybe = std::optional<double>;
  using Seed = std::optional<int64_t>;
  using Counter = int64_t;
};
struct TensorArguments {
  using Tensor = bicm::Tensor;
  using Tensors = std::vector<Tensor>;
  using Coefficients = std::vector<Tensor>;
  using Coefficient = std::optional<Tensor>;
  using Guidance = std::optional<Tensor>;
  using Maybe = std::optional<Tensor>;
  using Seed = std::optional<Tensor>;
  using Counter = std::optional<Tensor>;
};

// Only the lane's memory is kept apart by how it is written.
inline Tensor like(const Tensor& first, const View& view, bool) { return like(first, view); }

// The inputs of a step, checked against the first; the problem's operands point at them.
template <class A>
class Step {
 public:
  using Tensor = typename A::Tensor;
  using Tensors = typename A::Tensors;

  Step(const Tensors& tensors, int64_t terms) : tensors_(tensors) {
    const int64_t count = static_cast<int64_t>(tensors.size());
    STD_TORCH_CHECK(terms >= 1 && terms <= kMaxTerms && (count == terms || count == terms + 1),
                    "bicm_kernels: wrong number of tensors or coefficients");
    m.terms = static_cast<int32_t>(terms);
    m.guided = count == terms + 1;
    for (int64_t i = 0; i < count; ++i) {
      View& view = storage_[i] = view_of(tensors[i]);
      const bool agrees = view.dim > 0 && same_sizes(view, storage_[0]) && view.device == storage_[0].device;
      STD_TORCH_CHECK(agrees, "bicm_kernels: tensors differ in shape or device");
      m.float64 = m.float64 || view.dtype == DType::float64;
      add(view, i < terms ? m.input[i] : m.conditional);
    }
    inputs_ = used_;
  }

  const Tensors& tensors() const { return tensors_; }
  const View& first() const { return storage_[0]; }
  int64_t batch() const { return first().sizes[0]; }
  Number number(const Tensor& value) {
    const View view = view_of(value);
    per_sample_ = per_sample_ || view.dim == 1;
    return number_of(view, batch(), first().device);
  }

  template <class Coefficients>
  void weights(const Coefficients& values, Number* into) {
    for (size_t k = 0; k < values.size(); ++k) into[k] = given(*this, values[k]);
  }

  template <class KeyArguments>
  void noise(const Number& weight, const KeyArguments& key) {
    m.draws = true;
    m.noise_weight = weight;
    m.key = key_of(key, batch(), first().device);
  }

  Tensor output(Operand& operand) {
    Tensor result = like(tensors_[0], first(), streamed(operand));
    output(operand, result);
    return result;
  }

  void output(Operand& operand, const Tensor& given, bool any_dtype = false) {
    View& view = storage_[used_] = view_of(given);
    const bool agrees =
        same_sizes(view, first()) && view.device == first().device && (any_dtype || view.dtype == first().dtype);
    STD_TORCH_CHECK(agrees, "bicm_kernels: out differs from the first tensor in shape, dtype or device");
    add(view, operand);
  }

  // For outputs that the caller gave: results may replace inputs exactly, or lie apart.
  void check_overlap() const {
    for (int out = inputs_; out < used_; ++out) {
      STD_TORCH_CHECK(!overlaps_itself(storage_[out]), "bicm_kernels: out overlaps itself");
      for (int in = 0; in < out; ++in) {
        const bool same = in >= inputs_ && storage_[in].data == storage_[out].data && storage_[out].data != nullptr;
        STD_TORCH_CHECK(!same && may_alias(storage_[out], storage_[in]), "bicm_kernels: out overlaps a tensor");
      }
    }
  }

  template <class Device>
  void run(Device) {
    merge(views_, operands_, used_, m.draws, per_sample_, m.layout);
    if (m.layout.batch == 0 || m.layout.elements == 0) return;
    for (int out = inputs_; out < used_; ++out) operands_[out]->streams = streamed(*operands_[out]);
    Device::run(m, tensors_[0]);
  }

  Multistep m = {};

 private:
  static constexpr int kMaxOperands = kMaxTerms + 4;

  // From this size on a denoised sample is written past the cache. What else a step writes is read again at once; this
  // is not, or one step later.
  static constexpr int64_t kStreamDenoisedBytes = int64_t{4} << 20;

  bool streamed(const Operand& operand) const {
    const int64_t from = &operand == &m.x0 ? kStreamDenoisedBytes : kStreamBytes;
    int64_t bytes = size_of(first().dtype);
    for (int64_t i = 0; i < first().dim; ++i) bytes *= first().sizes[i];
    return bytes >= from;
  }

  void add(View& view, Operand& operand) {
    views_[used_] = &view;
    operands_[used_++] = &operand;
  }

  const Tensors& tensors_;
  View storage_[kMaxOperands];
  const View* views_[kMaxOperands];
  Operand* operands_[kMaxOperands];
  int used_ = 0, inputs_ = 0;
  bool per_sample_ = false;
};

template <class A>
Number given(Step<A>&, double value) {
  return number_of(value);
}
template <class A>
Number given(Step<A>&, const std::optional<double>& value) {
  return number_of(value.value_or(0.0));
}
template <class A>
Number given(Step<A>& step, const Tensor& value) {
  return step.number(value);
}
template <class A>
Number given(Step<A>& step, const std::optional<Tensor>& value) {
  return value.has_value() ? step.number(*value) : number_of(0.0);
}

template <class A>
void draw_noise(Step<A>& step, double weight, const std::optional<int64_t>& seed, int64_t at, int64_t sample) {
  if (seed.has_value()) step.noise(number_of(weight), KeyNumbers{*seed, at, sample});
}
template <class A>
void draw_noise(Step<A>& step, const std::optional<Tensor>& weight, const std::optional<Tensor>& seed,
                const std::optional<Tensor>& at, const std::optional<Tensor>& sample) {
  if (!seed.has_value()) return;
  STD_TORCH_CHECK(weight.has_value() && at.has_value() && sample.has_value(), "bicm_kernels: incomplete noise key");
  step.noise(step.number(*weight), KeyTensors{*seed, *at, *sample});
}

template <Form F, class Coefficients>
int64_t terms_of(const Coefficients& coefficients) {
  if (F == Form::affine) return static_cast<int64_t>(coefficients.size());
  STD_TORCH_CHECK(coefficients.size() == 5, "bicm_kernels: expected a, b, a_last, b_last and gamma");
  return 3;
}

template <Form F, class A>
void prepare(Step<A>& step, const typename A::Coefficients& coefficients, const typename A::Guidance& guidance_scale) {
  step.m.form = F;
  step.weights(coefficients, step.m.coefficient);
  step.m.guidance_scale = given(step, guidance_scale);
}

template <class Device, Form F, class A>
typename A::Tensor form_step(typename A::Tensors tensors, typename A::Coefficients coefficients,
                             typename A::Guidance guidance_scale) {
  Step<A> step(tensors, terms_of<F>(coefficients));
  prepare<F, A>(step, coefficients, guidance_scale);
  auto out = step.output(step.m.out);
  step.run(Device());
  return out;
}

template <class Device, Form F, class A>
void form_step_out(typename A::Tensors tensors, typename A::Coefficients coefficients,
                   typename A::Guidance guidance_scale, Tensor out) {
  Step<A> step(tensors, terms_of<F>(coefficients));
  prepare<F, A>(step, coefficients, guidance_scale);
  step.output(step.m.out, out);
  step.check_overlap();
  step.run(Device());
}

template <class Device, class A>
typename A::Tensor affine_step(typename A::Tensors tensors, typename A::Coefficients weights,
                               typename A::Guidance guidance_scale, typename A::Coefficient noise_weight,
                               typename A::Seed seed, typename A::Counter at, typename A::Counter sample_id) {
  Step<A> step(tensors, terms_of<Form::affine>(weights));
  prepare<Form::affine, A>(step, weights, guidance_scale);
  draw_noise(step, noise_weight, seed, at, sample_id);
  auto out = step.output(step.m.out);
  step.run(Device());
  return out;
}

template <class Device, class A>
void affine_step_out(typename A::Tensors tensors, typename A::Coefficients weights, typename A::Guidance guidance_scale,
                     typename A::Coefficient noise_weight, typename A::Seed seed, typename A::Counter at,
                     typename A::Counter sample_id, Tensor out) {
  Step<A> step(tensors, terms_of<Form::affine>(weights));
  prepare<Form::affine, A>(step, weights, guidance_scale);
  draw_noise(step, noise_weight, seed, at, sample_id);
  step.output(step.m.out, out);
  step.check_overlap();
  step.run(Device());
}

template <class A>
using Three = std::tuple<typename A::Tensor, typename A::Tensor, typename A::Tensor>;

// What stands for an output that was not asked for.
inline Tensor nothing_like(const Tensor& first) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(first.get(), &dtype));
  return empty_tensor(first, 1, 0, dtype);
}

template <class A>
void prepare_denoised(Step<A>& step, const typename A::Coefficients& x0_weights,
                      const typename A::Coefficients& weights, const typename A::Guidance& guidance_scale,
                      const typename A::Coefficient& x0_weight, const typename A::Maybe& clip,
                      const typename A::Coefficient& noise_weight, const typename A::Maybe& next_scale,
                      const typename A::Seed& seed, const typename A::Counter& at,
                      const typename A::Counter& sample_id) {
  STD_TORCH_CHECK(x0_weights.size() == weights.size(), "bicm_kernels: as many x0_weights as weights");
  prepare<Form::affine, A>(step, weights, guidance_scale);
  Multistep& m = step.m;
  m.denoises = true;
  step.weights(x0_weights, m.x0_coefficient);
  m.x0_weight = given(step, x0_weight);
  m.clips = clip.has_value();
  m.clip = given(step, clip);
  m.scales = next_scale.has_value();
  m.next_scale = given(step, next_scale);
  draw_noise(step, noise_weight, seed, at, sample_id);
}

template <class Device, class A>
Three<A> denoised_step(typename A::Tensors tensors, typename A::Coefficients x0_weights,
                       typename A::Coefficients weights, typename A::Guidance guidance_scale,
                       typename A::Coefficient x0_weight, typename A::Maybe clip, typename A::Coefficient noise_weight,
                       typename A::Maybe next_scale, typename A::Seed seed, typename A::Counter at,
                       typename A::Counter sample_id) {
  Step<A> step(tensors, terms_of<Form::affine>(weights));
  prepare_denoised<A>(step, x0_weights, weights, guidance_scale, x0_weight, clip, noise_weight, next_scale, seed, at,
                      sample_id);
  auto out = step.output(step.m.out);
  auto x0 = step.output(step.m.x0);
  auto next = step.m.scales ? step.output(step.m.next) : nothing_like(tensors[0]);
  step.run(Device());
  return {out, x0, next};
}

template <class Device, class A>
void denoised_step_out(typename A::Tensors tensors, typename A::Coefficients x0_weights,
                       typename A::Coefficients weights, typename A::Guidance guidance_scale,
                       typename A::Coefficient x0_weight, typename A::Maybe clip, typename A::Coefficient noise_weight,
                       typename A::Maybe next_scale, typename A::Seed seed, typename A::Counter at,
                       typename A::Counter sample_id, Tensor out, Tensor x0, Tensor next) {
  Step<A> step(tensors, terms_of<Form::affine>(weights));
  prepare_denoised<A>(step, x0_weights, weights, guidance_scale, x0_weight, clip, noise_weight, next_scale, seed, at,
                      sample_id);
  step.output(step.m.out, out);
  step.output(step.m.x0, x0);
  if (step.m.scales) step.output(step.m.next, next);
  step.check_overlap();
  step.run(Device());
}

template <class Device, class A, class Library>
void register_flavour(Library& library, const char* const* names) {
  library.impl(names[0], BICM_BOX((&form_step<Device, Form::affine, A>)));
  library.impl(names[1], BICM_BOX((&form_step_out<Device, Form::affine, A>)));
  library.impl(names[2], BICM_BOX((&form_step<Device, Form::bdia, A>)));
  library.impl(names[3], BICM_BOX((&form_step_out<Device, Form::bdia, A>)));
  library.impl(names[4], BICM_BOX((&form_step<Device, Form::bdia_inverse, A>)));
  library.impl(names[5], BICM_BOX((&form_step_out<Device, Form::bdia_inverse, A>)));
  library.impl(names[6], BICM_BOX((&affine_step<Device, A>)));
  library.impl(names[7], BICM_BOX((&affine_step_out<Device, A>)));
  library.impl(names[8], BICM_BOX((&denoised_step<Device, A>)));
  library.impl(names[9], BICM_BOX((&denoised_step_out<Device, A>)));
}

template <class Device>
void register_multistep(torch::stable::detail::StableLibrary& library) {
  static const char* const numbers[] = {"ddim_step",         "ddim_step.out",         "bdia_step",   "bdia_step.out",
                                        "bdia_inverse_step", "bdia_inverse_step.out", "affine_step", "affine_step.out",
                                        "denoised_step",     "denoised_step.out"};
  static const char* const tensors[] = {
      "ddim_step.tensor",         "ddim_step.tensor_out",         "bdia_step.tensor",   "bdia_step.tensor_out",
      "bdia_inverse_step.tensor", "bdia_inverse_step.tensor_out", "affine_step.tensor", "affine_step.tensor_out",
      "denoised_step.tensor",     "denoised_step.tensor_out"};
  register_flavour<Device, NumberArguments>(library, numbers);
  register_flavour<Device, TensorArguments>(library, tensors);
}

}  // namespace bicm
