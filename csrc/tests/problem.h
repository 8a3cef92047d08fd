// Random problems for tests of kernels: which blocks and voxels are visible, tables, windows, and their pairs, listed
// from dense coordinates without the code that is tested.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "s3d/window.h"

namespace s3d::test {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t end) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end)); }
  bool chance(double p) { return static_cast<double>(engine_() >> 11) * 0x1p-53 < p; }
  // In [-1, 1); exact in float, so that one reference serves both types.
  double value() { return static_cast<double>(static_cast<float>(static_cast<double>(engine_() >> 40) * 0x1p-23 - 1)); }
  std::vector<double> values(int64_t size) {
    std::vector<double> result(size);
    for (double& v : result) v = value();
    return result;
  }
  // Few different values whose products are exact in float.
  std::vector<double> coarse(int64_t size) {
    std::vector<double> result(size);
    for (double& v : result) v = static_cast<double>(below(17) - 8) / 4;
    return result;
  }

 private:
  std::mt19937_64 engine_;
};

// ---- blocks

inline std::string text(const Triple& t) {
  return std::to_string(t.d) + "x" + std::to_string(t.h) + "x" + std::to_string(t.w);
}

inline Triple times(const Triple& a, const Triple& b) { return {a.d * b.d, a.h * b.h, a.w * b.w}; }

// Which cells of a grid are stored as blocks.
struct Layout {
  Layout(int64_t batch, const Triple& grid, const std::vector<double>& share, Random& random)
      : batch(batch), grid(grid), row(batch * grid.volume(), -1), offsets(1, 0) {
    for (int64_t n = 0; n < batch; ++n) {
      for (int64_t cell = 0; cell < grid.volume(); ++cell) {
        if (!random.chance(share[n])) continue;
        row[n * grid.volume() + cell] = static_cast<int32_t>(rows++);
        const int64_t at[4] = {n, cell / grid.w / grid.h, cell / grid.w % grid.h, cell % grid.w};
        for (int64_t i : at) index.push_back(static_cast<int32_t>(i));
      }
      offsets.push_back(static_cast<int32_t>(rows));
    }
    index.shrink_to_fit();
    offsets.shrink_to_fit();
  }
  int32_t at(int64_t n, int64_t z, int64_t y, int64_t x) const {
    if (z < 0 || z >= grid.d || y < 0 || y >= grid.h || x < 0 || x >= grid.w) return -1;
    return row[((n * grid.d + z) * grid.h + y) * grid.w + x];
  }
  int64_t batch, rows = 0;
  Triple grid;
  std::vector<int32_t> row;    // [batch, grid]
  std::vector<int32_t> index;  // [rows, 4]
  std::vector<int32_t> offsets;
};

// Blocks of voxels with a mask.
struct Side {
  Side(Layout layout_, const Triple& block, double share, Random& random) : layout(std::move(layout_)), block(block) {
    if (share >= 1) return;
    mask.resize(size());
    for (uint8_t& m : mask) m = random.chance(share);
    mask.shrink_to_fit();
  }
  int64_t size() const { return layout.rows * block.volume(); }
  // A mask without elements also is a mask, and null where all are visible.
  const uint8_t* voxels() const { return mask.empty() ? nullptr : mask.data(); }
  bool visible(int64_t voxel) const { return mask.empty() || mask[voxel] != 0; }
  // The voxel at dense coordinates, -1: masked or not stored.
  int64_t at(int64_t n, int64_t z, int64_t y, int64_t x) const {
    const Triple shape = times(layout.grid, block);
    if (z < 0 || z >= shape.d || y < 0 || y >= shape.h || x < 0 || x >= shape.w) return -1;
    const int64_t row = layout.at(n, z / block.d, y / block.h, x / block.w);
    if (row < 0) return -1;
    const int64_t voxel = ((row * block.d + z % block.d) * block.h + y % block.h) * block.w + x % block.w;
    return visible(voxel) ? voxel : -1;
  }
  // Nothing beyond this shape is visible.
  void cut(const Triple& shape) {
    if (mask.empty()) mask.assign(size(), 1);
    mask.shrink_to_fit();
    for (int64_t v = 0; v < size(); ++v) {
      const int32_t* at = layout.index.data() + v / block.volume() * 4;
      const int64_t local[3] = {v / block.w / block.h % block.d, v / block.w % block.h, v % block.w};
      for (int axis = 0; axis < 3; ++axis) mask[v] &= at[axis + 1] * block[axis] + local[axis] < shape[axis];
    }
  }
  // Features, NaN where masked.
  std::vector<double> features(std::vector<double> drawn, int64_t channels) const {
    for (int64_t v = 0; v < size(); ++v) {
      if (!visible(v)) std::fill_n(drawn.begin() + v * channels, channels, kNaN);
    }
    return drawn;
  }
  Layout layout;
  Triple block;
  std::vector<uint8_t> mask;
};

// See neighbour_table in s3d_kernels/block_mask.py.
inline std::vector<int32_t> neighbour_table(const Layout& around, const Layout& of, const Triple& radius) {
  const int64_t columns = (2 * radius.d + 1) * (2 * radius.h + 1) * (2 * radius.w + 1);
  std::vector<int32_t> table(around.rows * columns);
  for (int64_t row = 0; row < around.rows; ++row) {
    const int32_t* at = around.index.data() + row * 4;
    int64_t column = 0;
    for (int64_t dz = -radius.d; dz <= radius.d; ++dz) {
      for (int64_t dy = -radius.h; dy <= radius.h; ++dy) {
        for (int64_t dx = -radius.w; dx <= radius.w; ++dx) {
          table[row * columns + column++] = of.at(at[0], at[1] + dz, at[2] + dy, at[3] + dx);
        }
      }
    }
  }
  return table;
}

// ---- windows

struct Shape {
  int64_t batch;
  Triple grid, block;  // block: of the source
  Triple kernel, stride, padding;
};

struct Pair {
  int64_t target, source, tap;
};

// How many blocks away windows reach along an axis, in both directions.
inline int64_t reach(int64_t source_side, int64_t target_side, int64_t kernel, int64_t stride, int64_t padding) {
  const auto cells = [](int64_t distance, int64_t side) { return (std::max<int64_t>(distance, 0) + side - 1) / side; };
  const int64_t beyond = (target_side - 1) * stride - padding + kernel - source_side;
  return std::max(cells(padding, source_side), cells(beyond, source_side));
}

struct Problem {
  Problem(const Shape& s, const std::vector<double>& source_share, const std::vector<double>& target_share,
          bool same_blocks, double source_voxels, double target_voxels, int64_t extra_radius, Random& random)
      : shape(s),
        source(Layout(s.batch, s.grid, source_share, random), s.block, source_voxels, random),
        target(same_blocks ? source.layout : Layout(s.batch, s.grid, target_share, random),
               {s.block.d / s.stride.d, s.block.h / s.stride.h, s.block.w / s.stride.w}, target_voxels, random) {
    int64_t radius[3];
    for (int axis = 0; axis < 3; ++axis) {
      radius[axis] = extra_radius +
                     reach(source.block[axis], target.block[axis], s.kernel[axis], s.stride[axis], s.padding[axis]);
    }
    const Triple r = {radius[0], radius[1], radius[2]};
    table = neighbour_table(target.layout, source.layout, r);
    forward = {target.layout.rows, source.layout.rows, target.block, source.block, s.kernel, s.stride, s.padding, r,
               false, table.data(), target.voxels(), source.voxels()};
    reversed = s3d::reverse_table(table.data(), target.layout.rows, forward.columns(), source.layout.rows);
    transposed = {source.layout.rows, target.layout.rows, source.block, target.block, s.kernel, s.stride, s.padding, r,
                  true, reversed.data(), source.voxels(), target.voxels()};
    name = "batch " + std::to_string(s.batch) + " grid " + text(s.grid) + " block " + text(s.block) + " kernel " +
           text(s.kernel) + " stride " + text(s.stride) + " padding " + text(s.padding) + " radius " + text(r) +
           " source " + std::to_string(source.layout.rows) + (source.voxels() ? " masked" : "") + " target " +
           std::to_string(target.layout.rows) + (target.voxels() ? " masked" : "");
    list_pairs();
  }
  Problem(const Problem&) = delete;

  // calls use(target voxel, tap, n, z, y, x) with the dense input coordinates of every visible target voxel and tap.
  template <typename Use>
  void each_tap(const Use& use) const {
    const Triple &k = shape.kernel, &s = shape.stride, &p = shape.padding, &b = target.block;
    const Triple size = times(target.layout.grid, b);
    for (int64_t n = 0; n < shape.batch; ++n) {
      for (int64_t z = 0; z < size.d; ++z) {
        for (int64_t y = 0; y < size.h; ++y) {
          for (int64_t x = 0; x < size.w; ++x) {
            const int64_t voxel = target.at(n, z, y, x);
            if (voxel < 0) continue;
            for (int64_t tap = 0; tap < k.volume(); ++tap) {
              use(voxel, tap, n, z * s.d - p.d + tap / k.w / k.h, y * s.h - p.h + tap / k.w % k.h,
                  x * s.w - p.w + tap % k.w);
            }
          }
        }
      }
    }
  }

  void list_pairs() {
    each_tap([&](int64_t voxel, int64_t tap, int64_t n, int64_t z, int64_t y, int64_t x) {
      const int64_t other = source.at(n, z, y, x);
      if (other >= 0) pairs.push_back({voxel, other, tap});
    });
  }

  Shape shape;
  Side source, target;
  std::vector<int32_t> table, reversed;
  Window forward, transposed;
  std::vector<Pair> pairs;
  std::string name;
};

struct Channels {
  int64_t in, out, groups;
};

}  // namespace s3d::test
