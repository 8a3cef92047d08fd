// Tiles of 256 voxels with what surrounds them: the voxels that a convolution with stride 1 and kernel sides 1 and 3
// reads for a cuboid (4, 8, 8) of a block where 8 divides its height and width, else for four cuboids (4, 4, 4).
//
//   Halo        the sides of a cuboid with its surroundings, and how blocks are cut to cuboids: cuboids are numbered
//               through all blocks, in the order of memory
//   TileRange   the cuboids of a tile. Tiles are of consecutive cuboids; where samples are told apart, none has cuboids
//               of two: sample n begins at tile first_tile(n), its last tile may be partial, and one may be empty
//   slot_key    the swizzle of slots of 64 bytes
#pragma once

#include <cstdint>

#include "cuda/memory.cuh"
#include "cuda/window.cuh"

namespace s3d::cuda {

// kWide: a tile is a cuboid (4, 8, 8), else four (4, 4, 4).
template <bool kWide>
struct Tile {
  static constexpr int kCuboids = kWide ? 1 : 4, kDepth = 4, kSide = kWide ? 8 : 4;
  static constexpr int kVoxels = kCuboids * kDepth * kSide * kSide;
  static constexpr int kLineLanes = kWide ? 16 : 8;  // that look for the sources of a line of at most kSide + 2
  // Words of lines of the halo: with this pitch those of different offsets are in different banks.
  static constexpr int kLinePitch = kWide ? 11 : 6, kLineWords = (kDepth + 2) * kCuboids * kLinePitch;
};

// Whether tiles are (4, 8, 8), with fewer slots than four (4, 4, 4).
inline bool is_wide(const Window& window) { return window.written_block.h % 8 == 0 && window.written_block.w % 8 == 0; }

// Slots of a plane: of all cuboids of the tile.
struct Halo {
  int planes, lines, pitch, plane_slots;
  int cuboids_d, cuboids_h, cuboids_w, cuboids;  // of a block along each axis; of all blocks
  __host__ __device__ int slots() const { return planes * plane_slots; }
  __host__ __device__ int cuboids_of_block() const { return cuboids_d * cuboids_h * cuboids_w; }
};

template <bool kWide>
Halo halo_of(const Window& window) {
  using Shape = Tile<kWide>;
  const auto side = [&](int axis, int of_cuboid) { return of_cuboid + static_cast<int>(window.kernel[axis]) - 1; };
  const auto cut = [](int64_t block, int cuboid) { return static_cast<int>(block / cuboid); };
  const Triple& block = window.written_block;
  const int lines = side(1, Shape::kSide), pitch = side(2, Shape::kSide);
  Halo halo = {side(0, Shape::kDepth),     lines,
               pitch,                      Shape::kCuboids * lines * pitch,
               cut(block.d, Shape::kDepth), cut(block.h, Shape::kSide),
               cut(block.w, Shape::kSide), 0};
  halo.cuboids = static_cast<int>(window.written_rows) * halo.cuboids_of_block();
  return halo;
}

// Where a cuboid begins: the row of its block (-1: there is no such cuboid) and coordinates in it.
struct alignas(16) Cuboid {
  int row, d, h, w;
};

template <bool kWide>
__device__ __forceinline__ Cuboid cuboid_at(const Halo& halo, int number) {
  const int w = number % halo.cuboids_w, line = number / halo.cuboids_w;
  const int h = line % halo.cuboids_h, plane = line / halo.cuboids_h;
  return {plane / halo.cuboids_d, plane % halo.cuboids_d * Tile<kWide>::kDepth, h * Tile<kWide>::kSide,
          w * Tile<kWide>::kSide};
}

// The rows of blocks of sample n: rows[n] ... rows[n + 1] - 1.
struct SampleOffsets {
  int count;
  Global<const int32_t> rows;
};

// At least the sample's share of all cuboids, rounded up: so each of its cuboids has a place, and no sum over the
// samples before is needed. With n = the number of samples: the number of all tiles.
template <bool kWide>
__host__ __device__ __forceinline__ int first_tile(int64_t first_cuboid, int n) {
  return static_cast<int>(first_cuboid / Tile<kWide>::kCuboids) + (kWide ? 0 : n);
}

// The tiles of a window; samples: their number, or 0 if they need not be told apart.
inline int64_t halo_tiles(const Window& window, int samples) {
  const int64_t voxels = window.written_rows * window.written_block.volume();
  if (samples > 0 && !is_wide(window)) return voxels / Tile<false>::kVoxels + samples;
  return (voxels + Tile<true>::kVoxels - 1) / Tile<true>::kVoxels;
}

struct TileRange {
  int begin, end, sample;  // cuboids
};

// All lanes of a warp together.
template <bool kWide>
__device__ __forceinline__ TileRange range_of_tile(const Halo& halo, const SampleOffsets& samples, int tile) {
  const int of_block = halo.cuboids_of_block(), lane = threadIdx.x % 32;
  int started = 0;
  for (int first = 0; first < samples.count; first += 32) {
    const int n = first + lane;
    bool begun = false;
    if (n < samples.count) {
      const int row = samples.rows[n];
      begun = first_tile<kWide>(static_cast<int64_t>(row) * of_block, n) <= tile;
    }
    started += __popc(__ballot_sync(0xFFFFFFFF, begun));
  }
  const int sample = started - 1;
  const int row = samples.rows[sample], end = samples.rows[sample + 1];
  const int first = first_tile<kWide>(static_cast<int64_t>(row) * of_block, sample);
  return {row * of_block + (tile - first) * Tile<kWide>::kCuboids, end * of_block, sample};
}

// By all warps of the block: the gathered voxel of each slot, or -1, and a word for each line, whose bit x tells
// whether its voxel x is there. Slots lie [plane, cuboid, line, voxel], words [plane, cuboid, line] with kLinePitch.
template <bool kWide>
__device__ __forceinline__ void find_sources(const WindowView& window, const Halo& halo, Shared<Cuboid> cuboids,
                                             Shared<int> sources, Shared<uint32_t> lines) {
  using Shape = Tile<kWide>;
  constexpr int kLinesAtOnce = 32 / Shape::kLineLanes;  // of a warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int first = warp * kLinesAtOnce; first < halo.planes * Shape::kCuboids * halo.lines;
       first += warps * kLinesAtOnce) {
    const int line = first + lane / Shape::kLineLanes, x = lane % Shape::kLineLanes;
    const int slice = line / halo.lines, y = line % halo.lines;  // a plane of one cuboid
    const Cuboid at = load<Cuboid>(cuboids + slice % Shape::kCuboids);
    int source = -1;
    if (at.row >= 0 && x < halo.pitch) {
      source = voxel_at(window, at.row, at.d + slice / Shape::kCuboids - window.d.padding,
                        at.h + y - window.h.padding, at.w + x - window.w.padding);
    }
    if (x < halo.pitch) sources[line * halo.pitch + x] = source;
    const uint32_t found = __ballot_sync(0xFFFFFFFF, source >= 0);
    if (x == 0) lines[slice * Shape::kLinePitch + y] = found >> lane & ((1u << Shape::kLineLanes) - 1);
  }
}

// The written voxel of a row of the tile, 0 ... kVoxels - 1, that lies in `cuboid`; -1: there is no such cuboid.
template <bool kWide>
__device__ __forceinline__ int written_voxel(const WindowView& window, const Cuboid& cuboid, int row) {
  constexpr int kSide = Tile<kWide>::kSide;
  const int z = row / (kSide * kSide) % Tile<kWide>::kDepth, y = row / kSide % kSide, x = row % kSide;
  const int plane = cuboid.row * window.d.written_side + cuboid.d + z;
  const int voxel = (plane * window.h.written_side + cuboid.h + y) * window.w.written_side + cuboid.w + x;
  return cuboid.row < 0 ? -1 : voxel;
}

// The chunk of a slot that comes first: what a phase of ldmatrix reads, eight slots of a line or four of each of two
// lines, has the same chunk in eight different groups of four banks. The pitch of lines is even.
template <bool kWide>
__device__ __forceinline__ int slot_key(int line, int x) {
  return kWide ? x >> 1 & 3 : (x >> 1 & 1) | (line & 1) << 1;
}

}  // namespace s3d::cuda
