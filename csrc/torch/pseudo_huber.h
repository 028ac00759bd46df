// The ops of the pseudo_huber family for any device: checks and outputs; Device's functions launch.
#pragma once

#include <tuple>

#include "../core/pseudo_huber.h"
#include "numbers.h"

namespace bicm {

using MaybeTensor = std::optional<Tensor>;

// A loss's checked arguments; the problem's operands point at them.
class LossCall {
 public:
  // Keeps pointers to them.
  void inputs(const Tensor& prediction, const Tensor& target, const Tensor* x = nullptr) {
    const Tensor* const given[] = {&prediction, &target, x};
    Operand* const operands[] = {&p.prediction, &p.target, &p.x};
    p.denoises = x != nullptr;
    count_ = p.denoises ? 3 : 2;
    for (int i = 0; i < count_; ++i) {
      inputs_[i] = given[i];
      const View& view = views_[i] = view_of(*inputs_[i]);
      const bool agrees = view.dim > 0 && same_sizes(view, views_[0]) && view.device == views_[0].device;
      STD_TORCH_CHECK(agrees, "bicm_kernels: tensors differ in shape or device");
      p.float64 = p.float64 || view.dtype == DType::float64;
      add(view, *operands[i]);
    }
  }

  Number number(double value) const { return number_of(value); }
  Number number(const Tensor& value) const { return number_of(value, views_[0].sizes[0], views_[0].device); }

  template <class MaybeNumber>
  void distance(const MaybeTensor& weight, const MaybeNumber& c, int64_t distance, int64_t reduction) {
    STD_TORCH_CHECK(distance >= 0 && distance < 3 && reduction >= 0 && reduction < 3, "bicm_kernels: unknown code");
    p.distance = static_cast<Distance>(distance);
    p.reduction = static_cast<Reduction>(reduction);
    p.weight = number_of(1.0);
    if (weight.has_value()) weigh(*weight);
    p.given_c = c.has_value();
    STD_TORCH_CHECK(p.given_c || p.distance != Distance::elementwise, "bicm_kernels: elementwise needs c");
    STD_TORCH_CHECK(!p.given_c || p.distance != Distance::squared, "bicm_kernels: squared takes no c");
    if (p.given_c) p.c = number(*c);
    STD_TORCH_CHECK(p.c.data != nullptr || p.c.value >= 0.0, "bicm_kernels: c must not be negative");
  }

  template <class Numeric>
  void denoising(const Tensor& t, const MaybeTensor& u, const Numeric& sigma_data, const Numeric& sigma_min,
                 int64_t parameterization, int64_t scaled) {
    STD_TORCH_CHECK(parameterization >= 0 && parameterization < 3 && (scaled == 0 || scaled == 1),
                    "bicm_kernels: unknown code");
    p.scaled = scaled == 1;
    p.parameterization = static_cast<Parameterization>(parameterization);
    STD_TORCH_CHECK(!u.has_value() || p.parameterization == Parameterization::bcm, "bicm_kernels: only bcm takes u");
    p.t = number(t);
    p.sigma_data = number(sigma_data);
    p.sigma_min = number(sigma_min);
    p.u = u.has_value() ? number(*u) : p.sigma_min;
  }

  template <class Device>
  std::tuple<Tensor, Tensor> value() {
    merge_all();
    Tensor loss = loss_tensor(), sums = sums_tensor();
    Device::sums(p, loss, sums);
    return {std::move(loss), std::move(sums)};
  }

  template <class Device>
  Tensor value_alone() {
    merge_all();
    Tensor loss = loss_tensor();
    Scratch<Device> sums(*this);
    Device::sums(p, loss, sums.place());
    return loss;
  }

  // Whether no gradient is a half, which would lose digits before the upstream gradient is known.
  bool can_keep(int64_t needs) const {
    for (int i = 0; i < count_; ++i) {
      const bool half = views_[i].dtype == DType::float16 || views_[i].dtype == DType::bfloat16;
      if (half && (needs >> i & 1) != 0) return false;
    }
    return true;
  }

  // The loss, and the gradients of `needs` for an upstream of 1.
  template <class Device>
  std::tuple<Tensor, std::vector<Tensor>> value_and_gradients(int64_t needs) {
    p.upstream = number_of(1.0);
    std::vector<Tensor> results = outputs(needs);
    Tensor loss = loss_tensor();
    Scratch<Device> sums(*this);
    if (results.empty() || p.layout.batch == 0 || p.layout.elements == 0) {
      Device::sums(p, loss, sums.place());
    } else {
      Device::sums_and_gradients(p, loss, sums.place());
    }
    return {std::move(loss), std::move(results)};
  }

  // The gradients of the inputs whose bit is set in `needs`, in the order of the inputs.
  template <class Device>
  std::vector<Tensor> gradients(const Tensor& upstream, const Tensor& sums, int64_t needs) {
    const bool each = p.reduction == Reduction::none;
    STD_TORCH_CHECK(upstream.dim() == (each ? 1 : 0), "bicm_kernels: the gradient must have the shape of the loss");
    p.upstream = number(upstream);
    const View view = view_of(sums);
    STD_TORCH_CHECK(view.dim == 1 && view.sizes[0] == views_[0].sizes[0] && view.dtype == DType::float64 &&
                        view.device == views_[0].device && contiguous(view),
                    "bicm_kernels: sums must be what the forward pass returned");
    p.sums = static_cast<double*>(view.data);
    std::vector<Tensor> results = outputs(needs);
    if (p.layout.batch > 0 && p.layout.elements > 0) Device::gradients(p, sums);
    return results;
  }

  PseudoHuber p = {};

 private:
  // By a number or one for each sample; or by one for each element, in a tensor like the inputs.
  void weigh(const Tensor& weight) {
    weight_ = view_of(weight);
    p.weighs = weight_.dim > 1;
    if (!p.weighs) {
      p.weight = number_of(weight_, views_[0].sizes[0], views_[0].device);
      return;
    }
    STD_TORCH_CHECK(same_sizes(weight_, views_[0]) && weight_.device == views_[0].device,
                    "bicm_kernels: weight must be 0-d, (B,) or like the inputs");
    add(weight_, p.element_weight);
  }

  // Sums of samples that are not returned: for a kernel on the host, no tensor.
  template <class Device, bool OnHost = Device::kOnHost>
  struct Scratch {
    explicit Scratch(const LossCall& call) : sums(call.sums_tensor()) {}
    const Tensor& place() const { return sums; }
    Tensor sums;
  };
  template <class Device>
  struct Scratch<Device, true> {
    explicit Scratch(const LossCall& call) : sums(static_cast<size_t>(call.p.layout.batch)) {}
    double* place() { return sums.data(); }
    std::vector<double> sums;
  };

  // The loss, and the sums of samples, uninitialised.
  Tensor loss_tensor() const {
    const int32_t dtype = p.float64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    return empty_tensor(*inputs_[0], p.reduction == Reduction::none ? 1 : 0, p.layout.batch, dtype);
  }
  Tensor sums_tensor() const { return empty_tensor(*inputs_[0], 1, p.layout.batch, aoti_torch_dtype_float64()); }

  // Tensors for the gradients, with the inputs' layout.
  std::vector<Tensor> outputs(int64_t needs) {
    std::vector<Tensor> results;
    for (int i = 0; i < count_; ++i) {
      p.wanted[i] = (needs >> i & 1) != 0;
      if (!p.wanted[i]) continue;
      results.push_back(like(*inputs_[i], views_[i]));
      outputs_[i] = view_of(results.back());
      add(outputs_[i], p.gradient[i]);
    }
    merge_all();
    for (int i = 0; i < count_; ++i) {
      const int64_t bytes = p.layout.batch * p.layout.elements * size_of(views_[i].dtype);
      p.gradient[i].streams = p.wanted[i] && streams(bytes, count_, 1);
    }
    return results;
  }

  void add(const View& view, Operand& operand) {
    pointers_[used_] = &view;
    operands_[used_++] = &operand;
  }

  // Memory order is allowed: a sum's partition depends only on the sample.
  void merge_all() { merge(pointers_, operands_, used_, false, true, p.layout); }

  const Tensor* inputs_[kLossInputs] = {};
  View views_[kLossInputs], outputs_[kLossInputs], weight_;
  const View* pointers_[2 * kLossInputs + 1];
  Operand* operands_[2 * kLossInputs + 1];
  int count_ = 0, used_ = 0;
};

// The two flavours of every schema: numbers for eager calls, tensors for traced graphs and per-sample arguments.
struct LossNumbers {
  using Numeric = double;
  using Maybe = std::optional<double>;
};
struct LossTensors {
  using Numeric = Tensor;
  using Maybe = std::optional<Tensor>;
};

template <class A>
void pseudo_huber_of(LossCall& loss, const Tensor& pred, const Tensor& target, const MaybeTensor& weight,
                     const typename A::Maybe& c, const int64_t& distance, const int64_t& reduction) {
  loss.inputs(pred, target);
  loss.distance(weight, c, distance, reduction);
}

template <class A>
void consistency_of(LossCall& loss, const Tensor& F, const Tensor& target, const Tensor& x, const Tensor& t,
                    const MaybeTensor& u, const MaybeTensor& weight, const typename A::Maybe& c,
                    const typename A::Numeric& sigma_data, const typename A::Numeric& sigma_min,
                    const int64_t& parameterization, const int64_t& scaled, const int64_t& distance,
                    const int64_t& reduction) {
  loss.inputs(F, target, &x);
  loss.denoising(t, u, sigma_data, sigma_min, parameterization, scaled);
  loss.distance(weight, c, distance, reduction);
}

// The three ops of a loss: its value, its derivative, and both at once. Read takes the arguments that they share.
template <class Device, auto Read>
struct LossOps;
template <class Device, class... Arguments, void (*Read)(LossCall&, const Arguments&...)>
struct LossOps<Device, Read> {
  static std::tuple<Tensor, Tensor> value(Arguments... arguments) {
    LossCall loss;
    Read(loss, arguments...);
    return loss.value<Device>();
  }
  static std::tuple<Tensor, std::vector<Tensor>> with_gradients(int64_t needs, Arguments... arguments) {
    LossCall loss;
    Read(loss, arguments...);
    return loss.value_and_gradients<Device>(needs);
  }
  static std::vector<Tensor> backward(Tensor upstream, Tensor sums, int64_t needs, Arguments... arguments) {
    LossCall loss;
    Read(loss, arguments...);
    return loss.gradients<Device>(upstream, sums, needs);
  }
};

template <class Ops>
void register_loss(Library& library, const std::string& name, const std::string& overload) {
  register_function<&Ops::value>(library, name + overload);
  register_function<&Ops::backward>(library, name + "_backward" + overload);
  register_function<&Ops::with_gradients>(library, name + "_with_gradients" + overload);
}

// Gradients formed for an upstream of 1, multiplied in place by the actual upstream; unchanged where it is 1.
template <class Device>
void scale_gradients(Tensor upstream, std::vector<Tensor> gradients) {
  for (const Tensor& gradient : gradients) {
    const View view = view_of(gradient), *const views[] = {&view};
    STD_TORCH_CHECK(view.dim > 0 && !overlaps_itself(view),
                    "bicm_kernels: a gradient must be (B, ...), no view of less");
    KeptGradient p = {};
    Operand* const operands[] = {&p.gradient};
    merge(views, operands, 1, false, true, p.layout);
    p.upstream = number_of(upstream, p.layout.batch, view.device);
    if (p.layout.batch > 0 && p.layout.elements > 0) Device::scale(p, gradient);
  }
}

template <class Device>
void register_pseudo_huber(Library& library) {
  register_loss<LossOps<Device, &pseudo_huber_of<LossNumbers>>>(library, "pseudo_huber", "");
  register_loss<LossOps<Device, &pseudo_huber_of<LossTensors>>>(library, "pseudo_huber", ".tensor");
  register_loss<LossOps<Device, &consistency_of<LossNumbers>>>(library, "consistency_loss", "");
  register_loss<LossOps<Device, &consistency_of<LossTensors>>>(library, "consistency_loss", ".tensor");
  register_function<&scale_gradients<Device>>(library, "scale_gradients_");
}

}  // namespace bicm
