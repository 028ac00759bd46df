// How the dispatcher calls an op.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

// Since torch 2.13; absent from the oldest ABI that this library takes.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace bicm {

template <class T>
void drop_undefined(T&) {}

// TorchScript's optimised graphs pass an undefined tensor for an argument that is None.
inline void drop_undefined(std::optional<torch::stable::Tensor>& tensor) {
  if (tensor.has_value() && !tensor->defined()) tensor.reset();
}

// Torch's C functions return an error number, and their headers throw it with a source line only. The reason,
// such as running out of memory, is stored per thread.
[[noreturn]] inline void rethrow(const std::runtime_error& error) {
  const bool from_torch = std::strstr(error.what(), "API call failed") != nullptr;
  if (!from_torch || torch_exception_get_what_without_backtrace == nullptr) throw error;
  throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

template <auto Op>
struct Boxed;
template <class Result, class... Arguments, Result (*Op)(Arguments...)>
struct Boxed<Op> {
  static Result call(Arguments... arguments) {
    (drop_undefined(arguments), ...);
    try {
      return Op(std::move(arguments)...);
    } catch (const std::runtime_error& error) {
      rethrow(error);
    }
  }
};

}  // namespace bicm

#define BICM_BOX(op) TORCH_BOX((&::bicm::Boxed<op>::call))

namespace bicm {

using Library = torch::stable::detail::StableLibrary;

// An op in both flavours. Op::run<A> returns its results.
template <class Op, class Numbers, class Tensors>
void register_op(Library& library, const std::string& name) {
  library.impl(name.c_str(), BICM_BOX((&Op::template run<Numbers>)));
  library.impl((name + ".tensor").c_str(), BICM_BOX((&Op::template run<Tensors>)));
}

// The same for one that also writes into tensors that the caller gives: Op::run<A, Outs...>, called with them last.
template <class Op, class Numbers, class Tensors, class... Outs>
void register_writing(Library& library, const std::string& name) {
  register_op<Op, Numbers, Tensors>(library, name);
  library.impl((name + ".out").c_str(), BICM_BOX((&Op::template run<Numbers, Outs...>)));
  library.impl((name + ".tensor_out").c_str(), BICM_BOX((&Op::template run<Tensors, Outs...>)));
}

}  // namespace bicm
