// The ops of the preconditioning family for any device: affine steps whose weights come from noise levels.
#pragma once

#include "multistep.h"

namespace bicm {

template <class A>
void precondition(Step<A>& step, const typename A::Coefficient& t, const typename A::Coefficient& u,
                  const typename A::Coefficient& sigma_data, bool cm, bool scaled) {
  const Form plain = cm ? Form::cm : Form::bcm, of_input = cm ? Form::cm_scaled : Form::bcm_scaled;
  step.m.form = scaled ? of_input : plain;
  step.m.coefficient[0] = given(step, t);
  step.m.coefficient[1] = given(step, u);
  step.m.coefficient[2] = given(step, sigma_data);
}

template <class Device>
struct ScaleInput {
  template <class A>
  static typename A::Tensor run(typename A::Tensor x, typename A::Coefficient t, typename A::Coefficient sigma_data) {
    const typename A::Tensors tensors = {x};
    Step<A> step(tensors, 1);
    step.m.form = Form::input;
    step.m.coefficient[0] = given(step, t);
    step.m.coefficient[1] = given(step, sigma_data);
    auto out = step.output(step.m.out);
    step.run(Device());
    return out;
  }
};

template <class Device>
struct Denoise {
  template <class A>
  static typename A::Tensor run(typename A::Tensor x, typename A::Tensor F, typename A::Coefficient t,
                                typename A::Coefficient u, typename A::Coefficient sigma_data, bool cm, bool scaled) {
    const typename A::Tensors tensors = {x, F};
    Step<A> step(tensors, 2);
    precondition<A>(step, t, u, sigma_data, cm, scaled);
    auto out = step.output(step.m.out);
    step.run(Device());
    return out;
  }
};

// The gradient of denoise in x (c_skip times the upstream gradient) or in F (c_out times it), in that tensor's dtype.
template <class Device>
Tensor denoise_gradient(Tensor gradient, std::optional<Tensor> t, std::optional<Tensor> u,
                        std::optional<Tensor> sigma_data, bool cm, bool scaled, bool in_F, ScalarType dtype) {
  const Tensors tensors = {gradient};
  Step<TensorArguments> step(tensors, 1);
  precondition<TensorArguments>(step, t, u, sigma_data, cm, scaled);
  step.m.takes_second = in_F;
  View shape = view_of(gradient);
  shape.dtype = dtype_of(dtype);
  Tensor out = contiguous_like(gradient, shape);
  step.output(step.m.out, out, /*any_dtype=*/true);
  step.run(Device());
  return out;
}

template <class Device>
struct Renoise {
  template <class A>
  static std::tuple<typename A::Tensor, typename A::Tensor> run(
      typename A::Tensor x, typename A::Tensor F, typename A::Coefficient t, typename A::Coefficient u,
      typename A::Coefficient sigma, typename A::Coefficient next_sigma, typename A::Coefficient sigma_data, bool cm,
      typename A::Seed seed, typename A::Counter at, typename A::Counter sample_id) {
    const typename A::Tensors tensors = {x, F};
    Step<A> step(tensors, 2);
    precondition<A>(step, t, u, sigma_data, cm, false);
    draw_noise(step, sigma, seed, at, sample_id);
    step.m.scales = step.m.next_scale_is_sigma = true;
    step.m.next_scale = given(step, next_sigma);
    auto out = step.output(step.m.out);
    auto next = step.output(step.m.next);
    step.run(Device());
    return {std::move(out), std::move(next)};
  }
};

template <class Device>
void register_preconditioning(Library& library) {
  register_op<ScaleInput<Device>, NumberArguments, TensorArguments>(library, "scale_input");
  register_op<Denoise<Device>, NumberArguments, TensorArguments>(library, "denoise");
  register_op<Renoise<Device>, NumberArguments, TensorArguments>(library, "renoise");
  register_function<&denoise_gradient<Device>>(library, "denoise_gradient");
}

}  // namespace bicm
