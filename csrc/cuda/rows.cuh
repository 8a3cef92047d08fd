// Rows of a channels-last tensor, 16 bytes at a time where all rows are aligned to it and by elements where they are
// not (odd numbers of channels).
#pragma once

#include "cuda/cp_async.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {

template <typename T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes

// Whether rows of `channels` elements, and the parts of `part` elements that they are cut to, are whole chunks.
template <typename T>
bool whole_chunks(const T* data, int64_t channels, int64_t part) {
  return channels % kChunk<T> == 0 && part % kChunk<T> == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// One chunk to shared memory: the first `count` elements (or all, or with none nothing is read), zeros beyond. By
// elements it is there at once, else when the thread's copies have landed.
template <typename T>
__device__ __forceinline__ void copy_chunk(Shared<T> to, Global<const T> from, int64_t offset, int count, bool whole) {
  if (whole) {
    cp_async<16>(to, from + (count > 0 ? offset : 0), count > 0 ? 16 : 0);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kChunk<T>; ++i) {
    T value = from_float<T>(0.0f);
    if (i < count) value = from[offset + i];
    to[i] = value;
  }
}

// Where in shared memory a chunk of a row of kChunks is, for products along the rows (ldmatrix_transposed). Eight rows'
// chunks, and for float the 4 x 8 numbers that a warp loads at once, lie in different banks.
template <typename T, int kChunks>
__device__ __forceinline__ int swizzled_wide(int row, int chunk) {
  int key = row & 7;
  if constexpr (sizeof(T) == 4) {
    key = (row & 3) << 1;
  } else if constexpr (kChunks == 4) {
    key = row >> 1 & 3;
  }
  return (row * kChunks + (chunk ^ key)) * kChunk<T>;
}

template <typename T>
__device__ __forceinline__ uint4 pack_chunk(const float* values) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                      __float_as_uint(values[3]));
  } else {
    return make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]),
                      pack<T>(values[6], values[7]));
  }
}

template <typename T>
__device__ __forceinline__ void unpack_chunk(const uint4& chunk, float (&values)[kChunk<T>]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      unpack<T>(words[i], values[2 * i], values[2 * i + 1]);
    }
  }
}

// The first `count` of kValues neighbouring floats, zeros beyond. `whole`: aligned, and `count` a multiple of 4.
template <int kValues>
__device__ __forceinline__ void load_floats(float (&values)[kValues], Global<const float> from, int count, bool whole) {
#pragma unroll
  for (int i = 0; i < kValues; i += 4) {
    if (whole) {
      const float4 four = i < count ? load<float4>(from + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      values[i] = four.x;
      values[i + 1] = four.y;
      values[i + 2] = four.z;
      values[i + 3] = four.w;
      continue;
    }
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      values[j] = 0.0f;
      if (j < count) values[j] = from[j];
    }
  }
}

// The first `count` of kValues neighbouring numbers.
template <int kValues, typename T>
__device__ __forceinline__ void store_values(Global<T> to, const float (&values)[kValues], int64_t count, bool whole) {
  static_assert(kValues % kChunk<T> == 0, "whole chunks");
  if (whole) {
#pragma unroll
    for (int i = 0; i < kValues; i += kChunk<T>) {
      if (i < count) store(to + i, pack_chunk<T>(values + i));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (i < count) to[i] = from_float<T>(values[i]);
  }
}

}  // namespace s3d::cuda
