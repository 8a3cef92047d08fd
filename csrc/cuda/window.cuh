// A window (s3d/window.h) as kernels see it, and where a written voxel finds its input under a tap.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "cuda/memory.cuh"
#include "s3d/window.h"

namespace s3d::cuda {

struct WindowAxis {
  int written_side, gathered_side, kernel, stride, padding, radius;
};

struct WindowView {
  WindowAxis d, h, w;
  bool transposed;
  int columns, taps;
  int64_t written_voxels_count;
  Global<const int32_t> table;
  Global<const uint8_t> written_voxels, gathered_voxels;  // or null: all visible
};

// Throws std::invalid_argument where kernels could not compute with it.
inline WindowView view(const Window& window) {
  const Locator locator(window);  // throws if the table does not reach all inputs
  const int64_t written = window.written_rows * window.written_block.volume();
  const int64_t gathered = window.gathered_rows * window.gathered_block.volume();
  if (std::max(written, gathered) > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("more than 2^31 - 1 voxels");  // numbers of voxels are int32; addresses are 64 bits
  }
  const auto axis = [&](int i) {
    return WindowAxis{static_cast<int>(window.written_block[i]), static_cast<int>(window.gathered_block[i]),
                      static_cast<int>(window.kernel[i]),        static_cast<int>(window.stride[i]),
                      static_cast<int>(window.padding[i]),       static_cast<int>(window.radius[i])};
  };
  return {axis(0), axis(1), axis(2), window.transposed, static_cast<int>(window.columns()),
          static_cast<int>(window.taps()), written, window.table, window.written_voxels, window.gathered_voxels};
}

struct VoxelPlace {
  int row, d, h, w;  // its block and its coordinates in it
};

__device__ __forceinline__ VoxelPlace place_of(const WindowView& window, int voxel) {
  const int w = voxel % window.w.written_side, line = voxel / window.w.written_side;
  const int h = line % window.h.written_side, plane = line / window.h.written_side;
  return {plane / window.d.written_side, plane % window.d.written_side, h, w};
}

struct Tap {
  int d, h, w;
};

__device__ __forceinline__ Tap tap_of(const WindowView& window, int tap) {
  const int line = tap / window.w.kernel;
  return {line / window.h.kernel, line % window.h.kernel, tap % window.w.kernel};
}

// Which neighbour (0 ... 2 * radius) holds a coordinate counted from the beginning of a block, which becomes the
// coordinate in that neighbour. At most `radius` rounds, and mostly none, where a division would take twenty
// instructions.
__device__ __forceinline__ int neighbour_at(const WindowAxis& axis, int& local) {
  int block = axis.radius;
  for (; local < 0; local += axis.gathered_side) --block;
  for (; local >= axis.gathered_side; local -= axis.gathered_side) ++block;
  return block;
}

// The gathered voxel at coordinates counted from the beginning of the gathered block in the place of written block
// `row`, or -1.
__device__ __forceinline__ int voxel_at(const WindowView& window, int row, int d, int h, int w) {
  const int block_d = neighbour_at(window.d, d), block_h = neighbour_at(window.h, h);
  const int block_w = neighbour_at(window.w, w);
  const int column = (block_d * (2 * window.h.radius + 1) + block_h) * (2 * window.w.radius + 1) + block_w;
  const int found = window.table[static_cast<int64_t>(row) * window.columns + column];
  if (found < 0) return -1;
  const int voxel = ((found * window.d.gathered_side + d) * window.h.gathered_side + h) * window.w.gathered_side + w;
  if (window.gathered_voxels != nullptr && window.gathered_voxels[voxel] == 0) return -1;
  return voxel;
}

// The gathered coordinate under a tap, counted from the beginning of the block. False: none, between the steps of a
// stride.
__device__ __forceinline__ bool locate(const WindowAxis& axis, bool transposed, int written, int tap, int& local) {
  local = written * axis.stride - axis.padding + tap;
  if (transposed) {
    local = written + axis.padding - tap;
    if (axis.stride != 1) {
      if (local % axis.stride != 0) return false;
      local /= axis.stride;
    }
  }
  return true;
}

// The gathered voxel under `tap`, or -1.
__device__ __forceinline__ int source_of(const WindowView& window, const VoxelPlace& at, const Tap& tap) {
  int d, h, w;
  const bool exists = locate(window.d, window.transposed, at.d, tap.d, d) &&
                      locate(window.h, window.transposed, at.h, tap.h, h) &&
                      locate(window.w, window.transposed, at.w, tap.w, w);
  return exists ? voxel_at(window, at.row, d, h, w) : -1;
}

}  // namespace s3d::cuda
