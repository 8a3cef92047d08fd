// Which input voxels the windows of a convolution or pooling read, block by block.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace s3d {

struct Triple {
  int64_t d, h, w;
  int64_t operator[](int axis) const { return axis == 0 ? d : axis == 1 ? h : w; }
  int64_t volume() const { return d * h * w; }
};

inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }

// Output voxel o reads the inputs o * stride - padding + tap. `gathered` voxels are read, `written` ones computed: the
// forward direction writes outputs and gathers inputs, the transposed one (gradient of the input) the reverse.
struct Window {
  int64_t written_rows, gathered_rows;
  Triple written_block, gathered_block;
  Triple kernel, stride, padding, radius;
  bool transposed;
  const int32_t* table;            // [written_rows, prod(2 * radius + 1)] rows of gathered blocks, -1: none
  const uint8_t* written_voxels;   // [written_rows, written_block] or null: all visible
  const uint8_t* gathered_voxels;  // [gathered_rows, gathered_block] or null
  int64_t columns() const { return (2 * radius.d + 1) * (2 * radius.h + 1) * (2 * radius.w + 1); }
  int64_t taps() const { return kernel.volume(); }
};

// Where one written coordinate of one axis finds its input under one tap.
struct Source {
  int32_t block;  // 0 ... 2 * radius: which neighbour; -1: no input (between the steps of a stride)
  int32_t local;  // coordinate in that block
};

// A run of written coordinates along the last axis whose inputs lie in one neighbour, one gathered voxel apart from each
// other for every `step` written ones (forward: `stride` gathered voxels for every written one).
struct Run {
  int32_t first, step, count;    // written coordinates first, first + step, ...
  int32_t block;                 // which neighbour
  int32_t local, local_step;     // gathered coordinates
};

// The sources of a window along each axis, made once per call.
class Locator {
 public:
  explicit Locator(const Window& window) {
    for (int axis = 0; axis < 3; ++axis) {
      for (int64_t tap = 0; tap < window.kernel[axis]; ++tap) {
        for (int64_t i = 0; i < window.written_block[axis]; ++i) sources_[axis].push_back(locate(window, axis, i, tap));
      }
      sides_[axis] = window.written_block[axis];
    }
    for (int64_t tap = 0; tap < window.kernel.w; ++tap) runs_.push_back(runs(window, tap));
  }

  Source at(int axis, int64_t tap, int64_t i) const { return sources_[axis][tap * sides_[axis] + i]; }
  const std::vector<Run>& along_width(int64_t tap) const { return runs_[tap]; }

 private:
  static Source locate(const Window& window, int axis, int64_t i, int64_t tap) {
    const int64_t stride = window.stride[axis], side = window.gathered_block[axis];
    int64_t position = i * stride - window.padding[axis] + tap;
    if (window.transposed) {
      const int64_t scaled = i + window.padding[axis] - tap;
      position = floor_divide(scaled, stride);
      if (position * stride != scaled) return {-1, 0};
    }
    const int64_t block = floor_divide(position, side), reach = window.radius[axis];
    if (block < -reach || block > reach) throw std::invalid_argument("the table does not reach all windows");
    return {static_cast<int32_t>(block + reach), static_cast<int32_t>(position - block * side)};
  }

  std::vector<Run> runs(const Window& window, int64_t tap) const {
    const int32_t step = window.transposed ? static_cast<int32_t>(window.stride.w) : 1;
    const int32_t local_step = window.transposed ? 1 : static_cast<int32_t>(window.stride.w);
    std::vector<Run> result;
    for (int32_t i = 0; i < window.written_block.w; ++i) {
      const Source source = at(2, tap, i);
      if (source.block < 0) continue;
      if (!result.empty()) {
        Run& last = result.back();
        const bool follows = i == last.first + last.step * last.count && source.block == last.block &&
                             source.local == last.local + last.local_step * last.count;
        if (follows) {
          ++last.count;
          continue;
        }
      }
      result.push_back({i, step, 1, source.block, source.local, local_step});
    }
    return result;
  }

  std::vector<Source> sources_[3];  // [tap, written coordinate]
  int64_t sides_[3];
  std::vector<std::vector<Run>> runs_;
};

// The table of the opposite direction: row i of `table` holds the neighbours of written block i; in the result, row g
// holds the written blocks around gathered block g.
inline std::vector<int32_t> reverse_table(const int32_t* table, int64_t rows, int64_t columns, int64_t reverse_rows) {
  std::vector<int32_t> reverse(reverse_rows * columns, -1);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int32_t other = table[row * columns + column];
      if (other >= 0) reverse[other * columns + columns - 1 - column] = static_cast<int32_t>(row);
    }
  }
  return reverse;
}

}  // namespace s3d
