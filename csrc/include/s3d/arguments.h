// Arguments of the functions that Python calls, behind the tensor ABI of apache-tvm-ffi: every one is checked here, and
// bad input is an exception that names it. What tensors hold is checked by the CPU library alone: a GPU's memory cannot
// be looked at without waiting for it.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "s3d/window.h"

namespace s3d {

using tvm::ffi::Array;
using tvm::ffi::TensorView;
using MaybeTensor = tvm::ffi::Optional<TensorView>;

// Where the tensors of the running call lie, all of them.
inline thread_local DLDevice call_device = {kDLCPU, 0};

// If set, told of every tensor of a call: the emulator lets kernels reach nothing else.
inline thread_local void (*on_tensor)(const void* data, size_t bytes, const char* name) = nullptr;

// The type of a tensor's elements; libraries add their types of 16 bits.
template <typename T>
inline constexpr DLDataType kElement = {};
template <>
inline constexpr DLDataType kElement<float> = {kDLFloat, 32, 1};
template <>
inline constexpr DLDataType kElement<double> = {kDLFloat, 64, 1};
template <>
inline constexpr DLDataType kElement<int32_t> = {kDLInt, 32, 1};
template <>
inline constexpr DLDataType kElement<int16_t> = {kDLInt, 16, 1};
template <>
inline constexpr DLDataType kElement<uint8_t> = {kDLUInt, 8, 1};

template <typename T>
bool is(const TensorView& t) {
  static_assert(kElement<T>.lanes == 1, "no type of tensors");
  return t.dtype().code == kElement<T>.code && t.dtype().bits == kElement<T>.bits && t.dtype().lanes == 1;
}

inline std::string text(const TensorView& t) {
  std::string result = "[";
  for (int i = 0; i < t.ndim(); ++i) result += (i ? ", " : "") + std::to_string(t.size(i));
  return result + "]";
}

// The data of a tensor of this element type, of any strides.
template <typename T>
T* strided_data(const TensorView& t, const char* name) {
  const DLDevice device = t.device();
  if (device.device_type != call_device.device_type || device.device_id != call_device.device_id) {
    const char* const wanted = call_device.device_type == kDLCPU ? "on the CPU" : "on the device of the other tensors";
    TVM_FFI_THROW(ValueError) << name << " must lie " << wanted;
  }
  if (!is<T>(t)) TVM_FFI_THROW(TypeError) << name << " has the wrong dtype";
  T* const data = reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
  if (on_tensor != nullptr) {
    int64_t elements = t.numel() > 0;
    for (int i = 0; elements > 0 && i < t.ndim(); ++i) elements += (t.size(i) - 1) * t.strides()[i];
    on_tensor(data, elements * sizeof(T), name);
  }
  return data;
}

// The data of a contiguous tensor of this element type and shape.
template <typename T>
T* data(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = t.ndim() == static_cast<int>(shape.size());
  std::string wanted = "[";
  int axis = 0;
  for (int64_t size : shape) {
    fits = fits && t.size(axis) == size;
    wanted += (axis++ ? ", " : "") + std::to_string(size);
  }
  if (!is<T>(t)) TVM_FFI_THROW(TypeError) << name << " has the wrong dtype";
  if (!fits) TVM_FFI_THROW(ValueError) << name << " must have shape " << wanted << "], got " << text(t);
  if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " must be contiguous";
  return strided_data<T>(t, name);
}

template <typename T>
T* data(const MaybeTensor& t, const char* name, std::initializer_list<int64_t> shape) {
  return t.has_value() ? data<T>(t.value(), name, shape) : nullptr;
}

inline Triple triple(const Array<int64_t>& sizes, int at) { return {sizes[at], sizes[at + 1], sizes[at + 2]}; }

inline void check_positive(const Triple& t, const char* name, int64_t least) {
  if (t.d < least || t.h < least || t.w < least) TVM_FFI_THROW(ValueError) << name << " must be at least " << least;
}

// A window with its tables. sizes: batch, radius, shape, target_block, kernel_size, stride, padding.
struct Geometry {
  Geometry(int64_t source_rows, int64_t target_rows, const MaybeTensor& source_voxels, const MaybeTensor& target_voxels,
           const TensorView& table, const Array<int64_t>& sizes) {
    if (sizes.size() != 19) TVM_FFI_THROW(ValueError) << "sizes must hold 19 numbers, got " << sizes.size();
    Window& w = forward;
    batch = sizes[0];
    w.radius = triple(sizes, 1);
    shape = triple(sizes, 4);
    w.written_block = triple(sizes, 7);
    w.kernel = triple(sizes, 10);
    w.stride = triple(sizes, 13);
    w.padding = triple(sizes, 16);
    check_positive(w.radius, "radius", 0);
    check_positive(shape, "shape", 1);
    check_positive(w.written_block, "target_block", 1);
    check_positive(w.kernel, "kernel_size", 1);
    check_positive(w.stride, "stride", 1);
    check_positive(w.padding, "padding", 0);
    const Triple b = w.written_block, s = w.stride;
    w.gathered_block = {b.d * s.d, b.h * s.h, b.w * s.w};
    w.written_rows = target_rows;
    w.gathered_rows = source_rows;
    w.transposed = false;
    w.table = data<int32_t>(table, "table", {target_rows, w.columns()});
    const Triple g = w.gathered_block;
    w.written_voxels = data<uint8_t>(target_voxels, "target_voxels", {target_rows, b.d, b.h, b.w});
    w.gathered_voxels = data<uint8_t>(source_voxels, "source_voxels", {source_rows, g.d, g.h, g.w});
  }

  // Inputs are written, outputs are gathered. reversed: see reverse_table.
  Window transposed(const int32_t* reversed) const {
    Window w = forward;
    std::swap(w.written_rows, w.gathered_rows);
    std::swap(w.written_block, w.gathered_block);
    std::swap(w.written_voxels, w.gathered_voxels);
    w.table = reversed;
    w.transposed = true;
    return w;
  }

  template <typename T>
  T* source(const TensorView& t, const char* name, int64_t channels) const {
    const Triple b = forward.gathered_block;
    return data<T>(t, name, {forward.gathered_rows, b.d, b.h, b.w, channels});
  }
  template <typename T>
  T* target(const TensorView& t, const char* name, int64_t channels) const {
    const Triple b = forward.written_block;
    return data<T>(t, name, {forward.written_rows, b.d, b.h, b.w, channels});
  }

  Window forward;
  int64_t batch;
  Triple shape;  // of the input volume
};

inline int64_t last_size(const TensorView& t, const char* name) {
  if (t.ndim() != 5) TVM_FFI_THROW(ValueError) << name << " must have 5 dimensions, got shape " << text(t);
  return t.size(4);
}

inline void check_groups(int64_t in_channels, int64_t out_channels, int64_t groups) {
  if (groups < 1 || in_channels % groups || out_channels % groups || in_channels < 1 || out_channels < 1) {
    TVM_FFI_THROW(ValueError) << "groups must divide the channels (" << in_channels << " and " << out_channels
                              << "), got " << groups;
  }
}

// The cells of a volume.
inline Triple grid_of(const Triple& shape, const Triple& block) {
  const auto cells = [](int64_t size, int64_t side) { return (size + side - 1) / side; };
  return {cells(shape.d, block.d), cells(shape.h, block.h), cells(shape.w, block.w)};
}

inline Triple block_of(const TensorView& blocks) {
  last_size(blocks, "blocks");
  return {blocks.size(1), blocks.size(2), blocks.size(3)};
}

// A tensor of the shape of x.
template <typename T>
T* like(const TensorView& t, const char* name, const TensorView& x) {
  return data<T>(t, name, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
}
template <typename T>
T* like(const MaybeTensor& t, const char* name, const TensorView& x) {
  return t.has_value() ? like<T>(t.value(), name, x) : nullptr;
}

inline int64_t samples_of(const TensorView& offsets) {
  if (offsets.ndim() != 1 || offsets.size(0) < 1) TVM_FFI_THROW(ValueError) << "sample_offsets must be a vector";
  return offsets.size(0) - 1;
}

// Exceptions of the C++ library become those of Python.
template <typename Call>
void guarded(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  } catch (const std::bad_alloc&) {
    TVM_FFI_THROW(MemoryError) << "out of memory in a native kernel";
  }
}

}  // namespace s3d
