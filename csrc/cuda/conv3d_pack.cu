// The weight of a convolution as its kernels read it: see product.cuh for the layout.
//
// Work      A thread makes one packed number. Reads are scattered, taps apart; the weight is small and lies in L2.
// Numbers   For TF32 the numbers are rounded to it here, once.
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/product.cuh"

namespace s3d::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(256)
    conv3d_pack_weight_kernel(Global<const T> weight, Global<T> packed, Product product, bool round_to_tf32) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  int64_t rest = i / kTileK<T>;
  const int column = static_cast<int>(rest % product.tile_n);
  rest /= product.tile_n;
  const int k = static_cast<int>(rest % product.k_steps) * kTileK<T> + static_cast<int>(i % kTileK<T>);
  rest /= product.k_steps;
  const int tap = static_cast<int>(rest % product.taps);
  rest /= product.taps;
  const int n = static_cast<int>(rest % product.n_tiles) * product.tile_n + channel_of_column(column);
  const int64_t group = rest / product.n_tiles;
  if (group >= product.groups) return;
  T value = from_float<T>(0.0f);
  if (k < product.k && n < product.n) {
    // [out, in / groups, taps], and the written channels are the outputs or the inputs.
    const int64_t row = product.transposed ? (group * product.k + k) * product.n + n
                                           : (group * product.n + n) * product.k + k;
    value = weight[row * product.taps + tap];
  }
  if constexpr (sizeof(T) == 4) {
    if (round_to_tf32) value = __uint_as_float(to_tf32(value));
  }
  packed[i] = value;
}

}  // namespace

template <typename T>
int64_t conv3d_packed_elements(const Window& window, const ConvChannels& channels) {
  const Product product = product_of<T>(window, channels);
  return int64_t{product.groups} * product.n_tiles * product.taps * product.k_steps * product.tile_n * kTileK<T>;
}

template <typename T>
void conv3d_pack_weight(const Window& window, const ConvChannels& channels, Math math, const T* weight, T* packed,
                        cudaStream_t stream) {
  const int64_t elements = conv3d_packed_elements<T>(window, channels);
  launch("conv3d_pack_weight", conv3d_pack_weight_kernel<T>, static_cast<unsigned>((elements + 255) / 256), 256, 0,
         stream, weight, packed, product_of<T>(window, channels), math == Math::kTensorCores);
}

#define S3D_INSTANTIATE(T)                                                        \
  template int64_t conv3d_packed_elements<T>(const Window&, const ConvChannels&); \
  template void conv3d_pack_weight<T>(const Window&, const ConvChannels&, Math, const T*, T*, cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
