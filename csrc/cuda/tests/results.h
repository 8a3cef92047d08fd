// How results of kernels are compared with sums in double.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "emulator/tests/check.h"

namespace s3d::cuda::test {

using emulator::test::DeviceBuffer;

constexpr uint64_t kSeeds = 2;  // orders of blocks and warps; all must give the same bits

// A result and the sum of the magnitudes that were added up, which bounds its rounding.
struct Expected {
  explicit Expected(int64_t size) : value(size), magnitude(size) {}
  void add(int64_t i, double term) {
    value[i] += term;
    magnitude[i] += std::abs(term);
  }
  std::vector<double> value, magnitude;
};

struct Tolerance {
  double l2;       // relative, of all
  double element;  // of each one's magnitude
};

template <typename T>
constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<bf16> = true;

template <typename T>
Tolerance tolerance(Math math) {
  if (sizeof(T) == 2) return {kIsBf16<T> ? 1e-2 : 1e-3, kIsBf16<T> ? 0x1p-8 : 0x1p-10};
  return math == Math::kExact ? Tolerance{1e-5, 0x1p-20} : Tolerance{1e-3, 0x1p-10};
}

template <typename T>
const char* name_of(Math math) {
  if (sizeof(T) == 2) return kIsBf16<T> ? "bfloat16" : "float16";
  return math == Math::kExact ? "float32" : "TF32";
}

// Numbers on the device, and as a kernel reads them.
template <typename T>
struct Operand {
  explicit Operand(const std::vector<double>& values, const char* name = "operand") : device(values.size(), name) {
    for (size_t i = 0; i < values.size(); ++i) {
      device[i] = from_float<T>(static_cast<float>(values[i]));
      read.push_back(to_float(device[i]));
    }
  }
  DeviceBuffer<T> device;
  std::vector<double> read;
};

// A window's tables as a kernel may read them.
struct WindowBuffers {
  explicit WindowBuffers(const Window& window)
      : table(window.table, window.written_rows * window.columns() * 4, "table"),
        written(window.written_voxels, window.written_rows * window.written_block.volume(), "written voxels"),
        gathered(window.gathered_voxels, window.gathered_rows * window.gathered_block.volume(), "gathered voxels") {}
  emulator::RegisteredBuffer table, written, gathered;
};

// Calls call(result) with each seed; the result starts as NaNs.
template <typename T, typename Call>
void check_result(const std::string& what, const Expected& expected, const Tolerance& allowed, const Call& call) {
  std::vector<T> first;
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator::set_options({seed, true});
    DeviceBuffer<T> result(expected.value.size(), "result");
    for (size_t i = 0; i < result.size(); ++i) result[i] = from_float<T>(std::nanf(""));
    call(result.data());
    if (seed > 0) {
      if (result.size() > 0 && std::memcmp(first.data(), result.data(), result.size() * sizeof(T)) != 0) {
        std::printf("%s: other bits with seed %d\n", what.c_str(), static_cast<int>(seed));
        std::exit(1);
      }
      continue;
    }
    first.assign(result.data(), result.data() + result.size());
    double error = 0, norm = 0;
    for (size_t i = 0; i < result.size(); ++i) {
      const double is = to_float(result[i]), wanted = expected.value[i], off = std::abs(is - wanted);
      // Results of 16 bits below the normal numbers are rounded to a fixed step.
      if (!(off <= allowed.element * expected.magnitude[i] + (sizeof(T) == 2 ? 0x1p-24 : 0))) {
        std::printf("%s: element %zu is %.9g, not %.9g\n", what.c_str(), i, is, wanted);
        std::exit(1);
      }
      error += off * off;
      norm += wanted * wanted;
    }
    if (!(error <= allowed.l2 * allowed.l2 * norm)) {
      std::printf("%s: relative error %.3g\n", what.c_str(), std::sqrt(error / norm));
      std::exit(1);
    }
  }
  emulator::set_options({});
}

void test_conv3d();
void test_conv3d_halo();
void test_conv3d_stem();
void test_conv3d_depthwise();
void count();

void test_conv3d_fused();
void test_norm();
void test_table();
void test_pool();
void test_blocks();

}  // namespace s3d::cuda::test
