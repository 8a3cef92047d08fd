#define S3D_SET avx512
#define VECTOR_BYTES 64
#define REGISTER_ROWS 12
#define S3D_SUPPORTED (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
#include "cpu/kernels.inl"
