// What Python calls, behind the tensor ABI of apache-tvm-ffi: the functions of cpu/bindings.cc for tensors on a GPU, with
// `tf32` (whether float may go to tensor cores) in place of the number of threads. Shapes, types and devices are
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
  const Scratch<T> packed(conv3d_packed_elements<T>(window, channels));
  conv3d_pack_weight<T>(window, channels, math, weight, packed.data(), stream);
  conv3d_gather<T>(window, channels, math, gathered, packed.data(), bias, written, stream);
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
      convolve<T>(g.forward, channels, math_of(tf32), g.source<T>(x, "x", in),
                  data<T>(weight, "weight", {out, in / groups, k.d, k.h, k.w}), data<T>(bias, "bias", {out}),
                  g.target<T>(y, "y", out), device.stream());
    });
  });
}

// The window of the other direction, with its table.
struct Reversed {
  Reversed(const Geometry& g, cudaStream_t stream) : table(g.forward.gathered_rows * g.forward.columns()) {
    reverse_table(g.forward, table.data(), stream);
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
      const Scratch<float> partial(conv3d_grad_weight_partial_sums(w, channels));
      s3d::cuda::conv3d_grad_weight<T>(w, channels, math_of(tf32), from, inputs, partial.data(), to, device.stream());
      const SampleRows rows = {1, nullptr, w.written_rows, w.written_block.volume(), w.written_voxels};
      const Scratch<float> sums(norm_partial_sums(rows, channels.out));
      channel_sums<T>(rows, from, sums.data(), of_bias, channels.out, device.stream());
    });
  });
}

// ---- the library itself

// Of the files that this was compiled from, see setup.py.
String sources() { return S3D_SOURCES; }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d, conv3d);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d_grad_input, conv3d_grad_input);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(conv3d_grad_weight, conv3d_grad_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sources, sources);

}  // namespace
}  // namespace s3d::cuda
