// How the dispatcher calls an op.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensor.h"

// Since torch 2.13; absent from the oldest ABI that this library takes.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace bicm {

// An error that torch's C functions return is a number, and what their headers throw names a line of theirs. The reason,
// running out of memory for one, is kept by the thread.
[[noreturn]] inline void rethrow(const std::runtime_error& error) {
  const bool from_torch = std::strstr(error.what(), "API call failed") != nullptr;
  if (!from_torch || torch_exception_get_what_without_backtrace == nullptr) throw error;
  throw std::runtime_error(torch_exception_get_what_without_backtrace());
}

// An argument taken over from the dispatcher, and a result given to it.
template <class T>
struct Passed {
  static T take(StableIValue value) { return torch::stable::detail::to<T>(value); }
  static StableIValue give(T value) { return torch::stable::detail::from(value); }
};
template <>
struct Passed<Tensor> {
  static Tensor take(StableIValue value) { return Tensor(torch::stable::detail::to<AtenTensorHandle>(value)); }
  static StableIValue give(Tensor tensor) { return torch::stable::detail::from(tensor.release()); }
};
template <>
struct Passed<std::optional<Tensor>> {
  static std::optional<Tensor> take(StableIValue value) {
    const auto handle = torch::stable::detail::to<std::optional<AtenTensorHandle>>(value);
    if (!handle.has_value()) return std::nullopt;
    Tensor tensor(*handle);
    // TorchScript's optimised graphs hand an undefined tensor to an argument that is None.
    return tensor.defined() ? std::optional<Tensor>(std::move(tensor)) : std::nullopt;
  }
};
template <class T>
struct Passed<std::vector<T>> {
  static std::vector<T> take(StableIValue value) {
    struct List {
      StableListHandle handle;
      ~List() { torch_delete_list(handle); }
    } const list = {torch::stable::detail::to<StableListHandle>(value)};
    size_t size;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list.handle, &size));
    std::vector<T> items;
    items.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list.handle, i, &item));
      items.push_back(Passed<T>::take(item));
    }
    return items;
  }
  static StableIValue give(std::vector<T> items) {
    StableListHandle list;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(items.size(), &list));
    for (T& item : items) {
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, Passed<T>::give(std::move(item))));
    }
    return torch::stable::detail::from(list);
  }
};

// TORCH_BOX would copy every argument and every result once more.
template <auto Op>
struct Boxed;
template <class Result, class... Arguments, Result (*Op)(Arguments...)>
struct Boxed<Op> {
  static void call(StableIValue* stack, uint64_t count, uint64_t) {
    STD_TORCH_CHECK(count == sizeof...(Arguments), "the schema has other arguments than the kernel");
    try {
      call_on(stack, std::index_sequence_for<Arguments...>());
    } catch (const std::runtime_error& error) {
      rethrow(error);
    }
  }

 private:
  template <size_t... I>
  static void call_on(StableIValue* stack, std::index_sequence<I...>) {
    std::tuple<Arguments...> arguments{Passed<Arguments>::take(stack[I])...};
    if constexpr (std::is_void_v<Result>) {
      Op(std::move(std::get<I>(arguments))...);
    } else {
      give(stack, Op(std::move(std::get<I>(arguments))...));
    }
  }

  template <class T>
  static void give(StableIValue* stack, T result) {
    stack[0] = Passed<T>::give(std::move(result));
  }
  template <class... T>
  static void give(StableIValue* stack, std::tuple<T...> results) {
    std::apply([stack](T&... result) mutable { ((*stack++ = Passed<T>::give(std::move(result))), ...); }, results);
  }
};

using Library = torch::stable::detail::StableLibrary;

// One op, by its name and the overload's.
template <auto Op>
void register_function(Library& library, const std::string& name) {
  library.impl(name.c_str(), &Boxed<Op>::call);
}

// An op in both flavours. Op::run<A> returns its results.
template <class Op, class Numbers, class Tensors>
void register_op(Library& library, const std::string& name) {
  register_function<&Op::template run<Numbers>>(library, name);
  register_function<&Op::template run<Tensors>>(library, name + ".tensor");
}

// The same for one that also writes into tensors that the caller gives: Op::run<A, Outs...>, called with them last.
template <class Op, class Numbers, class Tensors, class... Outs>
void register_writing(Library& library, const std::string& name) {
  register_op<Op, Numbers, Tensors>(library, name);
  register_function<&Op::template run<Numbers, Outs...>>(library, name + ".out");
  register_function<&Op::template run<Tensors, Outs...>>(library, name + ".tensor_out");
}

}  // namespace bicm
