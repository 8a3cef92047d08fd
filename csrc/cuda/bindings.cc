// What Python calls, behind the tensor ABI of apache-tvm-ffi: the functions of cpu/bindings.cc for tensors on a GPU,
// with `tf32` (whether float may go to tensor cores) in place of the number of threads. Shapes, types and devices are
// checked; what tables hold is not, for that would wait for the GPU.
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "cuda/call.h"
#include "cuda/kernels.h"

#ifdef S3D_EMULATOR
#include <string>

#include "emulator/launch.h"
#endif

namespace s3d::cuda {
namespace {

using tvm::ffi::String;

// Calls call(T()) with the type of the elements of features.
template <typename Use>
void by_dtype(const TensorView& t, const char* name, const Use& use) {
  if (is<float>(t)) return use(float());
  if (is<bf16>(t)) return use(bf16());
  if (is<fp16>(t)) return use(fp16());
  TVM_FFI_THROW(TypeError) << name << " has the wrong dtype: it must be float32, bfloat16 or float16";
}

int checked_int(int64_t value, const char* name) {
  if (value < 0 || value > INT32_MAX) TVM_FFI_THROW(ValueError) << name << " must be less than 2^31, got " << value;
  return static_cast<int>(value);
}

ConvChannels channels_of(int64_t in, int64_t out, int64_t groups) {
  check_groups(in, out, groups);
  return {checked_int(in, "channels"), checked_int(out, "channels"), static_cast<int>(groups)};
}

Math math_of(int64_t tf32) { return tf32 != 0 ? Math::kTensorCores : Math::kExact; }

// ---- convolution

template <typename T>
void convolve(const Window& window, const ConvChannels& channels, Math math, const T* gathered, const T* weight,
              const T* bias, T* written, cudaStream_t stream) {
  if (conv3d_depthwise_applies(window, channels)) {
    return conv3d_depthwise<T>(window, channels, gathered, weight, bias, written, stream);
  }
  if (conv3d_stem_applies(window, channels)) {
    return conv3d_stem<T>(window, channels, math, gathered, weight, bias, written, stream);
  }
  const Scratch<T> packed(conv3d_packed_elements<T>(window, channels));
  conv3d_pack_weight<T>(window, channels, math, weight, packed.data(), stream);
  if (conv3d_halo_applies(window, channels)) {
    conv3d_halo<T>(window, channels, math, gathered, packed.data(), bias, written, stream);
  } else if (conv3d_pairs_applies(window, channels)) {
    const Scratch<float> partial(conv3d_pairs_partial_sums<T>(window, channels));
    conv3d_pairs<T>(window, channels, math, gathered, packed.data(), bias, partial.data(), written, stream);
  } else {
    conv3d_gather<T>(window, channels, math, gathered, packed.data(), bias, written, stream);
  }
}

void conv3d(TensorView x, TensorView weight, MaybeTensor bias, MaybeTensor source_voxels, MaybeTensor target_voxels,
            TensorView table, Array<int64_t> sizes, int64_t groups, TensorView y, int64_t tf32) {
  const OnDeviceOf device(x);
  guarded([&] {
    const Geometry g(x.size(0), y.size(0), source_voxels, target_voxels, table, sizes);
    const int64_t in = last_size(x, "x"), out = last_size(y, "y");
    const ConvChannels channels = channels_of(in, out, groups);
    const Triple k = g.forward.kernel;
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      const T* const from = g.source<T>(x, "x", in);
      const T* const w = data<T>(weight, "weight", {out, in / groups, k.d, k.h, k.w});
      const T* const b = data<T>(bias, "bias", {out});
      convolve<T>(g.forward, channels, math_of(tf32), from, w, b, g.target<T>(y, "y", out), device.stream());
    });
  });
}

// Whether conv3d_fused computes it: where conv3d would use conv3d_halo.
bool fuses(const Window& window, const ConvChannels& channels) {
  return conv3d_halo_applies(window, channels) && !conv3d_depthwise_applies(window, channels) &&
         !conv3d_stem_applies(window, channels);
}

// What kernels read 16 bytes at a time.
template <typename T>
const T* aligned(const T* data, const char* name) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) TVM_FFI_THROW(ValueError) << name << " must be aligned to 16 bytes";
  return data;
}

// A table [samples, channels].
const float* input_table(const MaybeTensor& t, const char* name, int64_t samples, int64_t channels) {
  return aligned(data<float>(t, name, {samples, channels}), name);
}

// y: the convolution of leaky((x - x_mean) * x_scale + x_shift) (without x_mean: of x). mean, squares: of y, see
// conv3d_halo_moments. offsets: rows of each sample, in x and y.
void conv3d_fused(TensorView x, TensorView weight, MaybeTensor bias, MaybeTensor x_mean, MaybeTensor x_scale,
                  MaybeTensor x_shift, double slope, MaybeTensor source_voxels, MaybeTensor target_voxels,
                  TensorView table, Array<int64_t> sizes, TensorView offsets, int64_t groups, TensorView y,
                  TensorView mean, TensorView squares, int64_t tf32) {
  const OnDeviceOf device(x);
  guarded([&] {
    const Geometry g(x.size(0), y.size(0), source_voxels, target_voxels, table, sizes);
    const int64_t in = last_size(x, "x"), out = last_size(y, "y"), samples = samples_of(offsets);
    const ConvChannels channels = channels_of(in, out, groups);
    if (!fuses(g.forward, channels)) TVM_FFI_THROW(ValueError) << "conv3d_fused cannot compute this convolution";
    if (x_mean.has_value() != x_scale.has_value() || x_mean.has_value() != x_shift.has_value()) {
      TVM_FFI_THROW(ValueError) << "x_mean, x_scale and x_shift must be given together";
    }
    const Triple k = g.forward.kernel;
    ConvFusion fusion;
    fusion.samples = checked_int(samples, "samples");
    fusion.sample_offsets = data<int32_t>(offsets, "sample_offsets", {samples + 1});
    fusion.mean = input_table(x_mean, "x_mean", samples, in);
    fusion.scale = input_table(x_scale, "x_scale", samples, in);
    fusion.shift = input_table(x_shift, "x_shift", samples, in);
    fusion.slope = static_cast<float>(slope);
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      const T* const from = g.source<T>(x, "x", in);
      const T* const w = data<T>(weight, "weight", {out, in / groups, k.d, k.h, k.w});
      const T* const b = data<T>(bias, "bias", {out});
      T* const to = g.target<T>(y, "y", out);
      float* const to_mean = data<float>(mean, "mean", {samples, out});
      float* const to_squares = data<float>(squares, "squares", {samples, out});
      const Scratch<T> packed(conv3d_packed_elements<T>(g.forward, channels));
      const Scratch<float> partials(conv3d_halo_partials(g.forward, channels, fusion.samples));
      fusion.partials = partials.data();
      conv3d_pack_weight<T>(g.forward, channels, math_of(tf32), w, packed.data(), device.stream());
      conv3d_halo<T>(g.forward, channels, math_of(tf32), from, packed.data(), b, to, device.stream(), fusion);
      conv3d_halo_moments(g.forward, channels, fusion, to_mean, to_squares, device.stream());
    });
  });
}

// The window of the other direction, with its table.
struct Reversed {
  Reversed(const Geometry& g, cudaStream_t stream) : table(g.forward.gathered_rows * g.forward.columns()) {
    reverse_table(g.forward.table, g.forward.written_rows, g.forward.columns(), g.forward.gathered_rows, table.data(),
                  stream);
    window = g.transposed(table.data());
  }
  Scratch<int32_t> table;
  Window window;
};

void conv3d_grad_input(TensorView grad, TensorView weight, MaybeTensor source_voxels, MaybeTensor target_voxels,
                       TensorView table, Array<int64_t> sizes, int64_t groups, TensorView grad_x, int64_t tf32) {
  const OnDeviceOf device(grad);
  guarded([&] {
    const Geometry g(grad_x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int64_t in = last_size(grad_x, "grad_x"), out = last_size(grad, "grad");
    const ConvChannels channels = channels_of(in, out, groups);
    const Triple k = g.forward.kernel;
    by_dtype(grad, "grad", [&](auto t) {
      using T = decltype(t);
      const T* const from = g.target<T>(grad, "grad", out);
      const T* const w = data<T>(weight, "weight", {out, in / groups, k.d, k.h, k.w});
      T* const to = g.source<T>(grad_x, "grad_x", in);
      const Reversed back(g, device.stream());
      convolve<T>(back.window, channels, math_of(tf32), from, w, nullptr, to, device.stream());
    });
  });
}

template <typename T>
void correlate(const Window& window, const ConvChannels& channels, Math math, const T* grad, const T* x, T* grad_weight,
               cudaStream_t stream) {
  if (conv3d_depthwise_applies(window, channels)) {
    const Scratch<float> partial(conv3d_depthwise_grad_weight_partial_sums(window, channels));
    conv3d_depthwise_grad_weight<T>(window, channels, grad, x, partial.data(), grad_weight, stream);
  } else if (conv3d_stem_applies(window, channels)) {
    const Scratch<float> partial(conv3d_stem_grad_weight_partial_sums<T>(window, channels));
    conv3d_stem_grad_weight<T>(window, channels, math, grad, x, partial.data(), grad_weight, stream);
  } else if (conv3d_halo_applies(window, channels)) {
    const Scratch<float> partial(conv3d_grad_weight_halo_partial_sums<T>(window, channels));
    conv3d_grad_weight_halo<T>(window, channels, math, grad, x, partial.data(), grad_weight, stream);
  } else {
    const Scratch<float> partial(conv3d_grad_weight_partial_sums(window, channels));
    s3d::cuda::conv3d_grad_weight<T>(window, channels, math, grad, x, partial.data(), grad_weight, stream);
  }
}

void conv3d_grad_weight(TensorView grad, TensorView x, MaybeTensor source_voxels, MaybeTensor target_voxels,
                        TensorView table, Array<int64_t> sizes, int64_t groups, TensorView grad_weight,
                        TensorView grad_bias, int64_t tf32) {
  const OnDeviceOf device(grad);
  guarded([&] {
    const Geometry g(x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int64_t in = last_size(x, "x"), out = last_size(grad, "grad");
    const ConvChannels channels = channels_of(in, out, groups);
    const Window& w = g.forward;
    by_dtype(grad, "grad", [&](auto t) {
      using T = decltype(t);
      const T* const from = g.target<T>(grad, "grad", out);
      const T* const inputs = g.source<T>(x, "x", in);
      T* const to = data<T>(grad_weight, "grad_weight", {out, in / groups, w.kernel.d, w.kernel.h, w.kernel.w});
      T* const of_bias = data<T>(grad_bias, "grad_bias", {out});
      correlate<T>(w, channels, math_of(tf32), from, inputs, to, device.stream());
      const SampleRows rows = {1, nullptr, w.written_rows, w.written_block.volume(), w.written_voxels};
      const Scratch<float> sums(norm_partial_sums(rows, channels.out));
      channel_sums<T>(rows, from, sums.data(), of_bias, channels.out, device.stream());
    });
  });
}

// ---- normalisation

// Samples and blocks of features x [V, bd, bh, bw, C].
SampleRows rows_of(const TensorView& x, const MaybeTensor& voxels, const TensorView& offsets) {
  last_size(x, "x");
  const int64_t samples = samples_of(offsets);
  return {checked_int(samples, "samples"), data<int32_t>(offsets, "sample_offsets", {samples + 1}), x.size(0),
          x.size(1) * x.size(2) * x.size(3),
          data<uint8_t>(voxels, "voxels", {x.size(0), x.size(1), x.size(2), x.size(3)})};
}

// A table [samples, channels].
float* table_of(const TensorView& t, const char* name, const SampleRows& rows, const TensorView& x) {
  return data<float>(t, name, {rows.samples, x.size(4)});
}

void norm_statistics(TensorView x, MaybeTensor voxels, TensorView offsets, TensorView mean, TensorView squares,
                     int64_t) {
  const OnDeviceOf device(x);
  guarded([&] {
    const SampleRows rows = rows_of(x, voxels, offsets);
    const int channels = checked_int(x.size(4), "channels");
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      const Scratch<float> partial(norm_partial_sums(rows, channels));
      s3d::cuda::norm_statistics<T>(rows, like<T>(x, "x", x), partial.data(), table_of(mean, "mean", rows, x),
                                    table_of(squares, "squares", rows, x), channels, device.stream());
    });
  });
}

void norm_apply(TensorView x, TensorView mean, TensorView scale, TensorView shift, MaybeTensor residual, double slope,
                MaybeTensor voxels, TensorView offsets, TensorView y, int64_t) {
  const OnDeviceOf device(x);
  guarded([&] {
    const SampleRows rows = rows_of(x, voxels, offsets);
    const int channels = checked_int(x.size(4), "channels");
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      s3d::cuda::norm_apply<T>(rows, like<T>(x, "x", x), table_of(mean, "mean", rows, x),
                               table_of(scale, "scale", rows, x), table_of(shift, "shift", rows, x),
                               like<T>(residual, "residual", x), static_cast<float>(slope), like<T>(y, "y", x),
                               channels, device.stream());
    });
  });
}

void norm_grad_sums(TensorView grad, TensorView x, MaybeTensor y, TensorView mean, TensorView rstd, TensorView scale,
                    TensorView shift, double slope, MaybeTensor voxels, TensorView offsets, MaybeTensor before,
                    TensorView of_grad, TensorView of_product, int64_t) {
  const OnDeviceOf device(grad);
  guarded([&] {
    const SampleRows rows = rows_of(x, voxels, offsets);
    const int channels = checked_int(x.size(4), "channels");
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      const Scratch<float> partial(norm_partial_sums(rows, channels));
      s3d::cuda::norm_grad_sums<T>(rows, like<T>(grad, "grad", x), like<T>(x, "x", x), like<T>(y, "y", x),
                                   table_of(mean, "mean", rows, x), table_of(rstd, "rstd", rows, x),
                                   table_of(scale, "scale", rows, x), table_of(shift, "shift", rows, x),
                                   static_cast<float>(slope), like<T>(before, "before", x), partial.data(),
                                   table_of(of_grad, "of_grad", rows, x), table_of(of_product, "of_product", rows, x),
                                   channels, device.stream());
    });
  });
}

void norm_grad_input(TensorView grad, TensorView x, TensorView mean, TensorView rstd, TensorView scale,
                     TensorView offset, TensorView tilt, MaybeTensor voxels, TensorView offsets, TensorView grad_x,
                     int64_t) {
  const OnDeviceOf device(grad);
  guarded([&] {
    const SampleRows rows = rows_of(x, voxels, offsets);
    const int channels = checked_int(x.size(4), "channels");
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      s3d::cuda::norm_grad_input<T>(rows, like<T>(grad, "grad", x), like<T>(x, "x", x),
                                    table_of(mean, "mean", rows, x), table_of(rstd, "rstd", rows, x),
                                    table_of(scale, "scale", rows, x), table_of(offset, "offset", rows, x),
                                    table_of(tilt, "slope", rows, x), like<T>(grad_x, "grad_x", x), channels,
                                    device.stream());
    });
  });
}

// ---- dense <-> blocks

// Rows (n, gd, gh, gw).
const int32_t* index_of(const TensorView& index, const char* name, int64_t rows) {
  return aligned(data<int32_t>(index, name, {rows, 4}), name);
}

BlockRows block_rows_of(const TensorView& blocks, const TensorView& index, const MaybeTensor& voxels) {
  const Triple b = block_of(blocks);
  const int64_t rows = blocks.size(0);
  return {index_of(index, "index", rows), data<uint8_t>(voxels, "voxels", {rows, b.d, b.h, b.w}), b, rows};
}

// The volume [N, C, D, H, W] of any strides.
void gather_blocks(TensorView dense, TensorView index, MaybeTensor voxels, TensorView blocks, int64_t) {
  const OnDeviceOf device(dense);
  guarded([&] {
    last_size(dense, "dense");
    const BlockRows rows = block_rows_of(blocks, index, voxels);
    const int64_t channels = dense.size(1);
    DenseVolume volume = {checked_int(dense.size(0), "batch"), checked_int(channels, "channels"),
                          {dense.size(2), dense.size(3), dense.size(4)}, {}};
    for (int i = 0; i < 5; ++i) volume.strides[i] = dense.strides()[i];
    by_dtype(dense, "dense", [&](auto t) {
      using T = decltype(t);
      const Triple b = rows.block;
      s3d::cuda::gather_blocks<T>(rows, volume, strided_data<T>(dense, "dense"),
                                  data<T>(blocks, "blocks", {rows.rows, b.d, b.h, b.w, channels}), device.stream());
    });
  });
}

// dense: [N, D, H, W, C].
void scatter_blocks(TensorView blocks, TensorView fill, TensorView index, MaybeTensor voxels, TensorView dense,
                    int64_t) {
  const OnDeviceOf device(blocks);
  guarded([&] {
    const BlockRows rows = block_rows_of(blocks, index, voxels);
    const int64_t batch = dense.size(0), channels = last_size(dense, "dense");
    const Triple b = rows.block, shape = {dense.size(1), dense.size(2), dense.size(3)}, grid = grid_of(shape, b);
    const DenseVolume volume = {checked_int(batch, "batch"), checked_int(channels, "channels"), shape,
                                {shape.volume() * channels, 1, shape.h * shape.w * channels, shape.w * channels,
                                 channels}};
    by_dtype(blocks, "blocks", [&](auto t) {
      using T = decltype(t);
      const T* const from = data<T>(blocks, "blocks", {rows.rows, b.d, b.h, b.w, channels});
      const T* const elsewhere = data<T>(fill, "fill", {channels});
      T* const to = data<T>(dense, "dense", {batch, shape.d, shape.h, shape.w, channels});
      const Scratch<int32_t> cells(batch * grid.volume());
      cell_rows(rows.index, rows.rows, batch, grid, cells.data(), device.stream());
      s3d::cuda::scatter_blocks<T>(rows, volume, cells.data(), from, elsewhere, to, device.stream());
    });
  });
}

// ---- pooling

void pool3d(TensorView x, MaybeTensor source_voxels, TensorView target_index, MaybeTensor target_voxels,
            TensorView table, Array<int64_t> sizes, bool maximum, int64_t divisor, TensorView y, int64_t) {
  const OnDeviceOf device(x);
  guarded([&] {
    const Geometry g(x.size(0), y.size(0), source_voxels, target_voxels, table, sizes);
    const int channels = checked_int(last_size(x, "x"), "channels");
    const PoolOutputs outputs = {index_of(target_index, "target_index", g.forward.written_rows), g.shape};
    by_dtype(x, "x", [&](auto t) {
      using T = decltype(t);
      const T* const in = g.source<T>(x, "x", channels);
      T* const out = g.target<T>(y, "y", channels);
      if (maximum) {
        pool_maximum<T>(g.forward, outputs, in, out, nullptr, channels, device.stream());
      } else {
        pool_average<T>(g.forward, outputs, in, out, channels, checked_int(divisor, "divisor"), device.stream());
      }
    });
  });
}

// With x it is the gradient of the maximum, without that of the average.
void pool3d_grad(TensorView grad, MaybeTensor x, MaybeTensor source_voxels, TensorView target_index,
                 MaybeTensor target_voxels, TensorView table, Array<int64_t> sizes, int64_t divisor, TensorView grad_x,
                 int64_t) {
  const OnDeviceOf device(grad);
  guarded([&] {
    const Geometry g(grad_x.size(0), grad.size(0), source_voxels, target_voxels, table, sizes);
    const int channels = checked_int(last_size(grad, "grad"), "channels");
    const PoolOutputs outputs = {index_of(target_index, "target_index", g.forward.written_rows), g.shape};
    by_dtype(grad, "grad", [&](auto t) {
      using T = decltype(t);
      const T* const from = g.target<T>(grad, "grad", channels);
      T* const to = g.source<T>(grad_x, "grad_x", channels);
      const Reversed back(g, device.stream());
      if (!x.has_value()) {
        pool_average_grad<T>(back.window, outputs, from, to, channels, checked_int(divisor, "divisor"),
                             device.stream());
        return;
      }
      const T* const in = g.source<T>(x.value(), "x", channels);
      const Scratch<int16_t> winners(g.forward.written_rows * g.forward.written_block.volume() * channels);
      pool_maximum<T>(g.forward, outputs, in, static_cast<T*>(nullptr), winners.data(), channels, device.stream());
      pool_maximum_grad<T>(back.window, winners.data(), from, to, channels, device.stream());
    });
  });
}

// ---- the library itself

// Of the files that this was compiled from, see setup.py.
String sources() { return S3D_SOURCES; }

#ifdef S3D_EMULATOR
// In which order blocks and warps run from now on.
void use_seed(int64_t seed) { emulator::set_options({static_cast<uint64_t>(seed), true}); }

// Names of the kernels launched since the last call.
Array<String> take_launches() {
  Array<String> names;
  for (const emulator::LaunchRecord& launch : emulator::take_launches()) names.push_back(launch.kernel);
  return names;
}
#endif

TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d, conv3d);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d_fused, conv3d_fused);
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sources, sources);
#ifdef S3D_EMULATOR
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_seed, use_seed);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(take_launches, take_launches);
#endif

}  // namespace
}  // namespace s3d::cuda
