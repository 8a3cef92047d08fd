// One call from Python: the device and the stream that its kernels run on, memory for the time of the call, and what
// the emulator lets them reach.
#pragma once

#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/extra/c_env_api.h>

#include "cuda/device.cuh"
#include "s3d/arguments.h"

#ifdef S3D_EMULATOR
#include <deque>

#include "emulator/global_memory.h"
#else
#include "cuda/launch.cuh"
#endif

namespace s3d {

template <>
inline constexpr DLDataType kElement<cuda::bf16> = {kDLBfloat, 16, 1};
template <>
inline constexpr DLDataType kElement<cuda::fp16> = {kDLFloat, 16, 1};

namespace cuda {

// Until its end kernels run on the device of `tensor`, on the stream that is current there for the caller.
class OnDeviceOf {
 public:
#ifdef S3D_EMULATOR
  explicit OnDeviceOf(const TensorView& tensor) {
    call_device = tensor.device();
    buffers().clear();
    on_tensor = [](const void* data, size_t bytes, const char* name) { buffers().emplace_back(data, bytes, name); };
  }
  ~OnDeviceOf() { buffers().clear(); }
  cudaStream_t stream() const { return nullptr; }

 private:
  static std::deque<emulator::RegisteredBuffer>& buffers() {
    static std::deque<emulator::RegisteredBuffer> all;
    return all;
  }
#else
  explicit OnDeviceOf(const TensorView& tensor) {
    call_device = tensor.device();
    if (call_device.device_type != kDLCUDA) TVM_FFI_THROW(ValueError) << "tensors must lie on a CUDA device";
    check_launch(cudaGetDevice(&before_), "a kernel");
    if (before_ != call_device.device_id) check_launch(cudaSetDevice(call_device.device_id), "a kernel");
    stream_ = static_cast<cudaStream_t>(TVMFFIEnvGetStream(call_device.device_type, call_device.device_id));
  }
  // An error here is that of a call before, or shows in the next one; to throw while one is thrown ends the process.
  ~OnDeviceOf() {
    if (before_ != call_device.device_id) cudaSetDevice(before_);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  int before_ = 0;
  cudaStream_t stream_;
#endif
};

// Memory of the caller's allocator, which may hand it on as soon as the call has ended: to work of the same stream.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : tensor_(tvm::ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, tvm::ffi::Shape{count}, kElement<T>,
                                               call_device)) {
    if (on_tensor != nullptr) on_tensor(data(), count * sizeof(T), "scratch");
  }
  T* data() const { return static_cast<T*>(tensor_.data_ptr()); }

 private:
  tvm::ffi::Tensor tensor_;
};

}  // namespace cuda
}  // namespace s3d
