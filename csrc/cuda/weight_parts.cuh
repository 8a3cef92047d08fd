// The end of a gradient of a weight: partial sums [part, tap, K, N] added in the order of the parts, to [N, K, taps].
//
// Work      A block of 16 warps makes 32 neighbouring sums; a warp adds every 16th part, then the warps are added in
//           their order. So the order is fixed by the number of parts alone.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {

constexpr int kPartWarps = 16;

template <typename T>
__global__ void __launch_bounds__(32 * kPartWarps)
    add_weight_parts_kernel(Global<const float> partial, int parts, int taps, int k, int n, Global<T> grad_weight) {
  S3D_SHARED(float, of_warp, 32 * kPartWarps);
  const int64_t sums = static_cast<int64_t>(taps) * k * n, i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  float sum = 0.0f;
  if (i < sums) {
#pragma unroll 4
    for (int part = warp; part < parts; part += kPartWarps) sum += partial[part * sums + i];
  }
  of_warp[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || i >= sums) return;
  for (int other = 1; other < kPartWarps; ++other) sum += of_warp[other * 32 + threadIdx.x];
  const int64_t out = i % n, in = i / n % k, tap = i / n / k;
  grad_weight[(out * k + in) * taps + tap] = from_float<T>(sum);
}

template <typename T>
void add_weight_parts(const char* name, const float* partial, int parts, int taps, int k, int n, T* grad_weight,
                      cudaStream_t stream) {
  const int64_t sums = int64_t{taps} * k * n;
  launch(name, add_weight_parts_kernel<T>, static_cast<unsigned>((sums + 31) / 32), 32 * kPartWarps, 0, stream, partial,
         parts, taps, k, n, grad_weight);
}

}  // namespace s3d::cuda
