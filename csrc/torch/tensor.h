// A tensor of the dispatcher's: one handle with one owner.
//
// torch::stable::Tensor shares each handle by a count of its own, and has to copy the handle where it is a result.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <utility>

// Since torch 2.13, whose check says more where its headers are asked for no older ABI.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace bicm {

class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorHandle owned) : handle_(owned) {}
  Tensor(const Tensor& other) {
    if (other.handle_ != nullptr) {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(other.handle_, &handle_));
    }
  }
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  bool defined() const { return asked<bool>(aoti_torch_is_defined); }
  void* data_ptr() const { return asked<void*>(aoti_torch_get_data_ptr); }
  int64_t dim() const { return asked<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return asked<int64_t>(aoti_torch_get_numel); }
  const int64_t* sizes() const { return asked<int64_t*>(aoti_torch_get_sizes); }
  const int64_t* strides() const { return asked<int64_t*>(aoti_torch_get_strides); }
  int32_t dtype() const { return asked<int32_t>(aoti_torch_get_dtype); }
  int32_t device_type() const { return asked<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return asked<int32_t>(aoti_torch_get_device_index); }

 private:
  template <class T>
  T asked(AOTITorchError (*question)(AtenTensorHandle, T*)) const {
    T answer;
    STABLE_TORCH_ERROR_CODE_CHECK(question(handle_, &answer));
    return answer;
  }

  AtenTensorHandle handle_ = nullptr;
};

}  // namespace bicm
