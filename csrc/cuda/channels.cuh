// A thread's part of a row of channels: kVector neighbouring ones, 16 bytes where all rows are whole chunks (rows.cuh),
// else one.
#pragma once

#include <limits>
#include <stdexcept>

#include "cuda/rows.cuh"

namespace s3d::cuda {

// Whether rows of all these tensors (or nulls) can be read and written by 16 bytes.
template <typename... T>
bool all_whole_chunks(int64_t channels, const T*... tensors) {
  return (whole_chunks(tensors, channels, channels) && ...);
}

template <int kVector, typename T>
__device__ __forceinline__ void load_channels(Global<const T> from, float (&values)[kVector]) {
  if constexpr (kVector == 1) {
    values[0] = to_float(static_cast<T>(from[0]));
  } else {
    static_assert(kVector == kChunk<T>, "16 bytes");
    unpack_chunk<T>(load<uint4>(from), values);
  }
}

template <int kVector, typename T>
__device__ __forceinline__ void store_channels(Global<T> to, const float (&values)[kVector]) {
  if constexpr (kVector == 1) {
    to[0] = from_float<T>(values[0]);
  } else {
    static_assert(kVector == kChunk<T>, "16 bytes");
    store(to, pack_chunk<T>(values));
  }
}

// How many blocks of `size` it takes, as the first dimension of a grid.
inline unsigned blocks_of(int64_t count, int64_t size) {
  const int64_t blocks = (count + size - 1) / size;
  if (blocks > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("more blocks than a grid can have");
  return static_cast<unsigned>(blocks);
}

}  // namespace s3d::cuda
