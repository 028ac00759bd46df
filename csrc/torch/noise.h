// The ops of the noise family for any device: Device::run launches a problem.
#pragma once

#include <tuple>

#include "../core/noise.h"
#include "multistep.h"

namespace bicm {

// Fills a tensor with keyed numbers.
template <class Device, Distribution D>
struct Draw {
  template <class A>
  static void run(typename A::Tensor out, typename A::Seed seed, typename A::Counter at,
                  typename A::Counter sample_id) {
    fill<A>(out, seed, at, sample_id);
  }

  template <class A>
  static void fill(const typename A::Tensor& out, const typename A::Seed& seed, const typename A::Counter& at,
                   const typename A::Counter& sample_id) {
    const View view = view_of(out);
    STD_TORCH_CHECK(view.dim > 0, "bicm_kernels: noise needs a batch dimension");
    STD_TORCH_CHECK(!overlaps_itself(view), "bicm_kernels: out overlaps itself");
    Noise problem = {};
    const View* views[] = {&view};
    Operand* operands[] = {&problem.out};
    merge(views, operands, 1, true, true, problem.layout);
    problem.distribution = D;
    problem.key = key_given(Inputs<A>(view), seed, at, sample_id);
    if (problem.layout.batch == 0 || problem.layout.elements == 0) return;
    problem.out.streams = streams(problem.layout.batch * problem.layout.elements * size_of(view.dtype), 0, 1);
    Device::run(problem, out);
  }
};

// Seeds and data are both 0-d, or (B,), or one of each; a 0-d one may be on the host.
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

// The samples that are replaced, or the places of what replaces them.
struct Replaced {
  const bool* rows = nullptr;
  const int64_t* places = nullptr;
  int64_t stride = 0;
};

inline Replaced replaced_rows(const std::optional<Tensor>& mask, const View& first) {
  if (!mask.has_value()) return {};
  const bool given = mask->dtype() == aoti_torch_dtype_bool(), placed = mask->dtype() == aoti_torch_dtype_int64();
  STD_TORCH_CHECK(
      (given || placed) && mask->dim() == 1 && mask->sizes()[0] == first.sizes[0] && device_of(*mask) == first.device,
      "bicm_kernels: mask must be a (B,) bool tensor");
  const void* const data = mask->data_ptr();
  return {given ? static_cast<const bool*>(data) : nullptr, placed ? static_cast<const int64_t*>(data) : nullptr,
          mask->strides()[0]};
}

// Two levels of one noise. Where the mask is true, other samples replace x: given ones, or those
// that the network predicts from the low level.
template <class A>
class Pair : public Inputs<A> {
 public:
  using Tensor = typename A::Tensor;

  Pair(const Tensor& x, const Tensor* other, const typename A::Mask& mask)
      : Inputs<A>(x_view_), x_(x), x_view_(view_of(x)) {
    other_view_ = other != nullptr ? view_of(*other) : x_view_;
    STD_TORCH_CHECK(x_view_.dim > 0 && x_view_.dim == other_view_.dim, "bicm_kernels: tensors differ in shape");
    const Replaced replaced = replaced_rows(mask, x_view_);
    problem.mask = replaced.rows;
    problem.places = replaced.places;
    problem.mask_stride = replaced.stride;
    if (replaced.places != nullptr) {
      problem.last_place = other_view_.sizes[0] - 1;
      STD_TORCH_CHECK(problem.last_place >= 0 && places_exist(), "bicm_kernels: a place past the last sample");
      others_.assign(other_view_.sizes, other_view_.sizes + other_view_.dim);
      others_[0] = x_view_.sizes[0];
      other_view_.sizes = others_.data();
    }
    STD_TORCH_CHECK(same_sizes(x_view_, other_view_) && x_view_.device == other_view_.device,
                    "bicm_kernels: tensors differ in shape or device");
    problem.float64 = x_view_.dtype == DType::float64 || other_view_.dtype == DType::float64;
  }

  // Elsewhere than on the host kernels take the last sample for one past it.
  bool places_exist() const {
    if (!on_host(x_view_.device)) return true;
    for (int64_t i = 0; i < x_view_.sizes[0]; ++i) {
      if (problem.places[i * problem.mask_stride] > problem.last_place) return false;
    }
    return true;
  }

  bool of_one_dtype() const { return x_view_.dtype == other_view_.dtype; }

  template <class Device>
  std::tuple<Tensor, Tensor> run(Device) {
    Tensor low = like(x_, x_view_, false), high = like(x_, x_view_, false);
    const View low_view = view_of(low), high_view = view_of(high);
    const View* views[] = {&x_view_, &low_view, &high_view, &other_view_};
    Operand* operands[] = {&problem.x, &problem.low, &problem.high, &problem.x_hat};
    Layout& layout = problem.layout;
    merge(views, operands, 4, true, true, layout);
    if (problem.places != nullptr) problem.x_hat.batch_stride = other_view_.strides[0];
    if (layout.batch > 0 && layout.elements > 0) {
      const int64_t bytes = layout.batch * layout.elements * size_of(x_view_.dtype);
      problem.low.streams = problem.high.streams = streams(bytes, 1, 2);
      Device::run(problem, x_);
    }
    return {std::move(low), std::move(high)};
  }

  bicm::NoisyPair problem = {};

 private:
  const Tensor& x_;
  View x_view_, other_view_;
  std::vector<int64_t> others_;  // sizes
};

template <class Device>
struct GivenPair {
  template <class A>
  static std::tuple<typename A::Tensor, typename A::Tensor> run(
      typename A::Tensor x, std::optional<typename A::Tensor> x_hat, typename A::Mask mask,
      typename A::Coefficient sigma_low, typename A::Coefficient sigma_high, typename A::Maybe sigma_data,
      typename A::Seed seed, typename A::Counter at, typename A::Counter sample_id) {
    Pair<A> pair(x, x_hat.has_value() ? &*x_hat : nullptr, mask);
    STD_TORCH_CHECK(x_hat.has_value() == mask.has_value() && pair.of_one_dtype() && pair.problem.places == nullptr,
                    "bicm_kernels: x_hat has the dtype of x, and a bool mask beside it");
    pair.problem.sigma_low = given(pair, sigma_low);
    pair.problem.sigma_high = given(pair, sigma_high);
    pair.problem.scales = sigma_data.has_value();
    pair.problem.sigma_data = given(pair, sigma_data);
    pair.problem.key = key_given(pair, seed, at, sample_id);
    return pair.run(Device());
  }
};

template <class Device>
struct GeneratedPair {
  template <class A>
  static std::tuple<typename A::Tensor, typename A::Tensor> run(
      typename A::Tensor x, typename A::Tensor F, typename A::Mask mask, typename A::Coefficient sigma_low,
      typename A::Coefficient sigma_high, typename A::Coefficient sigma_min, typename A::Coefficient sigma_data,
      bool cm, bool scales, typename A::Seed seed, typename A::Counter at, typename A::Counter sample_id) {
    Pair<A> pair(x, &F, mask);
    pair.problem.sigma_low = given(pair, sigma_low);
    pair.problem.sigma_high = given(pair, sigma_high);
    pair.problem.generates = true;
    pair.problem.to_least = cm;
    pair.problem.end = given(pair, sigma_min);
    pair.problem.scales = scales;
    pair.problem.sigma_data = given(pair, sigma_data);
    pair.problem.key = key_given(pair, seed, at, sample_id);
    return pair.run(Device());
  }
};

template <class Device>
void register_noise(Library& library) {
  register_op<Draw<Device, Distribution::normal>, NumberArguments, TensorArguments>(library, "normal");
  register_op<Draw<Device, Distribution::uniform>, NumberArguments, TensorArguments>(library, "uniform");
  register_op<GivenPair<Device>, NumberArguments, TensorArguments>(library, "noisy_pair");
  register_op<GeneratedPair<Device>, NumberArguments, TensorArguments>(library, "generated_pair");
  register_function<&fold_in_tensors<Device>>(library, "fold_in");
}

}  // namespace bicm
