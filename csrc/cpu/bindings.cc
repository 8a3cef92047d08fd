// What Python calls, behind the tensor ABI of apache-tvm-ffi. Every argument is checked here: bad input is an exception.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace {

using s3d::bfloat16;
using s3d::computed;
using s3d::float16;
using s3d::Triple;
using s3d::Window;
using tvm::ffi::Array;
using tvm::ffi::String;
using tvm::ffi::TensorView;
using MaybeTensor = tvm::ffi::Optional<TensorView>;

const std::vector<const s3d::cpu::InstructionSet*>& sets() {
  static const std::vector<const s3d::cpu::InstructionSet*> all = {
#ifdef __x86_64__
      &s3d::cpu::avx512(), &s3d::cpu::avx2(),
#endif
      &s3d::cpu::generic()};
  return all;
}

const s3d::cpu::InstructionSet*& current() {
  static const s3d::cpu::InstructionSet* chosen = [] {
    for (const auto* set : sets()) {
      if (set->supported()) return set;
    }
    return sets().back();
  }();
  return chosen;
}

template <typename S>
const s3d::cpu::Kernels<S>& kernels() {
  return std::get<s3d::cpu::Kernels<S>>(current()->conv);
}
template <typename S>
const s3d::cpu::NormKernels<S>& norm_kernels() {
  return std::get<s3d::cpu::NormKernels<S>>(current()->norm);
}
template <typename S>
const s3d::cpu::PoolKernels<S>& pool_kernels() {
  return std::get<s3d::cpu::PoolKernels<S>>(current()->pool);
}

std::string text(const TensorView& t) {
  std::string result = "[";
  for (int i = 0; i < t.ndim(); ++i) result += (i ? ", " : "") + std::to_string(t.size(i));
  return result + "]";
}

bool has_type(const TensorView& t, DLDataTypeCode code, int bits) {
  return t.dtype().code == code && t.dtype().bits == bits && t.dtype().lanes == 1;
}

template <typename T>
bool is(const TensorView& t);
template <>
bool is<float>(const TensorView& t) {
  return has_type(t, kDLFloat, 32);
}
template <>
bool is<double>(const TensorView& t) {
  return has_type(t, kDLFloat, 64);
}
template <>
bool is<bfloat16>(const TensorView& t) {
  return has_type(t, kDLBfloat, 16);
}
template <>
bool is<float16>(const TensorView& t) {
  return has_type(t, kDLFloat, 16);
}
template <>
bool is<int32_t>(const TensorView& t) {
  return has_type(t, kDLInt, 32);
}
template <>
bool is<uint8_t>(const TensorView& t) {
  return has_type(t, kDLUInt, 8);
}

// The data of a contiguous CPU tensor of this element type and shape.
template <typename T>
T* data(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) {
  if (t.device().device_type != kDLCPU) TVM_FFI_THROW(ValueError) << name << " must lie on the CPU";
  if (!is<T>(t)) TVM_FFI_THROW(TypeError) << name << " has the wrong dtype";
  bool fits = t.ndim() == static_cast<int>(shape.size());
  std::string wanted = "[";
  int axis = 0;
  for (int64_t size : shape) {
    fits = fits && t.size(axis) == size;
    wanted += (axis++ ? ", " : "") + std::to_string(size);
  }
  if (!fits) TVM_FFI_THROW(ValueError) << name << " must have shape " << wanted << "], got " << text(t);
  if (!t.IsContiguous()) TVM_FFI_THROW(ValueError) << name << " must be contiguous";
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

template <typename T>
T* data(const MaybeTensor& t, const char* name, std::initializer_list<int64_t> shape) {
  return t.has_value() ? data<T>(t.value(), name, shape) : nullptr;
}

// Calls call(T()) with the type of the elements of features.
template <typename Call>
void by_dtype(const TensorView& t, const char* name, const Call& call) {
  if (is<float>(t)) return call(float());
  if (is<double>(t)) return call(double());
  if (is<bfloat16>(t)) return call(bfloat16());
  if (is<float16>(t)) return call(float16());
  TVM_FFI_THROW(TypeError) << name << " has the wrong dtype: it must be float32, float64, bfloat16 or float16";
}

Triple triple(const Array<int64_t>& sizes, int at) {
  return {sizes[at], sizes[at + 1], sizes[at + 2]};
}

void check_positive(const Triple& t, const char* name, int64_t least) {
  if (t.d < least || t.h < least || t.w < least) TVM_FFI_THROW(ValueError) << name << " must be at least " << least;
}

int checked_threads(int64_t threads) {
  if (threads < 1 || threads > 1 << 16) TVM_FFI_THROW(ValueError) << "threads must be at least 1, got " << threads;
  return static_cast<int>(threads);
}

// A window with its checked tables. sizes: batch, radius, shape, target_block, kernel_size, stride, padding.
struct Geometry {
  Geometry(int64_t source_rows, int64_t target_rows, const MaybeTensor& source_voxels, const MaybeTensor& target_voxels,
           const TensorView& table, const Array<int64_t>& sizes) {
    if (sizes.size() != 19) TVM_FFI_THROW(ValueError) << "sizes must hold 19 numbers, got " << sizes.size();
    Window& w = forward;
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
    for (int64_t i = 0; i < target_rows * w.columns(); ++i) {
      if (w.table[i] < -1 || w.table[i] >= source_rows) {
        TVM_FFI_THROW(IndexError) << "table holds row " << w.table[i] << " of " << source_rows;
      }
    }
    const Triple g = w.gathered_block;
    w.written_voxels = data<uint8_t>(target_voxels, "target_voxels", {target_rows, b.d, b.h, b.w});
    w.gathered_voxels = data<uint8_t>(source_voxels, "source_voxels", {source_rows, g.d, g.h, g.w});
  }

  // Inputs are written, outputs are gathered.
  Window transposed() {
    reversed = s3d::reverse_table(forward.table, forward.written_rows, forward.columns(), forward.gathered_rows);
    Window w = forward;
    std::swap(w.written_rows, w.gathered_rows);
    std::swap(w.written_block, w.gathered_block);
    std::swap(w.written_voxels, w.gathered_voxels);
    w.table = reversed.data();
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
  Triple shape;
  std::vector<int32_t> reversed;
};

int64_t last_size(const TensorView& t, const char* name) {
  if (t.ndim() != 5) TVM_FFI_THROW(ValueError) << name << " must have 5 dimensions, got shape " << text(t);
  return t.size(4);
}

void check_groups(int64_t in_channels, int64_t out_channels, int64_t groups) {
  if (groups < 1 || in_channels % groups || out_channels % groups || in_channels < 1 || out_channels < 1) {
    TVM_FFI_THROW(ValueError) << "groups must divide the channels (" << in_channels << " and " << out_channels << "), got "
                              << groups;
  }
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

// 0: choose, 1: direct, 2: Winograd where it applies.
int64_t& method() {
  static int64_t chosen = 0;
  return chosen;
}

bool use_winograd(const Window& w, int64_t in_channels, int64_t out_channels, int64_t groups, int64_t least_voxels) {
  if (method() == 1 || groups != 1 || !current()->winograd_applies(w)) return false;
  // Weights are transformed at each call, which pays for enough voxels; with few channels the transforms cost too much.
  // Where it pays was measured: docs/performance.md.
  const int64_t voxels = w.written_rows * w.written_block.volume();
  return method() == 2 || (voxels >= least_voxels && std::min(in_channels, out_channels) >= 16);
}

template <typename T>
void convolve(const Window& w, const T* gathered, const T* weight, const T* bias, T* written, int64_t in_channels,
              int64_t out_channels, int64_t groups, int threads) {
  if (use_winograd(w, in_channels, out_channels, groups, 128)) {
    kernels<T>().conv3d_winograd(w, gathered, weight, bias, written, in_channels, out_channels, threads);
  } else {
    kernels<T>().conv3d(w, gathered, weight, bias, written, in_channels, out_channels, groups, threads);
  }
}

template <typename T>
void conv3d_of(const TensorView& x, const TensorView& weight, const MaybeTensor& bias, Geometry& g, int64_t groups,
               const TensorView& y, int threads) {
  const int64_t in = last_size(x, "x"), out = last_size(y, "y");
  check_groups(in, out, groups);
  const Triple k = g.forward.kernel;
  const T* w = data<T>(weight, "weight", {out, in / groups, k.d, k.h, k.w});
  convolve<T>(g.forward, g.source<T>(x, "x", in), w, data<T>(bias, "bias", {out}), g.target<T>(y, "y", out), in, out,
              groups, threads);
}

void conv3d(TensorView x, TensorView weight, MaybeTensor bias, MaybeTensor source_voxels, MaybeTensor target_voxels,
            TensorView table, Array<int64_t> sizes, int64_t groups, TensorView y, int64_t threads) {
  guarded([&] {
    Geometry g(x.size(0), y.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { conv3d_of<decltype(t)>(x, weight, bias, g, groups, y, n); });
  });
}

template <typename T>
void conv3d_grad_input_of(const TensorView& grad, const TensorView& weight, Geometry& g, int64_t groups,
                          const TensorView& grad_x, int threads) {
  const int64_t in = last_size(grad_x, "grad_x"), out = last_size(grad, "grad");
  check_groups(in, out, groups);
  const Triple k = g.forward.kernel;
  const T* w = data<T>(weight, "weight", {out, in / groups, k.d, k.h, k.w});
  convolve<T>(g.transposed(), g.target<T>(grad, "grad", out), w, nullptr, g.source<T>(grad_x, "grad_x", in), in, out,
              groups, threads);
}

void conv3d_grad_input(TensorView grad, TensorView weight, MaybeTensor source_voxels, MaybeTensor target_voxels,
                       TensorView table, Array<int64_t> sizes, int64_t groups, TensorView grad_x, int64_t threads) {
  guarded([&] {
    Geometry g(grad_x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) { conv3d_grad_input_of<decltype(t)>(grad, weight, g, groups, grad_x, n); });
  });
}

template <typename T>
void conv3d_grad_weight_of(const TensorView& grad, const TensorView& x, Geometry& g, int64_t groups,
                           const TensorView& grad_weight, const TensorView& grad_bias, int threads) {
  const int64_t in = last_size(x, "x"), out = last_size(grad, "grad");
  check_groups(in, out, groups);
  const Triple k = g.forward.kernel;
  T* w = data<T>(grad_weight, "grad_weight", {out, in / groups, k.d, k.h, k.w});
  const T* from = g.target<T>(grad, "grad", out);
  const T* inputs = g.source<T>(x, "x", in);
  if (use_winograd(g.forward, in, out, groups, 128)) {
    kernels<T>().conv3d_grad_weight_winograd(g.forward, from, inputs, w, in, out, threads);
  } else {
    kernels<T>().conv3d_grad_weight(g.forward, from, inputs, w, in, out, groups, threads);
  }
  const int32_t offsets[2] = {0, static_cast<int32_t>(g.forward.written_rows)};
  const s3d::cpu::Rows rows = {1, offsets, g.forward.written_block.volume(), g.forward.written_voxels};
  norm_kernels<T>().channel_sums(rows, from, data<T>(grad_bias, "grad_bias", {out}), out, threads);
}

void conv3d_grad_weight(TensorView grad, TensorView x, MaybeTensor source_voxels, MaybeTensor target_voxels,
                        TensorView table, Array<int64_t> sizes, int64_t groups, TensorView grad_weight,
                        TensorView grad_bias, int64_t threads) {
  guarded([&] {
    Geometry g(x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) {
      conv3d_grad_weight_of<decltype(t)>(grad, x, g, groups, grad_weight, grad_bias, n);
    });
  });
}

const int32_t* checked_index(const TensorView& index, int64_t rows, int64_t batch, const Triple& grid) {
  const int32_t* all = data<int32_t>(index, "index", {rows, 4});
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t* at = all + i * 4;
    if (at[0] < 0 || at[0] >= batch || at[1] < 0 || at[1] >= grid.d || at[2] < 0 || at[2] >= grid.h || at[3] < 0 ||
        at[3] >= grid.w) {
      TVM_FFI_THROW(IndexError) << "index row " << i << " lies outside the grid";
    }
  }
  return all;
}

Triple grid_of(const Triple& shape, const Triple& block) {
  const auto cells = [](int64_t size, int64_t side) { return (size + side - 1) / side; };
  return {cells(shape.d, block.d), cells(shape.h, block.h), cells(shape.w, block.w)};
}

template <typename T>
void pool3d_of(const TensorView& x, const TensorView& target_index, Geometry& g, int64_t batch, bool maximum,
               int64_t divisor, const TensorView& y, int threads) {
  const int64_t channels = last_size(x, "x");
  const T* in = g.source<T>(x, "x", channels);
  T* out = g.target<T>(y, "y", channels);
  const Triple grid = grid_of(g.shape, g.forward.gathered_block);
  const s3d::cpu::Place place = {checked_index(target_index, g.forward.written_rows, batch, grid), g.shape};
  if (maximum) {
    pool_kernels<T>().maximum(g.forward, place, in, out, nullptr, channels, threads);
  } else {
    pool_kernels<T>().average(g.forward, place, in, out, channels, divisor, threads);
  }
}

void pool3d(TensorView x, MaybeTensor source_voxels, TensorView target_index, MaybeTensor target_voxels,
            TensorView table, Array<int64_t> sizes, bool maximum, int64_t divisor, TensorView y, int64_t threads) {
  guarded([&] {
    Geometry g(x.size(0), y.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { pool3d_of<decltype(t)>(x, target_index, g, sizes[0], maximum, divisor, y, n); });
  });
}

template <typename T>
void pool3d_grad_of(const TensorView& grad, const MaybeTensor& x, const TensorView& target_index, Geometry& g,
                    int64_t batch, int64_t divisor, const TensorView& grad_x, int threads) {
  const int64_t channels = last_size(grad, "grad");
  const T* from = g.target<T>(grad, "grad", channels);
  T* to = g.source<T>(grad_x, "grad_x", channels);
  const Triple grid = grid_of(g.shape, g.forward.gathered_block);
  const s3d::cpu::Place place = {checked_index(target_index, g.forward.written_rows, batch, grid), g.shape};
  const Window back = g.transposed();
  if (!x.has_value()) {
    return pool_kernels<T>().average_grad(g.forward, back, place, from, to, channels, divisor, threads);
  }
  const int64_t outputs = g.forward.written_rows * g.forward.written_block.volume();
  std::vector<T> values(outputs * channels);
  std::vector<int32_t> winners(outputs * channels);
  const T* in = g.source<T>(x.value(), "x", channels);
  pool_kernels<T>().maximum(g.forward, place, in, values.data(), winners.data(), channels, threads);
  pool_kernels<T>().maximum_grad(back, winners.data(), from, to, channels, threads);
}

// With x it is the gradient of the maximum, without that of the average.
void pool3d_grad(TensorView grad, MaybeTensor x, MaybeTensor source_voxels, TensorView target_index,
                 MaybeTensor target_voxels, TensorView table, Array<int64_t> sizes, int64_t divisor, TensorView grad_x,
                 int64_t threads) {
  guarded([&] {
    Geometry g(grad_x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) {
      pool3d_grad_of<decltype(t)>(grad, x, target_index, g, sizes[0], divisor, grad_x, n);
    });
  });
}

// Samples and blocks of features x [V, bd, bh, bw, C].
s3d::cpu::Rows rows_of(const TensorView& x, const MaybeTensor& voxels, const TensorView& offsets) {
  last_size(x, "x");
  if (offsets.ndim() != 1 || offsets.size(0) < 1) TVM_FFI_THROW(ValueError) << "sample_offsets must be a vector";
  const int64_t samples = offsets.size(0) - 1;
  const int32_t* at = data<int32_t>(offsets, "sample_offsets", {samples + 1});
  for (int64_t n = 0; n < samples; ++n) {
    if (at[n] > at[n + 1]) TVM_FFI_THROW(ValueError) << "sample_offsets must not decrease";
  }
  if (at[0] != 0 || at[samples] != x.size(0)) {
    TVM_FFI_THROW(ValueError) << "sample_offsets must run from 0 to " << x.size(0) << ", got " << at[0] << " to " << at[samples];
  }
  const uint8_t* shown = data<uint8_t>(voxels, "voxels", {x.size(0), x.size(1), x.size(2), x.size(3)});
  return {samples, at, x.size(1) * x.size(2) * x.size(3), shown};
}

template <typename T>
T* like(const TensorView& t, const char* name, const TensorView& x) {
  return data<T>(t, name, {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)});
}
template <typename T>
T* like(const MaybeTensor& t, const char* name, const TensorView& x) {
  return t.has_value() ? like<T>(t.value(), name, x) : nullptr;
}

template <typename S>
void norm_statistics_of(const s3d::cpu::Rows& rows, const TensorView& x, const TensorView& mean, const TensorView& squares,
                        int threads) {
  using T = computed<S>;
  const int64_t c = x.size(4);
  norm_kernels<S>().statistics(rows, like<S>(x, "x", x), data<T>(mean, "mean", {rows.samples, c}),
                               data<T>(squares, "squares", {rows.samples, c}), c, threads);
}

void norm_statistics(TensorView x, MaybeTensor voxels, TensorView offsets, TensorView mean, TensorView squares,
                     int64_t threads) {
  guarded([&] {
    const s3d::cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { norm_statistics_of<decltype(t)>(rows, x, mean, squares, n); });
  });
}

template <typename S>
void norm_apply_of(const s3d::cpu::Rows& rows, const TensorView& x, const TensorView& mean, const TensorView& scale,
                   const TensorView& shift, const MaybeTensor& residual, double slope, const TensorView& y, int threads) {
  using T = computed<S>;
  const int64_t c = x.size(4), n = rows.samples;
  norm_kernels<S>().apply(rows, like<S>(x, "x", x), data<T>(mean, "mean", {n, c}), data<T>(scale, "scale", {n, c}),
                          data<T>(shift, "shift", {n, c}), like<S>(residual, "residual", x), static_cast<T>(slope),
                          like<S>(y, "y", x), c, threads);
}

void norm_apply(TensorView x, TensorView mean, TensorView scale, TensorView shift, MaybeTensor residual, double slope,
                MaybeTensor voxels, TensorView offsets, TensorView y, int64_t threads) {
  guarded([&] {
    const s3d::cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { norm_apply_of<decltype(t)>(rows, x, mean, scale, shift, residual, slope, y, n); });
  });
}

template <typename S>
void norm_grad_sums_of(const s3d::cpu::Rows& rows, const TensorView& grad, const TensorView& x, const MaybeTensor& y,
                       const TensorView& mean, const TensorView& rstd, const TensorView& scale, const TensorView& shift,
                       double slope, const MaybeTensor& before, const TensorView& of_grad, const TensorView& of_product,
                       int threads) {
  using T = computed<S>;
  const int64_t c = x.size(4), n = rows.samples;
  norm_kernels<S>().grad_sums(rows, like<S>(grad, "grad", x), like<S>(x, "x", x), like<S>(y, "y", x),
                              data<T>(mean, "mean", {n, c}), data<T>(rstd, "rstd", {n, c}),
                              data<T>(scale, "scale", {n, c}), data<T>(shift, "shift", {n, c}), static_cast<T>(slope),
                              like<S>(before, "before", x), data<T>(of_grad, "of_grad", {n, c}),
                              data<T>(of_product, "of_product", {n, c}), c, threads);
}

void norm_grad_sums(TensorView grad, TensorView x, MaybeTensor y, TensorView mean, TensorView rstd, TensorView scale,
                    TensorView shift, double slope, MaybeTensor voxels, TensorView offsets, MaybeTensor before,
                    TensorView of_grad, TensorView of_product, int64_t threads) {
  guarded([&] {
    const s3d::cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) {
      norm_grad_sums_of<decltype(t)>(rows, grad, x, y, mean, rstd, scale, shift, slope, before, of_grad, of_product, n);
    });
  });
}

template <typename S>
void norm_grad_input_of(const s3d::cpu::Rows& rows, const TensorView& grad, const TensorView& x, const TensorView& mean,
                        const TensorView& rstd, const TensorView& scale, const TensorView& offset, const TensorView& tilt,
                        const TensorView& grad_x, int threads) {
  using T = computed<S>;
  const int64_t c = x.size(4), n = rows.samples;
  norm_kernels<S>().grad_input(rows, like<S>(grad, "grad", x), like<S>(x, "x", x), data<T>(mean, "mean", {n, c}),
                               data<T>(rstd, "rstd", {n, c}), data<T>(scale, "scale", {n, c}),
                               data<T>(offset, "offset", {n, c}), data<T>(tilt, "slope", {n, c}),
                               like<S>(grad_x, "grad_x", x), c, threads);
}

void norm_grad_input(TensorView grad, TensorView x, TensorView mean, TensorView rstd, TensorView scale,
                     TensorView offset, TensorView tilt, MaybeTensor voxels, TensorView offsets, TensorView grad_x,
                     int64_t threads) {
  guarded([&] {
    const s3d::cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) {
      norm_grad_input_of<decltype(t)>(rows, grad, x, mean, rstd, scale, offset, tilt, grad_x, n);
    });
  });
}

// The volume [N, C, D, H, W] of any strides.
s3d::cpu::Volume volume_of(const TensorView& dense) {
  last_size(dense, "dense");
  if (dense.device().device_type != kDLCPU) TVM_FFI_THROW(ValueError) << "dense must lie on the CPU";
  s3d::cpu::Volume v = {dense.size(0), dense.size(1), {dense.size(2), dense.size(3), dense.size(4)}, {}};
  for (int i = 0; i < 5; ++i) v.strides[i] = dense.strides()[i];
  return v;
}

Triple block_of(const TensorView& blocks) {
  last_size(blocks, "blocks");
  return {blocks.size(1), blocks.size(2), blocks.size(3)};
}

template <typename T>
void gather_of(const TensorView& dense, const TensorView& index, const MaybeTensor& voxels, const TensorView& blocks,
               int threads) {
  if (!is<T>(dense)) TVM_FFI_THROW(TypeError) << "dense has the wrong dtype";
  const s3d::cpu::Volume v = volume_of(dense);
  const Triple b = block_of(blocks);
  const int64_t rows = blocks.size(0);
  const T* from = reinterpret_cast<const T*>(static_cast<const char*>(dense.data_ptr()) + dense.byte_offset());
  s3d::cpu::gather<T>(from, v, checked_index(index, rows, v.batch, grid_of(v.shape, b)),
                      data<uint8_t>(voxels, "voxels", {rows, b.d, b.h, b.w}), b, rows,
                      data<T>(blocks, "blocks", {rows, b.d, b.h, b.w, v.channels}), threads);
}

void gather_blocks(TensorView dense, TensorView index, MaybeTensor voxels, TensorView blocks, int64_t threads) {
  guarded([&] {
    const int n = checked_threads(threads);
    by_dtype(dense, "dense", [&](auto t) { gather_of<decltype(t)>(dense, index, voxels, blocks, n); });
  });
}

template <typename T>
void scatter_of(const TensorView& blocks, const TensorView& fill, const TensorView& index, const MaybeTensor& voxels,
                const TensorView& dense, int threads) {
  const int64_t channels = last_size(blocks, "blocks"), rows = blocks.size(0);
  last_size(dense, "dense");
  const Triple b = block_of(blocks), shape = {dense.size(1), dense.size(2), dense.size(3)};
  const s3d::cpu::Volume v = {dense.size(0), channels, shape, {}};
  s3d::cpu::scatter<T>(data<T>(blocks, "blocks", {rows, b.d, b.h, b.w, channels}), data<T>(fill, "fill", {channels}), v,
                       checked_index(index, rows, v.batch, grid_of(shape, b)),
                       data<uint8_t>(voxels, "voxels", {rows, b.d, b.h, b.w}), b, rows,
                       data<T>(dense, "dense", {v.batch, shape.d, shape.h, shape.w, channels}), threads);
}

// dense: [N, D, H, W, C].
void scatter_blocks(TensorView blocks, TensorView fill, TensorView index, MaybeTensor voxels, TensorView dense,
                    int64_t threads) {
  guarded([&] {
    const int n = checked_threads(threads);
    by_dtype(blocks, "blocks", [&](auto t) { scatter_of<decltype(t)>(blocks, fill, index, voxels, dense, n); });
  });
}

// Names of the instruction sets that this processor has, best first.
Array<String> instruction_sets() {
  Array<String> names;
  for (const auto* set : sets()) {
    if (set->supported()) names.push_back(set->name);
  }
  return names;
}

String instruction_set() { return current()->name; }

void use_instruction_set(String name) {
  for (const auto* set : sets()) {
    if (name == set->name && set->supported()) {
      current() = set;
      return;
    }
  }
  TVM_FFI_THROW(ValueError) << "no instruction set " << name << " on this processor";
}

void use_method(int64_t number) {
  if (number < 0 || number > 2) TVM_FFI_THROW(ValueError) << "method must be 0, 1 or 2, got " << number;
  method() = number;
}

// Of the files that this was compiled from, see setup.py.
String sources() { return S3D_SOURCES; }

bool has_threads() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d, conv3d);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d_grad_input, conv3d_grad_input);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d_grad_weight, conv3d_grad_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pool3d, pool3d);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pool3d_grad, pool3d_grad);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_statistics, norm_statistics);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_apply, norm_apply);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_grad_sums, norm_grad_sums);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm_grad_input, norm_grad_input);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather_blocks, gather_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter_blocks, scatter_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_sets, instruction_sets);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_set, instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_instruction_set, use_instruction_set);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_method, use_method);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sources, sources);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_threads, has_threads);

}  // namespace
