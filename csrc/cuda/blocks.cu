// Visible blocks of a dense volume, and back.
//
//   gather    blocks[v, c] = dense[n, c, z, y, x] of the voxel's place; zeros at masked voxels and beyond the volume
//   scatter   dense[n, c, z, y, x] = blocks[v, c] at visible voxels, fill[c] elsewhere
//
// Layouts   dense [N, C, D, H, W] of any strides; blocks [rows, block, C], channels last; index [rows, 4], cells
//           [N, grid] (table.cu). Both directions go through what is written, and write each number once: gather finds
//           a voxel's place by index, scatter a place's block by cells.
// Work      A block of 256 threads moves some consecutive voxels of what is written (gather: of the blocks, scatter: of
//           the volume, W fastest): 32 of 32 channels or more, 64 of 16, ... 1024 of one channel. First a thread finds
//           where a voxel is read and written, then all move its channels: straight where they are neighbours on
//           both sides, 16 bytes at a time if possible, else through shared memory, 1024 numbers at a time, so that
//           warps run along the channels of the blocks and along the voxels of the volume.
// Memory    Shared: places 2 * 1024 * 8 bytes; for the turn 1056 numbers, padded so that neither way of going through
//           them has bank conflicts.
// Numbers   Moved as bits of 2, 4 or 16 bytes, whatever they mean.
// Limits    Fewer than 2^31 blocks of threads. Dense strides as of a transposed view are read and written one by one.
// Expected  Bound by memory: what is visible is read once, the result written once. Not measured yet.
#include <algorithm>
#include <cstdint>

#include "cuda/channels.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/memory.cuh"

namespace s3d::cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 4, kNumbers = 1024, kMostTileChannels = 32, kPadding = 32;

struct BlocksView {
  Global<const int32_t> index, cells;
  Global<const uint8_t> voxels;
  int64_t written;  // voxels
  int block_d, block_h, block_w, channels;
  int d, h, w, grid_d, grid_h, grid_w;  // of the volume
  int64_t stride_n, stride_c, stride_d, stride_h, stride_w;
  int tile_channels;  // a power of two
};

// Where a voxel's first channel is read, -1: nowhere, and where it is written.
struct Places {
  int64_t read, written;
};

__device__ __forceinline__ bool is_visible(const BlocksView& b, int64_t voxel) {
  if (b.voxels == nullptr) return true;
  return b.voxels[voxel] != 0;
}

// Of a voxel of the blocks.
__device__ __forceinline__ Places places_of_gather(const BlocksView& b, int64_t voxel) {
  const Places none = {-1, voxel * b.channels};
  if (!is_visible(b, voxel)) return none;
  const int64_t line = voxel / b.block_w, plane = line / b.block_h, row = plane / b.block_d;
  const int4 at = load<int4>(b.index + row * 4);
  const int64_t z = int64_t{at.y} * b.block_d + (plane - row * b.block_d);
  const int64_t y = int64_t{at.z} * b.block_h + (line - plane * b.block_h);
  const int64_t x = int64_t{at.w} * b.block_w + (voxel - line * b.block_w);
  if (z >= b.d || y >= b.h || x >= b.w) return none;
  return {at.x * b.stride_n + z * b.stride_d + y * b.stride_h + x * b.stride_w, none.written};
}

// Of a voxel of the volume, counted with W fastest.
__device__ __forceinline__ Places places_of_scatter(const BlocksView& b, int64_t voxel) {
  const int64_t line = voxel / b.w, plane = line / b.h, n = plane / b.d;
  const int x = static_cast<int>(voxel - line * b.w), y = static_cast<int>(line - plane * b.h);
  const int z = static_cast<int>(plane - n * b.d);
  const int64_t written = n * b.stride_n + z * b.stride_d + y * b.stride_h + x * b.stride_w;
  const int cell_d = z / b.block_d, cell_h = y / b.block_h, cell_w = x / b.block_w;
  const int64_t row = b.cells[((n * b.grid_d + cell_d) * b.grid_h + cell_h) * b.grid_w + cell_w];
  if (row < 0) return {-1, written};
  const int64_t local_line = (row * b.block_d + (z - cell_d * b.block_d)) * b.block_h + (y - cell_h * b.block_h);
  const int64_t source = local_line * b.block_w + (x - cell_w * b.block_w);
  return {is_visible(b, source) ? source * b.channels : -1, written};
}

// fill: null for zeros.
template <typename Word, bool kGather, bool kTurn>
__global__ void __launch_bounds__(kThreads, kBlocks)
    move_blocks_kernel(BlocksView b, Global<const Word> from, Global<const Word> fill, Global<Word> to) {
  S3D_SHARED(int64_t, reads, kNumbers);
  S3D_SHARED(int64_t, writes, kNumbers);
  const int tile_voxels = kNumbers / b.tile_channels;
  const int64_t first = int64_t{blockIdx.x} * tile_voxels;
  const int voxels = static_cast<int>(min(b.written - first, int64_t{tile_voxels}));
  for (int i = threadIdx.x; i < voxels; i += kThreads) {
    const Places places = kGather ? places_of_gather(b, first + i) : places_of_scatter(b, first + i);
    reads[i] = places.read;
    writes[i] = places.written;
  }
  __syncthreads();
  const auto read = [&](int voxel, int channel, int64_t stride) {
    const int64_t place = reads[voxel];
    Word value = {};
    if (place >= 0) {
      value = from[place + channel * stride];
    } else if (fill != nullptr) {
      value = fill[channel];
    }
    return value;
  };
  if constexpr (!kTurn) {
    for (int i = threadIdx.x; i < voxels * b.channels; i += kThreads) {
      const int voxel = i / b.channels, channel = i - voxel * b.channels;
      const Word value = read(voxel, channel, 1);
      to[writes[voxel] + channel] = value;
    }
  } else {
    // The tile is [channel, voxel]. Lanes go through it along the channels of the blocks, 32 / tile_channels voxels
    // side by side, or along the voxels of the volume.
    S3D_SHARED(Word, tile, kNumbers + kPadding);
    const int row = (kNumbers + kPadding) / b.tile_channels;
    for (int first_channel = 0; first_channel < b.channels; first_channel += b.tile_channels) {
      const int channels = min(b.tile_channels, b.channels - first_channel);
#pragma unroll
      for (int step = 0; step < kNumbers; step += kThreads) {
        const int i = step + threadIdx.x;
        const int voxel = kGather ? i % tile_voxels : i / b.tile_channels;
        const int channel = kGather ? i / tile_voxels : i % b.tile_channels;
        if (voxel >= voxels || channel >= channels) continue;
        const Word value = read(voxel, first_channel + channel, kGather ? b.stride_c : 1);
        tile[channel * row + voxel] = value;
      }
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kNumbers; step += kThreads) {
        const int i = step + threadIdx.x;
        const int voxel = kGather ? i / b.tile_channels : i % tile_voxels;
        const int channel = kGather ? i % b.tile_channels : i / tile_voxels;
        if (voxel >= voxels || channel >= channels) continue;
        const Word value = tile[channel * row + voxel];
        to[writes[voxel] + (first_channel + channel) * (kGather ? 1 : b.stride_c)] = value;
      }
      __syncthreads();  // the tile is free
    }
  }
}

BlocksView view(const BlockRows& rows, const DenseVolume& volume, const int32_t* cells, int64_t written) {
  const auto side = [](int64_t value) { return static_cast<int>(value); };
  const auto grid = [](int64_t size, int64_t block) { return static_cast<int>((size + block - 1) / block); };
  const Triple &b = rows.block, &s = volume.shape;
  const int64_t* const strides = volume.strides;
  return {rows.index, cells, rows.voxels, written,
          side(b.d), side(b.h), side(b.w), volume.channels,
          side(s.d), side(s.h), side(s.w), grid(s.d, b.d), grid(s.h, b.h), grid(s.w, b.w),
          strides[0], strides[1], strides[2], strides[3], strides[4], 1};
}

template <typename Word, bool kGather>
void move_words(BlocksView b, const void* from, const void* fill, void* to, cudaStream_t stream) {
  while (b.tile_channels < std::min(b.channels, kMostTileChannels)) b.tile_channels *= 2;
  const auto start = [&](auto kernel) {
    launch(kGather ? "gather_blocks" : "scatter_blocks", kernel, blocks_of(b.written, kNumbers / b.tile_channels),
           kThreads, 0, stream, b, static_cast<const Word*>(from), static_cast<const Word*>(fill),
           static_cast<Word*>(to));
  };
  if constexpr (sizeof(Word) == 16) {
    start(move_blocks_kernel<Word, kGather, false>);
  } else if (b.stride_c == 1 || b.channels == 1) {
    start(move_blocks_kernel<Word, kGather, false>);
  } else {
    start(move_blocks_kernel<Word, kGather, true>);
  }
}

// Numbers of `bytes`, as larger ones where channels are neighbours and all places are aligned to that.
template <bool kGather>
void move(BlocksView b, int64_t bytes, const void* from, const void* fill, void* to, cudaStream_t stream) {
  if (b.channels == 0) return;
  const int64_t chunk = 16 / bytes;
  int64_t* const strides[] = {&b.stride_n, &b.stride_d, &b.stride_h, &b.stride_w};
  bool whole = b.stride_c == 1 && b.channels % chunk == 0;
  for (const void* pointer : {from, fill, static_cast<const void*>(to)}) {
    whole = whole && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  for (const int64_t* stride : strides) whole = whole && *stride % chunk == 0;
  if (whole) {
    for (int64_t* stride : strides) *stride /= chunk;
    b.channels /= static_cast<int>(chunk);
    return move_words<uint4, kGather>(b, from, fill, to, stream);
  }
  (bytes == 2 ? move_words<uint16_t, kGather> : move_words<uint32_t, kGather>)(b, from, fill, to, stream);
}

}  // namespace

template <typename T>
void gather_blocks(const BlockRows& rows, const DenseVolume& volume, const T* dense, T* blocks, cudaStream_t stream) {
  const int64_t written = rows.rows * rows.block.volume();
  move<true>(view(rows, volume, nullptr, written), sizeof(T), dense, nullptr, blocks, stream);
}

template <typename T>
void scatter_blocks(const BlockRows& rows, const DenseVolume& volume, const int32_t* cells, const T* blocks,
                    const T* fill, T* dense, cudaStream_t stream) {
  const int64_t written = int64_t{volume.batch} * volume.shape.volume();
  move<false>(view(rows, volume, cells, written), sizeof(T), blocks, fill, dense, stream);
}

#define S3D_INSTANTIATE(T)                                                                                      \
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "numbers of 2 or 4 bytes");                                   \
  template void gather_blocks<T>(const BlockRows&, const DenseVolume&, const T*, T*, cudaStream_t);             \
  template void scatter_blocks<T>(const BlockRows&, const DenseVolume&, const int32_t*, const T*, const T*, T*, \
                                  cudaStream_t);
S3D_INSTANTIATE(float)
S3D_INSTANTIATE(bf16)
S3D_INSTANTIATE(fp16)
#undef S3D_INSTANTIATE

}  // namespace s3d::cuda
