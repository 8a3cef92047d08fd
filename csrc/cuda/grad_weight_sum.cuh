// The gradient of a weight, [out, in / groups, taps], from partial sums [part, group, tap, K, N] in float, added part
// by part.
#pragma once

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {

template <typename T>
__global__ void __launch_bounds__(256)
    conv3d_grad_weight_sum_kernel(int taps, int k_count, int n_count, int parts, Global<const float> partial,
                                  Global<T> grad_weight, int64_t sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= sums) return;
  float total = partial[i];
  for (int part = 1; part < parts; ++part) total += partial[part * sums + i];
  const int64_t n = i % n_count, k = i / n_count % k_count, tap = i / n_count / k_count % taps;
  const int64_t group = i / n_count / k_count / taps;
  grad_weight[((group * n_count + n) * k_count + k) * taps + tap] = from_float<T>(total);
}

template <typename T>
void sum_grad_weight(int groups, int taps, int k, int n, int parts, const float* partial, T* grad_weight,
                     cudaStream_t stream) {
  const int64_t sums = int64_t{groups} * taps * k * n;
  launch("conv3d_grad_weight_sum", conv3d_grad_weight_sum_kernel<T>, static_cast<unsigned>((sums + 255) / 256), 256, 0,
         stream, taps, k, n, parts, partial, grad_weight, sums);
}

}  // namespace s3d::cuda
