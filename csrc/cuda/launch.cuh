// Starts kernels; for the host.
//
//   launch(name, kernel, grid, block, shared_bytes, stream, arguments...)
//
//   most_shared_bytes()
//       static and dynamic shared memory that a block may have on the current device: 227 KiB, 163 or 99
//
// `name` stands in errors and in the emulator's counters. An empty grid starts nothing. Does not wait: an error of the
// kernel itself shows later, as always in CUDA. Throws std::runtime_error with the name if the launch is refused.
#pragma once

#include "cuda/device.cuh"

#ifdef S3D_EMULATOR
#include "emulator/launch.h"
#else
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace s3d::cuda {

inline void check_launch(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next one to ask would take it for its own
  throw std::runtime_error(std::string(name) + " cannot be launched: " + cudaGetErrorString(error));
}

inline size_t most_shared_bytes() {
  int device = 0, bytes = 0;
  check_launch(cudaGetDevice(&device), "a kernel");
  check_launch(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "a kernel");
  return static_cast<size_t>(bytes);
}

// A kernel may have 48 KiB, static memory included, unless it is allowed more. All there is, once for each device, and
// never less again: another thread may be about to launch the same kernel with more.
inline void allow_all_shared_memory(const void* function, const char* name) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check_launch(cudaGetDevice(&device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({function, device}) > 0) return;
  cudaFuncAttributes attributes;
  check_launch(cudaFuncGetAttributes(&attributes, function), name);
  check_launch(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(most_shared_bytes() - attributes.sharedSizeBytes)),
               name);
  allowed.insert({function, device});
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 0) allow_all_shared_memory(function, name);
  std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  void* pointers[sizeof...(Parameters) + 1];
  std::apply([&](auto&... each) { size_t i = 0; ((pointers[i++] = &each), ...); }, parameters);
  check_launch(cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream), name);
}

}  // namespace s3d::cuda
#endif
