// The language that kernels are written in: CUDA C++ as nvcc knows it, or, with S3D_EMULATOR, the part of it that
// csrc/emulator knows, compiled as plain C++17. Kernels include this first and use only what is named here and in
// memory.cuh, cp_async.cuh, mma.cuh and launch.cuh; csrc/README.md tells how to write one.
//
//   keywords        __global__ __device__ __host__ __forceinline__ __launch_bounds__; no __shared__ (memory.cuh)
//   variables       threadIdx blockIdx blockDim gridDim
//   vectors         int2 int4 uint2 uint4 float2 float4, make_...
//   block           __syncthreads __syncthreads_count __syncthreads_and __syncthreads_or
//   warp            __syncwarp __shfl_sync __shfl_up_sync __shfl_down_sync __shfl_xor_sync
//                   __ballot_sync __any_sync __all_sync
//   functions       __threadfence __popc __ffs __clz __float_as_uint __uint_as_float rsqrtf min max; <cmath> in float
//   numbers         bf16, fp16 (16 bits; float stands for TF32 where tensor cores multiply it)
//     to_float(x), from_float<T>(x)       T: bf16, fp16 or float; to nearest, ties to even
//     pack<T>(low, high)                  two numbers of 16 bits in one register
//     unpack<T>(packed, low, high)
//     to_tf32(x)                          the bits that mma<float> takes: to nearest, ties away from zero
#pragma once

#include <cmath>
#include <cstdint>

#ifdef S3D_EMULATOR
#include "emulator/intrinsics.h"
#include "emulator/number_formats.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace s3d::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(fp16 value) { return __half2float(value); }
__device__ __forceinline__ float to_float(float value) { return value; }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
__device__ __forceinline__ uint32_t pack<fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <typename T>
__device__ __forceinline__ void unpack(uint32_t packed, float& low, float& high);
template <>
__device__ __forceinline__ void unpack<bf16>(uint32_t packed, float& low, float& high) {
  low = __uint_as_float(packed << 16);
  high = __uint_as_float(packed & 0xFFFF0000);
}
template <>
__device__ __forceinline__ void unpack<fp16>(uint32_t packed, float& low, float& high) {
  low = __half2float(__ushort_as_half(static_cast<unsigned short>(packed)));
  high = __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
}

__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

}  // namespace s3d::cuda
#endif
