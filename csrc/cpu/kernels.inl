// One instruction set: define S3D_SET (its name, also the function that returns it), VECTOR_BYTES, REGISTER_ROWS (rows
// of two vectors that fit in the registers beside their operands) and S3D_SUPPORTED, then include this.
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <limits>
#include <new>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

#define S3D_TEXT2(x) #x
#define S3D_TEXT(x) S3D_TEXT2(x)

namespace s3d::cpu {
namespace {
#include "cpu/conv.inl"
#include "cpu/few.inl"
#include "cpu/shallow.inl"
#include "cpu/winograd.inl"
#include "cpu/upconv.inl"
#include "cpu/half.inl"
#include "cpu/norm.inl"
#include "cpu/pool.inl"

bool supported() { return S3D_SUPPORTED; }

template <typename T>
constexpr Kernels<T> conv_kernels() {
  return {conv3d<T>, conv3d_winograd<T>, conv3d_grad_weight<T>, conv3d_grad_weight_winograd<T>};
}
template <typename S>
constexpr Kernels<S> half_conv_kernels() {
  return {conv3d_half<S>, conv3d_winograd_half<S>, conv3d_grad_weight_half<S>, conv3d_grad_weight_winograd_half<S>};
}
template <typename T>
constexpr UpconvKernels<T> upconv_kernels() {
  return {upconv3d<T>, upconv3d_grad_input<T>, upconv3d_grad_weight<T>};
}
template <typename S>
constexpr UpconvKernels<S> half_upconv_kernels() {
  return {upconv3d_half<S>, upconv3d_grad_input_half<S>, upconv3d_grad_weight_half<S>};
}
template <typename S>
constexpr NormKernels<S> norm_kernels() {
  return {norm_statistics<S>, norm_apply<S>, norm_grad_sums<S>, norm_grad_input<S>, channel_sums<S>};
}
template <typename S>
constexpr PoolKernels<S> pool_kernels() {
  return {average<S>, average_grad<S>, maximum<S>, maximum_grad<S>};
}
}  // namespace

const InstructionSet& S3D_SET() {
  static const InstructionSet set = {
      S3D_TEXT(S3D_SET),
      supported,
      winograd_applies,
      {conv_kernels<float>(), conv_kernels<double>(), half_conv_kernels<bfloat16>(), half_conv_kernels<float16>()},
      {upconv_kernels<float>(), upconv_kernels<double>(), half_upconv_kernels<bfloat16>(),
       half_upconv_kernels<float16>()},
      {norm_kernels<float>(), norm_kernels<double>(), norm_kernels<bfloat16>(), norm_kernels<float16>()},
      {pool_kernels<float>(), pool_kernels<double>(), pool_kernels<bfloat16>(), pool_kernels<float16>()},
  };
  return set;
}

}  // namespace s3d::cpu
