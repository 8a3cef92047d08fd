#include <cpuid.h>

namespace {
// Older compilers do not know "f16c" in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
}  // namespace

#define S3D_SET avx2
#define VECTOR_BYTES 32
#define REGISTER_ROWS 6
#define S3D_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
#include "cpu/kernels.inl"
