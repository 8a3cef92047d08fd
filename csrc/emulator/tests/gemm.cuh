// C = A B^T: a small kernel that uses what convolutions use, for the tests of the emulator and of what nvcc makes of
// it.
//
// A: [m, k], B: [n, k], C: [m, n] float, all row-major; k a multiple of 16 bytes. A block of 4 warps makes a tile of 64
// x 32 of C, a warp 16 x 32. Steps of 64 bytes along k go through a double buffer by cp.async; 16-byte chunks of a row
// are swizzled so that neither the copies nor ldmatrix have bank conflicts.
#pragma once

#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"

namespace s3d::cuda::test {

enum class GemmFault { kNone, kNoBarrierBeforeReads, kNoBarrierAfterReads, kNoWait };

template <typename T>
struct GemmTraits {
  static constexpr int kWarps = 4, kStages = 2;
  static constexpr int kTileM = 16 * kWarps, kTileN = 32;
  static constexpr int kChunk = 16 / sizeof(T);  // elements of a copy
  static constexpr int kChunks = 4;              // of a row in a stage
  static constexpr int kTileK = kChunk * kChunks;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kStageElements = (kTileM + kTileN) * kTileK;
  static constexpr int kSharedBytes = kStages * kStageElements * static_cast<int>(sizeof(T));
};

// Eight consecutive rows have the same chunk in eight different groups of four banks.
template <typename T>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * GemmTraits<T>::kTileK + (chunk ^ (row >> 1 & 3)) * GemmTraits<T>::kChunk;
}

template <typename T>
__device__ __forceinline__ void copy_rows(Shared<T> to, Global<const T> from, int first, int rows, int end, int k_first,
                                          int k) {
  using Traits = GemmTraits<T>;
  for (int i = threadIdx.x; i < rows * Traits::kChunks; i += Traits::kThreads) {
    const int row = i / Traits::kChunks, chunk = i % Traits::kChunks;
    const int column = k_first + chunk * Traits::kChunk;
    const bool inside = first + row < end && column < k;
    const int64_t offset = inside ? static_cast<int64_t>(first + row) * k + column : 0;
    cp_async<16>(to + swizzled<T>(row, chunk), from + offset, inside ? 16 : 0);
  }
}

template <typename T, GemmFault kFault>
__global__ void __launch_bounds__(GemmTraits<T>::kThreads)
    gemm_kernel(Global<const T> a, Global<const T> b, Global<float> c, int m, int n, int k) {
  using Traits = GemmTraits<T>;
  constexpr int kColumns = Traits::kTileN / 8;
  const Shared<T> shared = dynamic_shared<T>(0, Traits::kStages * Traits::kStageElements);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m_first = blockIdx.x * Traits::kTileM, n_first = blockIdx.y * Traits::kTileN;

  const auto copy_step = [&](int step) {
    const Shared<T> stage = shared + step % Traits::kStages * Traits::kStageElements;
    copy_rows<T>(stage, a, m_first, Traits::kTileM, m, step * Traits::kTileK, k);
    copy_rows<T>(stage + Traits::kTileM * Traits::kTileK, b, n_first, Traits::kTileN, n, step * Traits::kTileK, k);
  };

  float sums[kColumns][4] = {};
  const int steps = (k + Traits::kTileK - 1) / Traits::kTileK;
  copy_step(0);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy_step(step + 1);
    cp_async_commit();
    if constexpr (kFault != GemmFault::kNoWait) cp_async_wait<1>();
    if constexpr (kFault != GemmFault::kNoBarrierBeforeReads) __syncthreads();
    const Shared<T> rows = shared + step % Traits::kStages * Traits::kStageElements;
    const Shared<T> columns = rows + Traits::kTileM * Traits::kTileK;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t fragment_a[4], fragment_b[kColumns][2];
      ldmatrix(fragment_a, rows + swizzled<T>(warp * 16 + lane % 16, half * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        uint32_t pair[4];
        ldmatrix(pair, columns + swizzled<T>(j * 8 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) fragment_b[j + i / 2][i % 2] = pair[i];
      }
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragment_a[i] = to_tf32(__uint_as_float(fragment_a[i]));
#pragma unroll
        for (int j = 0; j < 2 * kColumns; ++j) {
          fragment_b[j / 2][j % 2] = to_tf32(__uint_as_float(fragment_b[j / 2][j % 2]));
        }
      }
#pragma unroll
      for (int j = 0; j < kColumns; ++j) mma<T>(sums[j], fragment_a, fragment_b[j]);
    }
    if constexpr (kFault != GemmFault::kNoBarrierAfterReads) __syncthreads();
  }

  for (int j = 0; j < kColumns; ++j) {
    const int column = n_first + j * 8 + lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      const int row = m_first + warp * 16 + lane / 4 + half * 8;
      if (row >= m) continue;
      const int64_t offset = static_cast<int64_t>(row) * n + column;
      if (column < n) c[offset] = sums[j][2 * half];
      if (column + 1 < n) c[offset + 1] = sums[j][2 * half + 1];
    }
  }
  if (threadIdx.x == 0) {
    const int rows = min(Traits::kTileM, m - m_first), columns = min(Traits::kTileN, n - n_first);
    count_useful_flops(2 * static_cast<int64_t>(rows) * columns * k);
  }
}

template <typename T, GemmFault kFault = GemmFault::kNone>
void gemm(const T* a, const T* b, float* c, int m, int n, int k, cudaStream_t stream) {
  using Traits = GemmTraits<T>;
  const dim3 grid((m + Traits::kTileM - 1) / Traits::kTileM, (n + Traits::kTileN - 1) / Traits::kTileN);
  launch("gemm_kernel", gemm_kernel<T, kFault>, grid, Traits::kThreads, Traits::kSharedBytes, stream, a, b, c, m, n, k);
}

}  // namespace s3d::cuda::test
