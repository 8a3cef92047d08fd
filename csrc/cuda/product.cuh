// One product of a convolution, [written voxels, K] times [K, N] for each group and tap: what the kernels that compute
// it by different ways of reading voxels share. A step of theirs is one tap x kTileK channels, 64 bytes of each row.
//
//   packed weight   [group, N / kTileN, tap, K / kTileK, kTileN, kTileK] with zeros beyond K and N (conv3d_pack.cu), so
//                   that a step's weights are one run of memory. Columns are permuted (channel_of_column) so that a
//                   lane's sums are 8 neighbouring channels, which it stores at once.
//   copy_weights    that run to a stage in shared memory, by cp.async of all threads
//   multiply        sums += rows * weights of one step, for the fragments of 16 rows that have a pair
//   store_sums      sums + bias to the written voxels
#pragma once

#include "cuda/cp_async.cuh"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/memory.cuh"
#include "cuda/mma.cuh"
#include "cuda/rows.cuh"

namespace s3d::cuda {

constexpr int kRowChunks = 4;  // of 16 bytes, of a row in a step
template <typename T>
constexpr int kTileK = kRowChunks * kChunk<T>;

struct Product {
  int taps, groups, k, n;
  bool transposed;
  int k_steps, n_tiles;
  int tile_n;
};

template <typename T>
Product product_of(const Window& window, const ConvChannels& channels) {
  const int in = channels.in / channels.groups, out = channels.out / channels.groups;
  const int k = window.transposed ? out : in, n = window.transposed ? in : out;
  const int tile_n = n <= 32 ? 32 : 64;
  const int k_steps = (k + kTileK<T> - 1) / kTileK<T>, n_tiles = (n + tile_n - 1) / tile_n;
  return {static_cast<int>(window.taps()), channels.groups, k, n, window.transposed, k_steps, n_tiles, tile_n};
}

// In `sums` lane 4 g + t has columns 8 j + 2 t + e, which are to be channels 32 (j / 4) + 8 t + 2 (j % 4) + e.
__device__ __forceinline__ int channel_of_column(int column) {
  return column / 32 * 32 + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// Eight consecutive rows of 64 bytes have the same chunk in eight different groups of four banks.
template <typename T>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return (row * kRowChunks + (chunk ^ (row >> 1 & 3))) * kChunk<T>;
}

// Of channels k_step of `tap`; `packed` begins at the group's and tile's weights.
template <typename T, int kColumns, int kThreads>
__device__ __forceinline__ void copy_weights(Shared<T> stage, Global<const T> packed, const Product& product, int tap,
                                             int k_step) {
  const Global<const T> weights =
      packed + (static_cast<int64_t>(tap) * product.k_steps + k_step) * (kColumns * kTileK<T>);
#pragma unroll
  for (int i = threadIdx.x; i < kColumns * kRowChunks; i += kThreads) {
    cp_async<16>(stage + swizzled<T>(i / kRowChunks, i % kRowChunks), weights + i * kChunk<T>);
  }
}

// What comes next: channels k_step of the lowest of `taps`.
struct Step {
  uint32_t taps;
  int k_step;
  __device__ int tap() const { return __ffs(static_cast<int>(taps)) - 1; }
  __device__ void advance(int k_steps) {
    if (++k_step < k_steps) return;
    k_step = 0;
    taps &= taps - 1;
  }
};

// sums += rows * columns for the warp's `fragments` of 16 rows, a bit each. rows(fragment, row, chunk): where in shared
// memory a chunk of a row of a fragment is.
template <typename T, Math kMath, int kFragments, int kColumns, typename Rows>
__device__ __forceinline__ void multiply(const Rows& rows, Shared<T> columns, uint32_t fragments,
                                         float (&sums)[kFragments][kColumns / 8][4]) {
  const int lane = threadIdx.x % 32;
  if constexpr (kMath == Math::kExact) {
    static_assert(sizeof(T) == 4, "of float");
#pragma unroll 1
    for (int chunk = 0; chunk < kRowChunks; ++chunk) {
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        if ((fragments >> m & 1) == 0) continue;
        const float4 low = load<float4>(rows(m, lane / 4, chunk));
        const float4 high = load<float4>(rows(m, lane / 4 + 8, chunk));
#pragma unroll
        for (int i = 0; i < kColumns / 4; ++i) {
          const float4 b = load<float4>(columns + swizzled<T>(i / 2 * 8 + lane % 4 * 2 + i % 2, chunk));
          float& first = sums[m][i / 2][i % 2];
          first += low.x * b.x;
          first += low.y * b.y;
          first += low.z * b.z;
          first += low.w * b.w;
          float& second = sums[m][i / 2][2 + i % 2];
          second += high.x * b.x;
          second += high.y * b.y;
          second += high.z * b.z;
          second += high.w * b.w;
        }
      }
    }
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // mma takes 32 bytes of a row
      uint32_t b[kColumns / 8][2];
#pragma unroll
      for (int j = 0; j < kColumns / 8; j += 2) {
        uint32_t pair[4];
        ldmatrix(pair, columns + swizzled<T>(j * 8 + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) b[j + i / 2][i % 2] = pair[i];
      }
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        if ((fragments >> m & 1) == 0) continue;
        uint32_t a[4];
        ldmatrix(a, rows(m, lane % 16, half * 2 + lane / 16));
        if constexpr (sizeof(T) == 4) {  // the weights were rounded when they were packed
#pragma unroll
          for (int i = 0; i < 4; ++i) a[i] = to_tf32(__uint_as_float(a[i]));
        }
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) mma<T>(sums[m][j], a, b[j]);
      }
    }
  }
}

// Where a row of the warp is written; -1: nowhere. Zeros where it is not visible.
struct WrittenRow {
  int voxel;
  bool visible;
};

// place(row): the WrittenRow of row 0 ... 16 * kFragments - 1 of the warp. n_first: the group's channel of column 0.
template <typename T, int kFragments, int kColumns, typename Place>
__device__ __forceinline__ void store_sums(const float (&sums)[kFragments][kColumns / 8][4], const Product& product,
                                           int group, int n_first, Global<const T> bias, Global<T> written, bool whole,
                                           const Place& place) {
  const int lane = threadIdx.x % 32;
  const int64_t channels = static_cast<int64_t>(product.groups) * product.n;
#pragma unroll
  for (int q = 0; q < kColumns / 32; ++q) {
    const int n = n_first + q * 32 + lane % 4 * 8, channel = group * product.n + n;
    float start[8] = {};
    if (bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (n + i < product.n) start[i] = to_float(static_cast<T>(bias[channel + i]));
      }
    }
#pragma unroll
    for (int half = 0; half < 2 * kFragments; ++half) {
      const WrittenRow row = place(half * 8 + lane / 4);
      if (row.voxel < 0) continue;
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = row.visible ? sums[half / 2][q * 4 + i / 2][half % 2 * 2 + i % 2] + start[i] : 0.0f;
      }
      store_values<8, T>(written + row.voxel * channels + channel, values, product.n - n, whole);
    }
  }
}

}  // namespace s3d::cuda
