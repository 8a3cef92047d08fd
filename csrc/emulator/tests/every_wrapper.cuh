// One kernel that uses what gemm.cuh does not: both compilers must know all that cuda/*.cuh promise.
#pragma once

#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"

namespace s3d::cuda::test {

constexpr int kWrapperThreads = 64, kWrapperResults = 20;

// x: [64, 8]; optional: null or [1]; counts: [4], zeros; out: [64, 20]
template <typename T>
__global__ void every_wrapper_kernel(Global<const T> x, Global<const float> optional, Global<int> counts,
                                     Global<float> out) {
  const int thread = threadIdx.x, lane = thread % 32;
  S3D_SHARED(T, tile, kWrapperThreads * 8);
  S3D_SHARED(int, maximum, 1);
  Shared<T> row = tile + thread * 8;
  row += 4;
  cp_async<8>(row - 4, x + thread * 8);
  cp_async<4>(row, x + thread * 8 + 4);
  cp_async_commit();
  cp_async_wait<0>();
  cp_async<4>(row + 2, x + thread * 8 + 6);
  cp_async_wait_all();
  if (thread == 0) maximum[0] = 0;
  const int even = __syncthreads_count(thread % 2 == 0);
  const int both = __syncthreads_and(thread < 64) + 2 * __syncthreads_or(thread == 64);

  const Shared<T> matrices = tile + (thread / 32 * 32 + lane) * 8;
  uint32_t one[1], two[2], four[4];
  ldmatrix(one, matrices);
  ldmatrix_transposed(two, matrices);
  ldmatrix_transposed(four, matrices);
  float results[kWrapperResults] = {};
  unpack<T>(one[0], results[0], results[1]);
  unpack<T>(two[1], results[2], results[3]);
  unpack<T>(four[3], results[4], results[5]);
  ldmatrix(two, matrices);
  ldmatrix_transposed(one, matrices);
  unpack<T>(two[1], results[6], results[7]);
  unpack<T>(one[0], results[8], results[9]);

  atomicMax(maximum, thread);
  atomicAdd(counts, 1);
  atomicMin(counts + 1, -thread);
  atomicOr(counts + 2, 1 << thread % 8);
  const int before = atomicCAS(counts + 3, 0, 7);
  __syncthreads();
  results[10] = static_cast<float>(maximum[0]);
  results[11] = static_cast<float>(even * 4 + both);
  results[12] = before == 0 || before == 7;
  results[13] = static_cast<float>(__shfl_sync(0xFFFFFFFF, thread, 3, 16));
  results[14] = static_cast<float>(__shfl_up_sync(0xFFFFFFFF, thread, 1));
  results[15] = __shfl_down_sync(0xFFFFFFFF, static_cast<float>(thread), 1);
  results[16] = static_cast<float>(__popc(__ballot_sync(0xFFFFFFFF, lane < 5)) + __ffs(8) + __clz(1));
  results[17] = __any_sync(0xFFFFFFFF, lane == 9) && !__all_sync(0xFFFFFFFF, lane == 9);
  results[18] = optional != nullptr ? static_cast<float>(optional[0]) : max(rsqrtf(4.0f), min(0.25f, 1.0f));
  const uint2 halves = load<uint2>(pointer_cast<const uint32_t>(x) + thread * 4);
  float low, high;
  unpack<T>(halves.y, low, high);
  results[19] = pack<T>(low, high) == halves.y ? low + to_float(from_float<T>(1.0f)) : 0.0f;

  const Global<float> mine = out + static_cast<int64_t>(thread) * kWrapperResults;
  for (int i = 0; i < kWrapperResults; i += 4) {
    store(mine + i, make_float4(results[i], results[i + 1], results[i + 2], results[i + 3]));
  }
}

template <typename T>
void every_wrapper(const T* x, const float* optional, int* counts, float* out, cudaStream_t stream) {
  launch("every_wrapper_kernel", every_wrapper_kernel<T>, 1, kWrapperThreads, 0, stream, x, optional, counts, out);
}

}  // namespace s3d::cuda::test
