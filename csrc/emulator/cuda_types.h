// CUDA's built-in types and variables, and its keywords, which mean nothing here.
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define S3D_EMULATOR_VECTOR(type, name)                                                  \
  struct alignas(2 * sizeof(type)) name##2 {                                             \
    type x, y;                                                                           \
  };                                                                                     \
  struct alignas(4 * sizeof(type)) name##4 {                                             \
    type x, y, z, w;                                                                     \
  };                                                                                     \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                       \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
S3D_EMULATOR_VECTOR(int, int)
S3D_EMULATOR_VECTOR(unsigned, uint)
S3D_EMULATOR_VECTOR(float, float)
#undef S3D_EMULATOR_VECTOR

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
