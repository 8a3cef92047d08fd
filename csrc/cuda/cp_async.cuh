// Asynchronous copies from global to shared memory (cp.async, sm_80).
//
//   cp_async<kBytes>(to, from, source_bytes = kBytes)
//       kBytes: 4, 8 or 16, to which both addresses are aligned. Bytes from source_bytes on become zero; with 0, `from`
//       is not read and may be anything that is aligned. 16 bytes bypass the L1 cache, unless
//       cp_async<16, Cache::kAllLevels> says otherwise.
//   cp_async_commit()         makes a group of the thread's copies since the last one
//   cp_async_wait<kGroups>()  until all but the thread's last kGroups groups have landed
//   cp_async_wait_all()       until all of the thread's copies have landed
//
// A wait is for the thread's own copies: others may read them after a __syncthreads (or __syncwarp) that follows it.
#pragma once

#include "cuda/memory.cuh"

#ifdef S3D_EMULATOR
#include "emulator/tensor_core.h"
#else
namespace s3d::cuda {

enum class Cache { kAllLevels, kL2Only };

template <int kBytes, Cache kCache = kBytes == 16 ? Cache::kL2Only : Cache::kAllLevels, typename T, typename U>
__device__ __forceinline__ void cp_async(T* to, U* from, int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
  static_assert(kCache == Cache::kAllLevels || kBytes == 16, "past the L1 cache go 16 bytes only");
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kCache == Cache::kL2Only) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2, %3;"
                 :: "r"(address), "l"(from), "n"(kBytes), "r"(source_bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(address), "l"(from), "n"(kBytes), "r"(source_bytes) : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace s3d::cuda
#endif
