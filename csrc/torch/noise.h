// The ops of the noise family for any device: Device::run launches a problem.
#pragma once

#include <tuple>

#include "../core/noise.h"
#include "numbers.h"

namespace bicm {

template <class Device, Distribution D, class KeyArguments>
void draw(const Tensor& out, const KeyArguments& key) {
  const View view = view_of(out);
  STD_TORCH_CHECK(view.dim > 0, "bicm_kernels: noise needs a batch dimension");
  STD_TORCH_CHECK(!overlaps_itself(view), "bicm_kernels: out overlaps itself");
  Noise problem = {};
  const View* views[] = {&view};
  Operand* operands[] = {&problem.out};
  merge(views, operands, 1, true, true, problem.layout);
  problem.distribution = D;
  problem.key = key_of(key, problem.layout.batch, view.device);
  if (problem.layout.batch == 0 || problem.layout.elements == 0) return;
  problem.out.streams = problem.layout.batch * problem.layout.elements * size_of(view.dtype) >= kStreamBytes;
  Device::run(problem, out);
}

template <class Device, Distribution D>
void draw_numbers(Tensor out, int64_t seed, int64_t step, int64_t sample_id) {
  draw<Device, D>(out, KeyNumbers{seed, step, sample_id});
}

template <class Device, Distribution D>
void draw_tensors(Tensor out, Tensor seed, Tensor step, Tensor sample_id) {
  draw<Device, D>(out, KeyTensors{seed, step, sample_id});
}

// Seeds and data are both 0-d, or (B,), or one of each; one that is 0-d may lie on the host.
template <class Device>
Tensor fold_in_tensors(Tensor seed, Tensor data) {
  const Tensor& shaped = seed.dim() >= data.dim() ? seed : data;
  const Tensor& placed = on_host(device_of(seed)) ? data : seed;
  const int64_t count = shaped.numel();
  STD_TORCH_CHECK(shaped.dim() <= 1 && (seed.dim() != data.dim() || seed.numel() == data.numel()),
                  "bicm_kernels: seed and data must be 0-d or (B,)");
  Tensor out = empty_tensor(placed, shaped.dim(), count, torch_code(DType::int64));
  const int32_t device = device_of(out);
  Device::fold_in(integer_of(seed, count, device), integer_of(data, count, device), out);
  return out;
}

// The pair whose samples the network generates, where the mask says so, from those at the low level.
struct Generated {
  const Tensor& F;
  const Tensor& end;
  bool to_least, scales;
};

template <class Device>
std::tuple<Tensor, Tensor> pair_of(const Tensor& x, const Tensor& sigma_low, const Tensor& sigma_high,
                                   const KeyTensors& key, const std::optional<Tensor>& x_hat,
                                   const std::optional<Tensor>& mask, const std::optional<Tensor>& sigma_data,
                                   const Generated* generated) {
  const View view = view_of(x);
  const View other = generated != nullptr ? view_of(generated->F) : x_hat.has_value() ? view_of(*x_hat) : view;
  STD_TORCH_CHECK(view.dim > 0 && same_sizes(view, other) && view.device == other.device &&
                      (view.dtype == other.dtype || generated != nullptr),
                  "bicm_kernels: x_hat differs from x in shape, dtype or device");
  Tensor low = like(x, view), high = like(x, view);
  const View low_view = view_of(low), high_view = view_of(high);
  const int64_t batch = view.sizes[0];
  NoisyPair problem = {};
  const View* views[] = {&view, &low_view, &high_view, &other};
  Operand* operands[] = {&problem.x, &problem.low, &problem.high, &problem.x_hat};
  merge(views, operands, 4, true, true, problem.layout);
  problem.float64 = view.dtype == DType::float64 || other.dtype == DType::float64;
  problem.sigma_low = number_of(sigma_low, batch, view.device);
  problem.sigma_high = number_of(sigma_high, batch, view.device);
  problem.scales = sigma_data.has_value();
  if (problem.scales) problem.sigma_data = number_of(*sigma_data, batch, view.device);
  if (generated != nullptr) {
    problem.generates = true;
    problem.to_least = generated->to_least;
    problem.scales = generated->scales;
    problem.end = number_of(generated->end, batch, view.device);
  }
  problem.key = key_of(key, batch, view.device);
  if (mask.has_value()) {
    STD_TORCH_CHECK((x_hat.has_value() || generated != nullptr) && mask->dim() == 1 && mask->size(0) == batch &&
                        mask->element_size() == 1 && device_of(*mask) == view.device,
                    "bicm_kernels: mask must be a (B,) bool tensor beside x_hat or F");
    problem.mask = static_cast<const bool*>(mask->data_ptr());
    problem.mask_stride = mask->stride(0);
  }
  if (batch > 0 && problem.layout.elements > 0) {
    problem.low.streams = problem.high.streams = batch * problem.layout.elements * size_of(view.dtype) >= kStreamBytes;
    Device::run(problem, x);
  }
  return {low, high};
}

template <class Device>
std::tuple<Tensor, Tensor> generated_pair(Tensor x, Tensor F, Tensor sigma_low, Tensor sigma_high, Tensor end,
                                          Tensor sigma_data, Tensor seed, Tensor step, Tensor sample_id,
                                          std::optional<Tensor> mask, bool cm, bool scales) {
  const Generated generated = {F, end, cm, scales};
  return pair_of<Device>(x, sigma_low, sigma_high, KeyTensors{seed, step, sample_id}, std::nullopt, mask, sigma_data,
                         &generated);
}

template <class Device>
std::tuple<Tensor, Tensor> noisy_pair(Tensor x, Tensor sigma_low, Tensor sigma_high, Tensor seed, Tensor step,
                                      Tensor sample_id, std::optional<Tensor> x_hat, std::optional<Tensor> mask,
                                      std::optional<Tensor> sigma_data) {
  return pair_of<Device>(x, sigma_low, sigma_high, KeyTensors{seed, step, sample_id}, x_hat, mask, sigma_data, nullptr);
}

template <class Device>
void register_noise(Library& library) {
  library.impl("normal", BICM_BOX((&draw_numbers<Device, Distribution::normal>)));
  library.impl("normal.tensor", BICM_BOX((&draw_tensors<Device, Distribution::normal>)));
  library.impl("uniform", BICM_BOX((&draw_numbers<Device, Distribution::uniform>)));
  library.impl("uniform.tensor", BICM_BOX((&draw_tensors<Device, Distribution::uniform>)));
  library.impl("fold_in", BICM_BOX((&fold_in_tensors<Device>)));
  library.impl("noisy_pair", BICM_BOX((&noisy_pair<Device>)));
  library.impl("generated_pair", BICM_BOX((&generated_pair<Device>)));
}

}  // namespace bicm
