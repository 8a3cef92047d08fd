// Tensor cores. All 32 lanes of a warp call together. With g = lane / 4 and t = lane % 4:
//
//   mma<T>(d, a, b)       D += A B in float, A of 16 x K (row-major), B of K x 8 (column-major), D of 16 x 8:
//                         float d[4], uint32_t a[4], b[2]
//     T = bf16, fp16      K = 16, two elements in a register (the lower k in the lower bits)
//       a[i]              row g + 8 * (i % 2), k = 2 t + 8 * (i / 2) and the next
//       b[i]              column g, k = 2 t + 8 * i and the next
//     T = float (TF32)    K = 8, one element in a register; round with to_tf32 first, or the last 13 bits are cut off
//       a[i]              row g + 8 * (i % 2), k = t + 4 * (i / 2)
//       b[i]              column g, k = t + 4 * i
//       d[i]              row g + 8 * (i / 2), column 2 t + i % 2
//   So in bytes all three are alike: a row of A or a column of B has 32 bytes, of which the lane's register of the
//   first half holds the 4 from byte 4 t on, and that of the second half those from 16 + 4 t.
//
//   ldmatrix(r, row)
//       uint32_t r[N], N = 1, 2 or 4: N matrices of 8 rows of 16 bytes. `row` of lane 8 j + i is where row i of matrix
//       j begins, aligned to 16; from lane 8 N on it is ignored. r[j] becomes the 4 bytes from 4 t on of row g of
//       matrix j. For the a of mma the matrices are: rows 0-7 and rows 8-15 of the first 16 bytes, then of the second.
//   ldmatrix_transposed(r, row)
//       for elements of 16 bits: r[j] becomes elements g of rows 2 t and 2 t + 1
//
//   count_useful_flops(flops)
//       for the emulator's counters, from any thread: multiplications and additions that the result needs
#pragma once

#include "cuda/memory.cuh"

#ifdef S3D_EMULATOR
#include "emulator/tensor_core.h"
#else
namespace s3d::cuda {

#define S3D_MMA(type, shape, format)                                                                          \
  template <>                                                                                                 \
  __device__ __forceinline__ void mma<type>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {  \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." format "." format ".f32 "                          \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                  \
  }
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
S3D_MMA(bf16, "m16n8k16", "bf16")
S3D_MMA(fp16, "m16n8k16", "f16")
S3D_MMA(float, "m16n8k8", "tf32")
#undef S3D_MMA

// "memory" keeps the compiler from moving ordinary stores to shared memory across.
#define S3D_LDMATRIX(name, modifier)                                                                         \
  template <int kMatrices, typename T>                                                                       \
  __device__ __forceinline__ void name(uint32_t (&r)[kMatrices], T* row) {                                   \
    static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "one, two or four matrices");          \
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));                               \
    if constexpr (kMatrices == 1) {                                                                          \
      asm volatile("ldmatrix.sync.aligned.m8n8.x1" modifier ".shared.b16 {%0}, [%1];"                        \
                   : "=r"(r[0]) : "r"(address) : "memory");                                                  \
    } else if constexpr (kMatrices == 2) {                                                                   \
      asm volatile("ldmatrix.sync.aligned.m8n8.x2" modifier ".shared.b16 {%0, %1}, [%2];"                    \
                   : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");                                      \
    } else {                                                                                                 \
      asm volatile("ldmatrix.sync.aligned.m8n8.x4" modifier ".shared.b16 {%0, %1, %2, %3}, [%4];"            \
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");              \
    }                                                                                                        \
  }
S3D_LDMATRIX(ldmatrix, "")
S3D_LDMATRIX(ldmatrix_transposed, ".trans")
#undef S3D_LDMATRIX

__device__ __forceinline__ void count_useful_flops(int64_t) {}

}  // namespace s3d::cuda
#endif
