#define S3D_SET avx2
#define VECTOR_BYTES 32
#define REGISTER_ROWS 6
#define S3D_SUPPORTED \
  (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#include "cpu/kernels.inl"
