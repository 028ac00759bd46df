// The Python module `bicm_emulator`: every instruction set's CPU kernels and the CUDA kernels on the host, over NumPy
// arrays and without torch, so that tests can run under the sanitizers.
#include <pybind11/pybind11.h>

#include "../core/half.h"
#include "../cpu/kernels.h"
#include "arrays.h"
#include "runtime.h"

namespace bicm {
namespace emulator {

namespace {

struct Known {
  const char* name;
  DType dtype;
  int64_t size;
};
constexpr Known kKnown[] = {{"float16", DType::float16, 2}, {"bfloat16", DType::bfloat16, 2},
                            {"float32", DType::float32, 4}, {"float64", DType::float64, 8},
                            {"int32", DType::int32, 4},     {"int64", DType::int64, 8}};

int64_t item_size(DType dtype) {
  for (const Known& known : kKnown) {
    if (known.dtype == dtype) return known.size;
  }
  return 0;
}

}  // namespace

View view_of(py::handle given) {
  std::string name;
  py::array array;
  if (py::isinstance<py::tuple>(given)) {
    const auto pair = given.cast<std::pair<py::array, std::string>>();
    array = pair.first;
    name = pair.second;
  } else {
    if (!py::isinstance<py::array>(given)) throw py::type_error("expected a NumPy array or a pair (array, dtype)");
    array = py::reinterpret_borrow<py::array>(given);
    name = py::str(array.dtype());
  }
  for (const auto& [known, dtype, item] : kKnown) {
    if (name != known || array.itemsize() != item) continue;
    View view = {const_cast<void*>(array.data()), dtype, {}, {}};
    for (py::ssize_t dim = 0; dim < array.ndim(); ++dim) {
      if (array.strides(dim) % item != 0) throw py::value_error("strides must be whole elements");
      view.sizes.push_back(array.shape(dim));
      view.strides.push_back(array.strides(dim) / item);
    }
    return view;
  }
  throw py::type_error("not an array of float16, bfloat16, float32, float64, int32 or int64: " + name);
}

namespace {

// The bytes between a view's first and last element.
Range range_of(const View& view) {
  int64_t first = 0, last = 0;
  for (size_t dim = 0; dim < view.sizes.size(); ++dim) {
    if (view.sizes[dim] == 0) return {0, 0};
    const int64_t reach = (view.sizes[dim] - 1) * view.strides[dim];
    (reach < 0 ? first : last) += reach;
  }
  const int64_t item = item_size(view.dtype), data = reinterpret_cast<int64_t>(view.data);
  return {static_cast<uintptr_t>(data + first * item), static_cast<uintptr_t>(data + (last + 1) * item)};
}

bool is_array(py::handle value) { return py::isinstance<py::array>(value) || py::isinstance<py::tuple>(value); }

int64_t stride_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t batch) {
  if (sizes.empty()) return 0;
  if (sizes.size() != 1 || sizes[0] != batch) throw py::value_error("expected a number, a 0-d or a (B,) array");
  return strides[0];
}

}  // namespace

Number number_of(py::handle value, int64_t batch) {
  if (value.is_none()) return {0.0, nullptr, 0, DType::float64};
  if (!is_array(value)) return {value.cast<double>(), nullptr, 0, DType::float64};
  const View view = view_of(value);
  ranges.push_back(range_of(view));
  return {0.0, view.data, stride_of(view.sizes, view.strides, batch), view.dtype};
}

Integer integer_of(py::handle value, int64_t batch) {
  if (!py::isinstance<py::array>(value)) return {value.cast<int64_t>(), nullptr, 0};
  const auto array = py::array_t<int64_t, 0>::ensure(value);
  if (!array || array.data() != py::reinterpret_borrow<py::array>(value).data()) {
    throw py::type_error("expected an int64 array");
  }
  const View view = view_of(array);
  ranges.push_back(range_of(view));
  return {0, array.data(), stride_of(view.sizes, view.strides, batch)};
}

NoiseKey key_of(py::handle seed, py::handle step, py::handle sample, bool counts, int64_t batch) {
  return {integer_of(seed, batch), integer_of(step, batch), integer_of(sample, batch), counts};
}

void watch(const Views& views) {
  ranges.clear();
  for (const auto& [view, operand] : views) ranges.push_back(range_of(view));
}

void lay_out(const Views& views, bool merge, Layout& layout) {
  watch(views);
  const View& first = views[0].first;
  if (first.sizes.empty()) throw py::value_error("a tensor has a batch dimension");
  for (const auto& [view, operand] : views) {
    if (view.sizes != first.sizes) throw py::value_error("tensors differ in shape");
    operand->data = view.data;
    operand->dtype = view.dtype;
    operand->batch_stride = view.strides[0];
  }
  layout.batch = first.sizes[0];
  layout.elements = 1;
  layout.dims = 0;
  for (size_t dim = 1; dim < first.sizes.size(); ++dim) {
    const int64_t size = first.sizes[dim];
    layout.elements *= size;
    bool joins = merge && layout.dims > 0;
    for (const auto& [view, operand] : views) {
      joins = joins && operand->strides[layout.dims - 1] == view.strides[dim] * size;
    }
    if (!joins) {
      if (layout.dims == kMaxDims) throw py::value_error("more than 8 dimensions that cannot be merged");
      layout.sizes[layout.dims++] = 1;
    }
    layout.sizes[layout.dims - 1] *= size;
    for (const auto& [view, operand] : views) operand->strides[layout.dims - 1] = view.strides[dim];
  }
  if (layout.dims == 0) {
    layout.sizes[layout.dims++] = 1;
    for (const auto& [view, operand] : views) operand->strides[0] = 1;
  }
  for (const auto& [view, operand] : views) {
    int64_t expected = 1;
    operand->dense = true;
    for (int dim = layout.dims - 1; dim >= 0; --dim) {
      operand->dense = operand->dense && (layout.sizes[dim] == 1 || operand->strides[dim] == expected);
      expected *= layout.sizes[dim];
    }
  }
}

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
#define BICM_NAME(isa) #isa,
  for (const char* name : {BICM_EACH_ISA(BICM_NAME)}) {
    if (find_kernels(name) != nullptr) names.push_back(name);
  }
  return names;
}

py::array widen(py::array_t<uint16_t, py::array::c_style> bits, const std::string& dtype) {
  py::array_t<float> result(bits.size());
  const auto convert = dtype == "float16" ? [](uint16_t x) { return half_to_float(x); }
                                          : [](uint16_t x) { return bfloat16_to_float(x); };
  for (py::ssize_t i = 0; i < bits.size(); ++i) result.mutable_data()[i] = convert(bits.data()[i]);
  return result;
}

py::array narrow(py::array_t<float, py::array::c_style> values, const std::string& dtype) {
  py::array_t<uint16_t> result(values.size());
  const auto convert =
      dtype == "float16" ? [](float x) { return float_to_half(x); } : [](float x) { return float_to_bfloat16(x); };
  for (py::ssize_t i = 0; i < values.size(); ++i) result.mutable_data()[i] = convert(values.data()[i]);
  return result;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

}  // namespace

}  // namespace emulator
}  // namespace bicm

PYBIND11_MODULE(bicm_emulator, module) {
  using namespace bicm::emulator;
  module.doc() = "CPU kernels of every instruction set and CUDA kernels on the host, over NumPy arrays";
  module.attr("CHUNK") = bicm::kChunk;
  module.attr("SANITIZED") = kSanitized;
  module.def("instruction_sets", &instruction_sets, "The instruction sets that this processor has");
  module.def("widen", &widen, py::arg("bits"), py::arg("dtype"), "Halves as float32, by core/half.h");
  module.def("narrow", &narrow, py::arg("values"), py::arg("dtype"), "float32 as halves, by core/half.h");
  py::class_<Device>(module, "Device", "Settings of the emulated GPU")
      .def_readwrite("processors", &Device::processors)
      .def_readwrite("x", &Device::x)
      .def_readwrite("y", &Device::y)
      .def_readwrite("threads", &Device::threads)
      .def_readwrite("from_block", &Device::from_block)
      .def_readwrite("until_block", &Device::until_block)
      .def_readwrite("backwards", &Device::backwards)
      .def_readwrite("fails", &Device::fails)
      .def_readwrite("captures", &Device::captures)
      .def_readwrite("full", &Device::full)
      .def_readwrite("stream", &Device::stream)
      .def_readwrite("has_clusters", &Device::has_clusters)
      .def_readwrite("skips_barriers", &Device::skips_barriers)
      .def_readwrite("skips_cluster_barriers", &Device::skips_cluster_barriers)
      .def_readwrite("mistakes_peer", &Device::mistakes_peer)
      .def_readonly("launches", &Device::launches)
      .def_readonly("threads_of_grid", &Device::threads_of_grid)
      .def_readonly("memsets", &Device::memsets);
  py::class_<Traffic>(module, "Traffic",
                      "Bytes that CUDA kernels moved: of tensors, and of numbers that a block shares")
      .def_readwrite("read", &Traffic::read)
      .def_readwrite("written", &Traffic::written)
      .def_readwrite("numbers", &Traffic::numbers);
  module.attr("traffic") = py::cast(&traffic, py::return_value_policy::reference);
  module.attr("device") = py::cast(&device, py::return_value_policy::reference);
  bind_noise(module);
  bind_multistep(module);
  bind_pseudo_huber(module);
  bind_gaussian(module);
  bind_reversible(module);
  bind_cooperation(module);
}
