// Runs kernels; what tests and bindings set and ask. For one thread of the host at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulator/block.h"
#include "emulator/global_memory.h"

namespace s3d::emulator {

struct Options {
  uint64_t seed = 0;       // of the order in which blocks and warps run
  bool find_races = true;  // or only their effect on results is seen, if there is one
  uint32_t most_shared_bytes = SharedMemory::kMostBytes;  // that a block may ask for; some GPUs have less
};

// Of all launches from now on.
void set_options(const Options& options);

uint32_t most_shared_bytes();

struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;
  Counters counters;
};

// The launches since the last call, in their order; those that ended with a fault are missing.
std::vector<LaunchRecord> take_launches();

void run(const LaunchShape& shape, const std::function<void()>& kernel);

}  // namespace s3d::emulator

namespace s3d::cuda {

inline size_t most_shared_bytes() { return emulator::most_shared_bytes(); }

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
  static_assert(!(std::is_pointer_v<Parameters> || ...), "kernels take Global<T>, not pointers that nobody checks");
  const std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  emulator::run({name, grid, block, static_cast<uint32_t>(shared_bytes)}, [&] { std::apply(kernel, parameters); });
}

}  // namespace s3d::cuda
