// Pooling over windows. Masked voxels count as zeros; outside the volume the average sees zeros and the maximum nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "s3d/window.h"

namespace s3d::cpu {

// Where the windows of an output block lie in its volume.
struct Place {
  const int32_t* target_index;  // [rows, 4] (n, gd, gh, gw)
  Triple shape;                 // of the input volume
};

// The geometry of one window: calls use(tap, gathered voxel or -1) for each tap, in order.
template <typename Use>
inline void for_each_tap(const Window& w, const Locator& locator, int64_t row, int64_t z, int64_t y, int64_t x,
                         const Use& use) {
  const int64_t span_h = 2 * w.radius.h + 1, span_w = 2 * w.radius.w + 1;
  const int32_t* table = w.table + row * w.columns();
  int64_t tap = 0;
  for (int64_t tz = 0; tz < w.kernel.d; ++tz) {
    const Source at_z = locator.at(0, tz, z);
    for (int64_t ty = 0; ty < w.kernel.h; ++ty) {
      const Source at_y = locator.at(1, ty, y);
      for (int64_t tx = 0; tx < w.kernel.w; ++tx, ++tap) {
        const Source at_x = locator.at(2, tx, x);
        int64_t voxel = -1;
        if (at_z.block >= 0 && at_y.block >= 0 && at_x.block >= 0) {
          const int64_t block = table[(at_z.block * span_h + at_y.block) * span_w + at_x.block];
          if (block >= 0) {
            voxel = ((block * w.gathered_block.d + at_z.local) * w.gathered_block.h + at_y.local) * w.gathered_block.w +
                    at_x.local;
            if (w.gathered_voxels != nullptr && !w.gathered_voxels[voxel]) voxel = -1;
          }
        }
        use(tap, voxel);
      }
    }
  }
}

// Whether input positions lie in the volume, for the output voxel (z, y, x) of a block and all taps of an axis.
struct Inside {
  Inside(const Window& w, const Place& place, int64_t row, int64_t z, int64_t y, int64_t x) {
    const int64_t local[3] = {z, y, x};
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t o = place.target_index[row * 4 + axis + 1] * w.written_block[axis] + local[axis];
      const int64_t start = o * w.stride[axis] - w.padding[axis];
      first[axis] = std::max<int64_t>(0, -start);
      last[axis] = std::min(w.kernel[axis], place.shape[axis] - start);
    }
  }
  int64_t count() const {
    int64_t product = 1;
    for (int axis = 0; axis < 3; ++axis) product *= std::max<int64_t>(0, last[axis] - first[axis]);
    return product;
  }
  bool has(const Window& w, int64_t tap) const {
    const int64_t t[3] = {tap / w.kernel.w / w.kernel.h, tap / w.kernel.w % w.kernel.h, tap % w.kernel.w};
    for (int axis = 0; axis < 3; ++axis) {
      if (t[axis] < first[axis] || t[axis] >= last[axis]) return false;
    }
    return true;
  }
  int64_t first[3], last[3];
};

template <typename Each>
inline void for_each_voxel(const Window& w, int threads, const Each& each) {
  const Triple block = w.written_block;
  const int64_t planes = w.written_rows * block.d;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4)
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t row = plane / block.d, z = plane % block.d;
    for (int64_t y = 0; y < block.h; ++y) {
      for (int64_t x = 0; x < block.w; ++x) {
        const int64_t voxel = (plane * block.h + y) * block.w + x;
        each(row, z, y, x, voxel, w.written_voxels == nullptr || w.written_voxels[voxel]);
      }
    }
  }
}

// What the average divides by; divisor 0: the voxels of the window that lie in the volume.
template <typename T>
inline T share(const Window& w, const Place& place, int64_t divisor, int64_t row, int64_t z, int64_t y, int64_t x) {
  const int64_t count = divisor > 0 ? divisor : std::max<int64_t>(1, Inside(w, place, row, z, y, x).count());
  return T(1) / static_cast<T>(count);
}

template <typename T>
void average(const Window& w, const Place& place, const T* in, T* out, int64_t channels, int64_t divisor, int threads) {
  const Locator locator(w);
  for_each_voxel(w, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel, bool visible) {
    T* to = out + voxel * channels;
    std::fill_n(to, channels, T(0));
    if (!visible) return;
    for_each_tap(w, locator, row, z, y, x, [&](int64_t, int64_t other) {
      if (other < 0) return;
      const T* from = in + other * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] += from[c];
    });
    const T factor = share<T>(w, place, divisor, row, z, y, x);
    for (int64_t c = 0; c < channels; ++c) to[c] *= factor;
  });
}

// `transposed` writes inputs and gathers outputs; `factors` [outputs] is what each output's average was multiplied by.
template <typename T>
void average_grad(const Window& transposed, const T* factors, const T* grad, T* grad_in, int64_t channels, int threads) {
  const Locator locator(transposed);
  for_each_voxel(transposed, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel, bool visible) {
    T* to = grad_in + voxel * channels;
    std::fill_n(to, channels, T(0));
    if (!visible) return;
    for_each_tap(transposed, locator, row, z, y, x, [&](int64_t, int64_t other) {
      if (other < 0) return;
      const T* from = grad + other * channels;
      const T factor = factors[other];
      for (int64_t c = 0; c < channels; ++c) to[c] += from[c] * factor;
    });
  });
}

template <typename T>
std::vector<T> average_factors(const Window& w, const Place& place, int64_t divisor, int threads) {
  std::vector<T> factors(w.written_rows * w.written_block.volume());
  for_each_voxel(w, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel, bool) {
    factors[voxel] = share<T>(w, place, divisor, row, z, y, x);
  });
  return factors;
}

// The tap at which each maximum lies; the first of equal ones, as in torch, and -1 for a masked voxel's zero.
template <typename T>
void maximum(const Window& w, const Place& place, const T* in, T* out, int32_t* winners, int64_t channels, int threads) {
  const Locator locator(w);
  for_each_voxel(w, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel, bool visible) {
    T* to = out + voxel * channels;
    int32_t* winner = winners == nullptr ? nullptr : winners + voxel * channels;
    std::fill_n(to, channels, visible ? -std::numeric_limits<T>::infinity() : T(0));
    if (winner != nullptr) std::fill_n(winner, channels, -1);
    if (!visible) return;
    const Inside inside(w, place, row, z, y, x);
    bool first = true;
    for_each_tap(w, locator, row, z, y, x, [&](int64_t tap, int64_t other) {
      if (!inside.has(w, tap)) return;
      for (int64_t c = 0; c < channels; ++c) {
        const T value = other < 0 ? T(0) : in[other * channels + c];
        if (first || value > to[c] || value != value) {
          to[c] = value;
          if (winner != nullptr) winner[c] = other < 0 ? -1 : static_cast<int32_t>(tap);
        }
      }
      first = false;
    });
  });
}

template <typename T>
void maximum_grad(const Window& transposed, const int32_t* winners, const T* grad, T* grad_in, int64_t channels,
                  int threads) {
  const Locator locator(transposed);
  for_each_voxel(transposed, threads, [&](int64_t row, int64_t z, int64_t y, int64_t x, int64_t voxel, bool visible) {
    T* to = grad_in + voxel * channels;
    std::fill_n(to, channels, T(0));
    if (!visible) return;
    for_each_tap(transposed, locator, row, z, y, x, [&](int64_t tap, int64_t other) {
      if (other < 0) return;
      for (int64_t c = 0; c < channels; ++c) {
        if (winners[other * channels + c] == tap) to[c] += grad[other * channels + c];
      }
    });
  });
}

}  // namespace s3d::cpu
