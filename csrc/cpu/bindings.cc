// What Python calls, behind the tensor ABI of apache-tvm-ffi. Every argument is checked here: bad input is an exception.
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <vector>

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "s3d/arguments.h"

namespace s3d {

template <>
inline constexpr DLDataType kElement<bfloat16> = {kDLBfloat, 16, 1};
template <>
inline constexpr DLDataType kElement<float16> = {kDLFloat, 16, 1};

namespace {

using tvm::ffi::String;

const std::vector<const cpu::InstructionSet*>& sets() {
  static const std::vector<const cpu::InstructionSet*> all = {
#ifdef __x86_64__
      &cpu::avx512(), &cpu::avx2(),
#endif
      &cpu::generic()};
  return all;
}

const cpu::InstructionSet*& current() {
  static const cpu::InstructionSet* chosen = [] {
    for (const auto* set : sets()) {
      if (set->supported()) return set;
    }
    return sets().back();
  }();
  return chosen;
}

template <typename S>
const cpu::Kernels<S>& kernels() {
  return std::get<cpu::Kernels<S>>(current()->conv);
}
template <typename S>
const cpu::UpconvKernels<S>& upconv_kernels() {
  return std::get<cpu::UpconvKernels<S>>(current()->upconv);
}
template <typename S>
const cpu::NormKernels<S>& norm_kernels() {
  return std::get<cpu::NormKernels<S>>(current()->norm);
}
template <typename S>
const cpu::PoolKernels<S>& pool_kernels() {
  return std::get<cpu::PoolKernels<S>>(current()->pool);
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

int checked_threads(int64_t threads) {
  if (threads < 1 || threads > 1 << 16) TVM_FFI_THROW(ValueError) << "threads must be at least 1, got " << threads;
  return static_cast<int>(threads);
}

// A geometry whose table is checked, and that keeps the table of the other direction.
struct CheckedGeometry : Geometry {
  template <typename... Arguments>
  explicit CheckedGeometry(Arguments&&... arguments) : Geometry(arguments...) {
    for (int64_t i = 0; i < forward.written_rows * forward.columns(); ++i) {
      if (forward.table[i] < -1 || forward.table[i] >= forward.gathered_rows) {
        TVM_FFI_THROW(IndexError) << "table holds row " << forward.table[i] << " of " << forward.gathered_rows;
      }
    }
  }

  // Inputs are written, outputs are gathered.
  Window transposed() {
    reversed = reverse_table(forward.table, forward.written_rows, forward.columns(), forward.gathered_rows);
    return Geometry::transposed(reversed.data());
  }

  std::vector<int32_t> reversed;
};

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
void conv3d_of(const TensorView& x, const TensorView& weight, const MaybeTensor& bias, CheckedGeometry& g, int64_t groups,
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
    CheckedGeometry g(x.size(0), y.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { conv3d_of<decltype(t)>(x, weight, bias, g, groups, y, n); });
  });
}

template <typename T>
void conv3d_grad_input_of(const TensorView& grad, const TensorView& weight, CheckedGeometry& g, int64_t groups,
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
    CheckedGeometry g(grad_x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) { conv3d_grad_input_of<decltype(t)>(grad, weight, g, groups, grad_x, n); });
  });
}

template <typename T>
void conv3d_grad_weight_of(const TensorView& grad, const TensorView& x, CheckedGeometry& g, int64_t groups,
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
  const cpu::Rows rows = {1, offsets, g.forward.written_block.volume(), g.forward.written_voxels};
  norm_kernels<T>().channel_sums(rows, from, data<T>(grad_bias, "grad_bias", {out}), out, threads);
}

void conv3d_grad_weight(TensorView grad, TensorView x, MaybeTensor source_voxels, MaybeTensor target_voxels,
                        TensorView table, Array<int64_t> sizes, int64_t groups, TensorView grad_weight,
                        TensorView grad_bias, int64_t threads) {
  guarded([&] {
    CheckedGeometry g(x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) {
      conv3d_grad_weight_of<decltype(t)>(grad, x, g, groups, grad_weight, grad_bias, n);
    });
  });
}

// A coarse volume x [N, d, h, w, C_low] and a fine one y [N, 2d, 2h, 2w, C].
cpu::Upconv upconv_of(const TensorView& x, const char* x_name, const TensorView& y, const char* y_name) {
  const int64_t in = last_size(x, x_name), out = last_size(y, y_name);
  const cpu::Upconv u = {x.size(0), block_of(x), in, out};
  check_positive(u.shape, "sides of the volume", 1);
  if (in < 1 || out < 1) TVM_FFI_THROW(ValueError) << "up-convolution needs at least one channel";
  const Triple fine = block_of(y);
  if (y.size(0) != u.batch || fine.d != 2 * u.shape.d || fine.h != 2 * u.shape.h || fine.w != 2 * u.shape.w) {
    TVM_FFI_THROW(ValueError) << y_name << " must have twice the sides of " << x_name << " " << text(x) << ", got " << text(y);
  }
  return u;
}

template <typename T>
T* coarse(const TensorView& t, const char* name, const cpu::Upconv& u) {
  return data<T>(t, name, {u.batch, u.shape.d, u.shape.h, u.shape.w, u.in_channels});
}
template <typename T>
T* fine(const TensorView& t, const char* name, const cpu::Upconv& u) {
  return data<T>(t, name, {u.batch, 2 * u.shape.d, 2 * u.shape.h, 2 * u.shape.w, u.out_channels});
}
template <typename T>
T* phases(const TensorView& t, const char* name, const cpu::Upconv& u) {
  return data<T>(t, name, {2, 2, 2, u.out_channels, u.in_channels, 2, 2, 2});
}

void upconv3d(TensorView x, TensorView weight, MaybeTensor bias, TensorView y, int64_t threads) {
  guarded([&] {
    const cpu::Upconv u = upconv_of(x, "x", y, "y");
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      upconv_kernels<T>().upconv3d(u, coarse<T>(x, "x", u), phases<T>(weight, "weight", u),
                                   data<T>(bias, "bias", {u.out_channels}), fine<T>(y, "y", u), n);
    });
  });
}

void upconv3d_grad_input(TensorView grad, TensorView weight, TensorView grad_x, int64_t threads) {
  guarded([&] {
    const cpu::Upconv u = upconv_of(grad_x, "grad_x", grad, "grad");
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) {
      using T = decltype(t);
      upconv_kernels<T>().grad_input(u, fine<T>(grad, "grad", u), phases<T>(weight, "weight", u),
                                     coarse<T>(grad_x, "grad_x", u), n);
    });
  });
}

void upconv3d_grad_weight(TensorView grad, TensorView x, TensorView grad_weight, TensorView grad_bias, int64_t threads) {
  guarded([&] {
    const cpu::Upconv u = upconv_of(x, "x", grad, "grad");
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) {
      using T = decltype(t);
      const T* from = fine<T>(grad, "grad", u);
      upconv_kernels<T>().grad_weight(u, from, coarse<T>(x, "x", u), phases<T>(grad_weight, "grad_weight", u), n);
      const int32_t offsets[2] = {0, static_cast<int32_t>(u.batch)};
      const cpu::Rows rows = {1, offsets, 8 * u.shape.volume(), nullptr};
      norm_kernels<T>().channel_sums(rows, from, data<T>(grad_bias, "grad_bias", {u.out_channels}), u.out_channels, n);
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

template <typename T>
void pool3d_of(const TensorView& x, const TensorView& target_index, CheckedGeometry& g, int64_t batch, bool maximum,
               int64_t divisor, const TensorView& y, int threads) {
  const int64_t channels = last_size(x, "x");
  const T* in = g.source<T>(x, "x", channels);
  T* out = g.target<T>(y, "y", channels);
  const Triple grid = grid_of(g.shape, g.forward.gathered_block);
  const cpu::Place place = {checked_index(target_index, g.forward.written_rows, batch, grid), g.shape};
  if (maximum) {
    pool_kernels<T>().maximum(g.forward, place, in, out, nullptr, channels, threads);
  } else {
    pool_kernels<T>().average(g.forward, place, in, out, channels, divisor, threads);
  }
}

void pool3d(TensorView x, MaybeTensor source_voxels, TensorView target_index, MaybeTensor target_voxels,
            TensorView table, Array<int64_t> sizes, bool maximum, int64_t divisor, TensorView y, int64_t threads) {
  guarded([&] {
    CheckedGeometry g(x.size(0), y.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { pool3d_of<decltype(t)>(x, target_index, g, sizes[0], maximum, divisor, y, n); });
  });
}

template <typename T>
void pool3d_grad_of(const TensorView& grad, const MaybeTensor& x, const TensorView& target_index, CheckedGeometry& g,
                    int64_t batch, int64_t divisor, const TensorView& grad_x, int threads) {
  const int64_t channels = last_size(grad, "grad");
  const T* from = g.target<T>(grad, "grad", channels);
  T* to = g.source<T>(grad_x, "grad_x", channels);
  const Triple grid = grid_of(g.shape, g.forward.gathered_block);
  const cpu::Place place = {checked_index(target_index, g.forward.written_rows, batch, grid), g.shape};
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
    CheckedGeometry g(grad_x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int n = checked_threads(threads);
    by_dtype(grad, "grad", [&](auto t) {
      pool3d_grad_of<decltype(t)>(grad, x, target_index, g, sizes[0], divisor, grad_x, n);
    });
  });
}

// Samples and blocks of features x [V, bd, bh, bw, C].
cpu::Rows rows_of(const TensorView& x, const MaybeTensor& voxels, const TensorView& offsets) {
  last_size(x, "x");
  const int64_t samples = samples_of(offsets);
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

template <typename S>
void norm_statistics_of(const cpu::Rows& rows, const TensorView& x, const TensorView& mean, const TensorView& squares,
                        int threads) {
  using T = computed<S>;
  const int64_t c = x.size(4);
  norm_kernels<S>().statistics(rows, like<S>(x, "x", x), data<T>(mean, "mean", {rows.samples, c}),
                               data<T>(squares, "squares", {rows.samples, c}), c, threads);
}

void norm_statistics(TensorView x, MaybeTensor voxels, TensorView offsets, TensorView mean, TensorView squares,
                     int64_t threads) {
  guarded([&] {
    const cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { norm_statistics_of<decltype(t)>(rows, x, mean, squares, n); });
  });
}

template <typename S>
void norm_apply_of(const cpu::Rows& rows, const TensorView& x, const TensorView& mean, const TensorView& scale,
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
    const cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) { norm_apply_of<decltype(t)>(rows, x, mean, scale, shift, residual, slope, y, n); });
  });
}

template <typename S>
void norm_grad_sums_of(const cpu::Rows& rows, const TensorView& grad, const TensorView& x, const MaybeTensor& y,
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
    const cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) {
      norm_grad_sums_of<decltype(t)>(rows, grad, x, y, mean, rstd, scale, shift, slope, before, of_grad, of_product, n);
    });
  });
}

template <typename S>
void norm_grad_input_of(const cpu::Rows& rows, const TensorView& grad, const TensorView& x, const TensorView& mean,
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
    const cpu::Rows rows = rows_of(x, voxels, offsets);
    const int n = checked_threads(threads);
    by_dtype(x, "x", [&](auto t) {
      norm_grad_input_of<decltype(t)>(rows, grad, x, mean, rstd, scale, offset, tilt, grad_x, n);
    });
  });
}

// The volume [N, C, D, H, W] of any strides.
cpu::Volume volume_of(const TensorView& dense) {
  last_size(dense, "dense");
  cpu::Volume v = {dense.size(0), dense.size(1), {dense.size(2), dense.size(3), dense.size(4)}, {}};
  for (int i = 0; i < 5; ++i) v.strides[i] = dense.strides()[i];
  return v;
}

template <typename T>
void gather_of(const TensorView& dense, const TensorView& index, const MaybeTensor& voxels, const TensorView& blocks,
               int threads) {
  const cpu::Volume v = volume_of(dense);
  const Triple b = block_of(blocks);
  const int64_t rows = blocks.size(0);
  const T* from = strided_data<T>(dense, "dense");
  cpu::gather<T>(from, v, checked_index(index, rows, v.batch, grid_of(v.shape, b)),
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
  const cpu::Volume v = {dense.size(0), channels, shape, {}};
  cpu::scatter<T>(data<T>(blocks, "blocks", {rows, b.d, b.h, b.w, channels}), data<T>(fill, "fill", {channels}), v,
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(upconv3d, upconv3d);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(upconv3d_grad_input, upconv3d_grad_input);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(upconv3d_grad_weight, upconv3d_grad_weight);
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
}  // namespace s3d
