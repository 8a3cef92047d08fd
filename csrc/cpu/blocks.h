// Blocks of a dense volume of any memory format, and back.
#pragma once

#include <algorithm>
#include <cstdint>

#include "s3d/window.h"

namespace s3d::cpu {

struct Volume {
  int64_t batch, channels;
  Triple shape;
  int64_t strides[5];  // elements, of [N, C, D, H, W]
};

// [N, C, D, H, W] -> [V, block, C]; zeros at masked voxels and beyond the volume.
template <typename T>
void gather(const T* dense, const Volume& volume, const int32_t* index, const uint8_t* voxels, const Triple& block,
            int64_t rows, T* blocks, int threads) {
  const int64_t planes = rows * block.d;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int32_t* at = index + plane / block.d * 4;
    const int64_t z = at[1] * block.d + plane % block.d;
    for (int64_t h = 0; h < block.h; ++h) {
      for (int64_t w = 0; w < block.w; ++w) {
        const int64_t voxel = (plane * block.h + h) * block.w + w, y = at[2] * block.h + h, x = at[3] * block.w + w;
        T* to = blocks + voxel * volume.channels;
        const bool outside = z >= volume.shape.d || y >= volume.shape.h || x >= volume.shape.w;
        if (outside || (voxels != nullptr && !voxels[voxel])) {
          std::fill_n(to, volume.channels, T{});
          continue;
        }
        const int64_t* s = volume.strides;
        const T* from = dense + at[0] * s[0] + z * s[2] + y * s[3] + x * s[4];
        if (s[1] == 1) {  // channels last: lines as they are
          std::copy_n(from, volume.channels, to);
        } else {
          for (int64_t c = 0; c < volume.channels; ++c) to[c] = from[c * s[1]];
        }
      }
    }
  }
}

// [V, block, C], fill [C] -> [N, D, H, W, C].
template <typename T>
void scatter(const T* blocks, const T* fill, const Volume& volume, const int32_t* index, const uint8_t* voxels,
             const Triple& block, int64_t rows, T* dense, int threads) {
  const int64_t channels = volume.channels, all = volume.batch * volume.shape.volume();
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t voxel = 0; voxel < all; ++voxel) std::copy_n(fill, channels, dense + voxel * channels);
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < rows * block.d; ++plane) {
      const int32_t* at = index + plane / block.d * 4;
      const int64_t z = at[1] * block.d + plane % block.d;
      for (int64_t h = 0; h < block.h; ++h) {
        for (int64_t w = 0; w < block.w; ++w) {
          const int64_t voxel = (plane * block.h + h) * block.w + w, y = at[2] * block.h + h, x = at[3] * block.w + w;
          const bool outside = z >= volume.shape.d || y >= volume.shape.h || x >= volume.shape.w;
          if (outside || (voxels != nullptr && !voxels[voxel])) continue;
          const int64_t to = ((at[0] * volume.shape.d + z) * volume.shape.h + y) * volume.shape.w + x;
          std::copy_n(blocks + voxel * channels, channels, dense + to * channels);
        }
      }
    }
  }
}

}  // namespace s3d::cpu
