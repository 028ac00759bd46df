// The ops of the multistep family for any device: each chooses coefficients, one kernel runs them all.
#pragma once

#include <tuple>

#include "../core/multistep.h"
#include "numbers.h"

namespace bicm {

using Tensors = std::vector<Tensor>;

// The two flavours of every schema: numbers, for eager calls; tensors, for traced graphs and per-sample arguments.
// A third, for Python's objects, bypasses the dispatcher (python.h).
struct NumberArguments {
  using Tensor = bicm::Tensor;
  using Tensors = std::vector<Tensor>;
  using Coefficients = std::vector<double>;
  using Coefficient = double;
  using Guidance = double;
  using Maybe = std::optional<double>;
  using Seed = std::optional<int64_t>;
  using Counter = int64_t;
  using Mask = std::optional<bicm::Tensor>;
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
  using Mask = std::optional<Tensor>;
};

// Only blocks returned to Python directly are separated by how they are written.
inline Tensor like(const Tensor& first, const View& view, bool) { return like(first, view); }

// The tensor that numbers and integers of a call are checked against: its first one, which outlives this object.
template <class A>
class Inputs {
 public:
  explicit Inputs(const View& first) : first_(first) {}

  const View& first() const { return first_; }
  int64_t batch() const { return first_.sizes[0]; }
  Number number(const typename A::Tensor& value) {
    const View view = view_of(value);
    per_sample_ = per_sample_ || view.dim == 1;
    return number_of(view, batch(), first_.device);
  }

 protected:
  bool per_sample_ = false;

 private:
  const View& first_;
};

// The inputs of a step, checked against the first; the problem's operands point at them.
template <class A>
class Step : public Inputs<A> {
 public:
  using Tensor = typename A::Tensor;
  using Tensors = typename A::Tensors;
  using Inputs<A>::batch, Inputs<A>::first;

  Step(const Tensors& tensors, int64_t terms) : Inputs<A>(storage_[0]), tensors_(tensors) {
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

  template <class Coefficients>
  void weights(const Coefficients& values, Number* into) {
    for (size_t k = 0; k < values.size(); ++k) into[k] = given(*this, values[k]);
  }

  void noise(const Number& weight, const NoiseKey& key) {
    m.draws = true;
    m.noise_weight = weight;
    m.key = key;
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

  // For given outputs: results may be exactly an input, or disjoint from all.
  void check_overlap() const {
    for (int out = inputs_; out < used_; ++out) {
      STD_TORCH_CHECK(!overlaps_itself(storage_[out]), "bicm_kernels: out overlaps itself");
      for (int in = 0; in < out; ++in) {
        const bool same = in >= inputs_ && storage_[in].data == storage_[out].data && storage_[out].data != nullptr;
        STD_TORCH_CHECK(!same && may_alias(storage_[out], storage_[in]), "bicm_kernels: out overlaps a tensor");
      }
    }
  }

  // Runs the step; returns its one result, allocated here or given.
  template <class Device>
  Tensor finish(Device device, Operand& operand) {
    Tensor result = output(operand);
    run(device);
    return result;
  }
  template <class Device>
  void finish(Device device, Operand& operand, const Tensor& given) {
    output(operand, given);
    check_overlap();
    run(device);
  }

  template <class Device>
  void run(Device) {
    place(m.draws, this->per_sample_);
    if (m.layout.batch > 0 && m.layout.elements > 0) Device::run(m, tensors_[0]);
  }

  // The operands' layout, once all are known.
  void place(bool ordered, bool per_sample) {
    merge(views_, operands_, used_, ordered, per_sample, m.layout);
    for (int out = inputs_; out < used_; ++out) operands_[out]->streams = streamed(*operands_[out]);
  }

  Multistep m = {};

 private:
  static constexpr int kMaxOperands = kMaxTerms + 4;

  // Those of a step that returns its denoised sample, which is not read at once; what is written beside it is, and
  // several streams at a time are slower.
  static constexpr int64_t kStreamDenoisedBytes = 2 * kStreamBytes, kStreamBesideBytes = 4 * kStreamBytes;

  bool streamed(const Operand& operand) const {
    const int64_t from = !m.denoises ? kStreamBytes : &operand == &m.x0 ? kStreamDenoisedBytes : kStreamBesideBytes;
    int64_t bytes = size_of(first().dtype);
    for (int64_t i = 0; i < first().dim; ++i) bytes *= first().sizes[i];
    // Noise takes longer than a tensor that is read: a store is never what is waited for.
    return bytes >= from && streams(bytes, inputs_ + m.draws, m.denoises ? 2 : 1);
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
};

template <class A>
Number given(Inputs<A>&, double value) {
  return number_of(value);
}
template <class A>
Number given(Inputs<A>&, const std::optional<double>& value) {
  return number_of(value.value_or(0.0));
}
template <class A>
Number given(Inputs<A>& inputs, const Tensor& value) {
  return inputs.number(value);
}
template <class A>
Number given(Inputs<A>& inputs, const std::optional<Tensor>& value) {
  return value.has_value() ? inputs.number(*value) : number_of(0.0);
}

// The key of a call that draws noise.
template <class A>
NoiseKey key_given(const Inputs<A>& inputs, const std::optional<int64_t>& seed, int64_t at, int64_t sample) {
  STD_TORCH_CHECK(seed.has_value(), "bicm_kernels: noise without a seed");
  return key_of(KeyNumbers{*seed, at, sample}, inputs.batch(), inputs.first().device);
}
template <class A>
NoiseKey key_given(const Inputs<A>& inputs, const std::optional<Tensor>& seed, const std::optional<Tensor>& at,
                   const std::optional<Tensor>& sample) {
  STD_TORCH_CHECK(seed.has_value() && at.has_value() && sample.has_value(), "bicm_kernels: incomplete noise key");
  return key_of(KeyTensors{*seed, *at, *sample}, inputs.batch(), inputs.first().device);
}

inline bool is_number(double) { return true; }
inline bool is_number(const std::optional<Tensor>& value) { return value.has_value(); }

// Without a seed nothing is drawn.
template <class A, class Weight, class Seed, class Counter>
void draw_noise(Step<A>& step, const Weight& weight, const Seed& seed, const Counter& at, const Counter& sample) {
  if (!seed.has_value()) return;
  STD_TORCH_CHECK(is_number(weight), "bicm_kernels: noise without a weight");
  step.noise(given(step, weight), key_given(step, seed, at, sample));
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

template <class Device, Form F>
struct FormStep {
  template <class A, class... Outs>
  static auto run(typename A::Tensors tensors, typename A::Coefficients coefficients,
                  typename A::Guidance guidance_scale, Outs... outs) {
    Step<A> step(tensors, terms_of<F>(coefficients));
    prepare<F, A>(step, coefficients, guidance_scale);
    return step.finish(Device(), step.m.out, outs...);
  }
};

template <class Device>
struct AffineStep {
  template <class A, class... Outs>
  static auto run(typename A::Tensors tensors, typename A::Coefficients weights, typename A::Guidance guidance_scale,
                  typename A::Coefficient noise_weight, typename A::Seed seed, typename A::Counter at,
                  typename A::Counter sample_id, Outs... outs) {
    Step<A> step(tensors, terms_of<Form::affine>(weights));
    prepare<Form::affine, A>(step, weights, guidance_scale);
    draw_noise(step, noise_weight, seed, at, sample_id);
    return step.finish(Device(), step.m.out, outs...);
  }
};

// The affine step of one tensor whose noise is always drawn: a schema without lists.
template <class Device>
struct AddNoise {
  template <class A>
  static typename A::Tensor run(typename A::Tensor x, typename A::Coefficient scale, typename A::Coefficient sigma,
                                typename A::Seed seed, typename A::Counter at, typename A::Counter sample_id) {
    const typename A::Tensors tensors = {x};
    Step<A> step(tensors, 1);
    step.m.form = Form::affine;
    step.m.coefficient[0] = given(step, scale);
    draw_noise(step, sigma, seed, at, sample_id);
    return step.finish(Device(), step.m.out);
  }
};

template <class A>
using Three = std::tuple<typename A::Tensor, typename A::Tensor, typename A::Tensor>;

// What stands for an output that was not asked for.
inline Tensor nothing_like(const Tensor& first) { return empty_tensor(first, 1, 0, first.dtype()); }

template <class Device>
struct DenoisedStep {
  template <class A, class... Outs>
  static auto run(typename A::Tensors tensors, typename A::Coefficients x0_weights, typename A::Coefficients weights,
                  typename A::Guidance guidance_scale, typename A::Coefficient x0_weight, typename A::Maybe clip,
                  typename A::Coefficient noise_weight, typename A::Maybe next_scale, typename A::Seed seed,
                  typename A::Counter at, typename A::Counter sample_id, Outs... outs) {
    Step<A> step(tensors, terms_of<Form::affine>(weights));
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
    return finish(step, outs...);
  }

 private:
  template <class A>
  static Three<A> finish(Step<A>& step) {
    auto out = step.output(step.m.out);
    auto x0 = step.output(step.m.x0);
    auto next = step.m.scales ? step.output(step.m.next) : nothing_like(step.tensors()[0]);
    step.run(Device());
    return {std::move(out), std::move(x0), std::move(next)};
  }

  template <class A>
  static void finish(Step<A>& step, const Tensor& out, const Tensor& x0, const Tensor& next) {
    step.output(step.m.out, out);
    step.output(step.m.x0, x0);
    if (step.m.scales) step.output(step.m.next, next);
    step.check_overlap();
    step.run(Device());
  }
};

template <class Op, class... Outs>
void register_step(Library& library, const char* name) {
  register_writing<Op, NumberArguments, TensorArguments, Outs...>(library, name);
}

template <class Device>
void register_multistep(Library& library) {
  register_step<FormStep<Device, Form::affine>, Tensor>(library, "ddim_step");
  register_step<FormStep<Device, Form::bdia>, Tensor>(library, "bdia_step");
  register_step<FormStep<Device, Form::bdia_inverse>, Tensor>(library, "bdia_inverse_step");
  register_step<AffineStep<Device>, Tensor>(library, "affine_step");
  register_op<AddNoise<Device>, NumberArguments, TensorArguments>(library, "add_noise");
  register_step<DenoisedStep<Device>, Tensor, Tensor, Tensor>(library, "denoised_step");
}

}  // namespace bicm
