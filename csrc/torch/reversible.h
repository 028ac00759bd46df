// The ops of the reversible family for any device: one kernel steps and encodes, another decodes.
#pragma once

#include <tuple>

#include "../core/reversible.h"
#include "multistep.h"

namespace bicm {

// The tensors of a step, checked against the first state (or what is encoded); the problem's operands point at them.
class ExactStep {
 public:
  template <class T>
  ExactStep(const T& first, Kinds kinds) : first_(view_of(first, kinds)) {
    STD_TORCH_CHECK(first_.dim > 0, "bicm_kernels: tensors need a batch dimension");
  }

  const View& first() const { return first_; }
  int64_t batch() const { return first_.sizes[0]; }

  template <class T>
  const View& add(const T& tensor, Operand& operand, Kinds kinds = Kinds::integers_too) {
    View& view = storage_[used_] = view_of(tensor, kinds);
    STD_TORCH_CHECK(same_sizes(view, first_) && view.device == first_.device,
                    "bicm_kernels: tensors differ in shape or device");
    views_[used_] = &view;
    operands_[used_++] = &operand;
    return view;
  }

  void inputs_end() { inputs_ = used_; }

  Number number(double value) { return number_of(value); }
  template <class T>
  Number number(const T& tensor) {
    const View view = view_of(tensor);
    per_sample_ = per_sample_ || view.dim == 1;
    return number_of(view, batch(), first_.device);
  }
  Integer integer(int64_t value) { return integer_of(value); }
  template <class T>
  Integer integer(const T& tensor) {
    const View view = view_of(tensor, Kinds::integers_too);
    per_sample_ = per_sample_ || view.dim == 1;
    return integer_of(view, batch(), first_.device);
  }

  void fraction_bits(int64_t bits, DType dtype) {
    STD_TORCH_CHECK(bits >= 0 && bits <= (dtype == DType::int32 ? 30 : 62), "bicm_kernels: fraction_bits out of range");
    p.fraction_bits = static_cast<int32_t>(bits);
  }

  // An empty tensor records nothing.
  template <class T>
  void overflow(const T& notes, const Integer& mark) {
    const View view = view_of(notes, Kinds::integers_too);
    if (view.dim == 1 && view.sizes[0] == 0) return;
    const bool agrees = view.dim == 1 && view.sizes[0] == batch() && view.dtype == DType::int64 &&
                        view.device == first_.device && !overlaps_itself(view);
    STD_TORCH_CHECK(agrees, "bicm_kernels: overflow must be a (B,) int64 tensor on the tensors' device");
    STD_TORCH_CHECK(mark.data != nullptr || mark.value >= 1, "bicm_kernels: mark must be at least 1");
    p.overflow = static_cast<int64_t*>(view.data);
    p.overflow_stride = view.strides[0];
    p.mark = mark;
    per_sample_ = true;
  }

  // For given outputs: results may be exactly an input, or disjoint from all.
  void check_overlap() const {
    for (int out = inputs_; out < used_; ++out) {
      STD_TORCH_CHECK(!overlaps_itself(storage_[out]), "bicm_kernels: out overlaps itself");
      for (int in = 0; in < out; ++in) {
        // Tensors without elements may all have address 0.
        const bool same = in >= inputs_ && storage_[out].data != nullptr && storage_[in].data == storage_[out].data;
        STD_TORCH_CHECK(!same && may_alias(storage_[out], storage_[in]), "bicm_kernels: out overlaps a tensor");
      }
    }
  }

  template <class Device, class Problem, class T>
  void run(Device, Problem& problem, const T& first) {
    merge(views_, operands_, used_, /*ordered=*/false, per_sample_, problem.layout);
    if (problem.layout.batch == 0 || problem.layout.elements == 0) return;
    for (int out = inputs_; out < used_; ++out) {
      const int64_t bytes = problem.layout.batch * problem.layout.elements * size_of(operands_[out]->dtype);
      operands_[out]->streams = bytes >= kStreamFrom && streams(bytes, inputs_, used_ - inputs_);
    }
    Device::run(problem, first);
  }

  Reversible p = {};

 private:
  static constexpr int64_t kStreamFrom = 4 * kStreamBytes;  // the next step reads the states at once

  static constexpr int kMaxOperands = kMaxTerms + 5;

  const View first_;
  View storage_[kMaxOperands];
  const View* views_[kMaxOperands];
  Operand* operands_[kMaxOperands];
  int used_ = 0, inputs_ = 0;
  bool per_sample_ = false;
};

inline bool is_integer(DType dtype) { return dtype == DType::int64 || dtype == DType::int32; }

// The arguments of a step's schema in both flavours; missing n and m are 1.
struct ExactNumbers {
  using Tensor = bicm::Tensor;
  using Tensors = std::vector<Tensor>;
  using Coefficients = std::vector<double>;
  using Guidance = double;
  using Ratio = int64_t;
  static bool multiplies(int64_t n, int64_t m) {
    const bool valid = n >= 1 && n <= kMaxRatio && m >= 1 && m <= kMaxRatio;
    STD_TORCH_CHECK(valid, "bicm_kernels: a ratio's parts must be in [1, 2**20]");
    return n != m;
  }
};
struct ExactTensors {
  using Tensor = bicm::Tensor;
  using Tensors = std::vector<Tensor>;
  using Coefficients = std::vector<Tensor>;
  using Guidance = std::optional<Tensor>;
  using Ratio = std::optional<Tensor>;
  static bool multiplies(const Ratio& n, const Ratio& m) {
    STD_TORCH_CHECK(n.has_value() == m.has_value(), "bicm_kernels: a ratio needs both its parts");
    return n.has_value();
  }
};

template <class T>
Number given(ExactStep& step, const T& value) {
  return step.number(value);
}

inline void guide_by(ExactStep& step, double scale) { step.p.guidance_scale = step.number(scale); }
inline void guide_by(ExactStep& step, const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(scale.has_value(), "bicm_kernels: a pair of predictions needs a guidance scale");
  step.p.guidance_scale = step.number(*scale);
}

inline void ratio_of(ExactStep& step, int64_t n, int64_t m) {
  step.p.n = step.integer(n);
  step.p.m = step.integer(m);
}
inline void ratio_of(ExactStep& step, const std::optional<Tensor>& n, const std::optional<Tensor>& m) {
  step.p.n = step.integer(*n);
  step.p.m = step.integer(*m);
}

template <Increment I, bool Inverse, class A>
void prepare_exact(ExactStep& step, const typename A::Tensors& tensors, const typename A::Tensor& info,
                   const typename A::Coefficients& coefficients, const typename A::Guidance& guidance_scale,
                   const typename A::Ratio& n, const typename A::Ratio& m, int64_t fraction_bits) {
  constexpr bool bdia = I == Increment::bdia;
  Reversible& p = step.p;
  const int64_t count = static_cast<int64_t>(coefficients.size()), terms = bdia ? 2 : count;
  const int64_t operands = static_cast<int64_t>(tensors.size()) - 1;
  STD_TORCH_CHECK(
      (!bdia || count == 4) && terms >= 1 && terms <= kMaxTerms && (operands == terms || operands == terms + 1),
      "bicm_kernels: wrong number of tensors or coefficients");
  p.steps = true;
  p.inverse = Inverse;
  p.increment = I;
  p.terms = static_cast<int32_t>(terms);
  p.guided = operands == terms + 1;
  const DType state = step.add(tensors[0], p.last).dtype;
  for (int64_t k = 0; k < operands; ++k) {
    const DType dtype = step.add(tensors[k + 1], k < terms ? p.input[k] : p.conditional).dtype;
    STD_TORCH_CHECK(!is_integer(dtype) || dtype == state, "bicm_kernels: fixed-point states differ in dtype");
    STD_TORCH_CHECK(!bdia || is_integer(dtype) == (k == 0), "bicm_kernels: q must be an integer state, eps floating");
  }
  step.fraction_bits(fraction_bits, state);
  for (int64_t k = 0; k < count; ++k) p.coefficient[k] = given(step, coefficients[k]);
  if (p.guided) guide_by(step, guidance_scale);
  p.multiplies = A::multiplies(n, m);
  STD_TORCH_CHECK(is_integer(state) && (state == DType::int64 || !p.multiplies),
                  "bicm_kernels: the state must be int64, or int32 where the ratio is 1");
  if (p.multiplies) {
    ratio_of(step, n, m);
    STD_TORCH_CHECK(step.add(info, p.info).dtype == DType::int64, "bicm_kernels: info must be int64");
  } else {
    const View view = view_of(info, Kinds::integers_too);
    const bool agrees =
        view.dtype == DType::int64 && same_sizes(view, step.first()) && view.device == step.first().device;
    STD_TORCH_CHECK(agrees, "bicm_kernels: info must be an int64 tensor like the state");
  }
  step.inputs_end();
}

template <class Device, Increment I, bool Inverse>
struct ExactUpdate {
  // The state and the buffer; or written, with `mark, out, info_out, overflow` last.
  template <class A, class... Outs>
  static auto run(Tensors tensors, Tensor info, typename A::Coefficients coefficients,
                  typename A::Guidance guidance_scale, typename A::Ratio n, typename A::Ratio m, int64_t fraction_bits,
                  Outs... outs) {
    STD_TORCH_CHECK(!tensors.empty(), "bicm_kernels: no tensors");
    ExactStep step(tensors[0], Kinds::integers_too);
    prepare_exact<I, Inverse, A>(step, tensors, info, coefficients, guidance_scale, n, m, fraction_bits);
    return finish(step, tensors[0], info, outs...);
  }

 private:
  static std::tuple<Tensor, Tensor> finish(ExactStep& step, const Tensor& last, const Tensor& info) {
    Tensor out = like(last, step.first());
    step.add(out, step.p.out);
    Tensor info_out = step.p.multiplies ? like(info, view_of(info, Kinds::integers_too)) : nothing_like(info);
    if (step.p.multiplies) step.add(info_out, step.p.info_out);
    step.run(Device(), step.p, last);
    return {std::move(out), std::move(info_out)};
  }

  template <class Mark>
  static void finish(ExactStep& step, const Tensor& last, const Tensor&, const Mark& mark, const Tensor& out,
                     const Tensor& info_out, const Tensor& overflow) {
    STD_TORCH_CHECK(step.add(out, step.p.out).dtype == step.first().dtype, "bicm_kernels: out differs from the state");
    if (step.p.multiplies) {
      STD_TORCH_CHECK(step.add(info_out, step.p.info_out).dtype == DType::int64, "bicm_kernels: out differs from info");
    }
    step.check_overlap();
    step.overflow(overflow, step.integer(mark));
    step.run(Device(), step.p, last);
  }
};

template <class T>
void prepare_encode(ExactStep& step, const T& x, const T& out, int64_t fraction_bits) {
  step.p.terms = 1;
  step.p.coefficient[0] = number_of(1.0);
  step.add(x, step.p.input[0], Kinds::floating);
  step.inputs_end();
  const DType dtype = step.add(out, step.p.out).dtype;
  STD_TORCH_CHECK(is_integer(dtype), "bicm_kernels: dtype must be int64 or int32");
  step.fraction_bits(fraction_bits, dtype);
}

// In another dtype.
inline Tensor empty_in_layout_of(const Tensor& x, ScalarType dtype) {
  View view = view_of(x, Kinds::integers_too);
  view.dtype = dtype_of(dtype, Kinds::integers_too);
  if (std::optional<Tensor> kept = in_kept_memory(view)) return std::move(*kept);
  return empty_like(x, dtype);
}

template <class Device>
Tensor fixed_point_encode(Tensor x, int64_t fraction_bits, ScalarType dtype) {
  ExactStep step(x, Kinds::floating);
  Tensor out = empty_in_layout_of(x, dtype);
  prepare_encode(step, x, out, fraction_bits);
  step.run(Device(), step.p, x);
  return out;
}

template <class Device, class Mark>
void fixed_point_encode_out(Tensor x, int64_t fraction_bits, ScalarType, Mark mark, Tensor out, Tensor overflow) {
  ExactStep step(x, Kinds::floating);
  prepare_encode(step, x, out, fraction_bits);
  step.check_overlap();
  step.overflow(overflow, step.integer(mark));
  step.run(Device(), step.p, x);
}

template <class Device, class Tensor, class Dtype>
Tensor fixed_point_decode(Tensor x, int64_t fraction_bits, Dtype dtype) {
  ExactStep step(x, Kinds::integers_too);
  STD_TORCH_CHECK(is_integer(step.first().dtype), "bicm_kernels: a fixed-point state is int64 or int32");
  step.fraction_bits(fraction_bits, step.first().dtype);
  FixedPointDecode p = {};
  p.fraction_bits = step.p.fraction_bits;
  step.add(x, p.q);
  step.inputs_end();
  Tensor out = empty_in_layout_of(x, dtype);
  step.add(out, p.out, Kinds::floating);
  step.run(Device(), p, x);
  return out;
}

template <class Device, Increment I, bool Inverse>
void register_exact_step(Library& library, const std::string& name) {
  using Op = ExactUpdate<Device, I, Inverse>;
  register_op<Op, ExactNumbers, ExactTensors>(library, name);
  register_function<&Op::template run<ExactNumbers, int64_t, Tensor, Tensor, Tensor>>(library, name + ".out");
  register_function<&Op::template run<ExactTensors, Tensor, Tensor, Tensor, Tensor>>(library, name + ".tensor_out");
}

template <class Device>
void register_reversible(Library& library) {
  constexpr Increment affine = Increment::affine, bdia = Increment::bdia;
  register_exact_step<Device, affine, false>(library, "exact_affine_step");
  register_exact_step<Device, affine, true>(library, "exact_affine_inverse_step");
  register_exact_step<Device, bdia, false>(library, "bdia_exact_step");
  register_exact_step<Device, bdia, true>(library, "bdia_exact_inverse_step");
  register_function<&fixed_point_encode<Device>>(library, "fixed_point_encode");
  register_function<&fixed_point_encode_out<Device, int64_t>>(library, "fixed_point_encode.out");
  register_function<&fixed_point_encode_out<Device, Tensor>>(library, "fixed_point_encode.tensor_out");
  register_function<&fixed_point_decode<Device, Tensor, ScalarType>>(library, "fixed_point_decode");
}

}  // namespace bicm
