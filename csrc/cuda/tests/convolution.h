// A convolution with random operands, its results and gradients in double, and what its kernels may read.
#pragma once

#include <string>
#include <vector>

#include "cuda/tests/results.h"
#include "tests/problem.h"

namespace s3d::cuda::test {

using s3d::test::Channels;
using s3d::test::Pair;
using s3d::test::Problem;
using s3d::test::Random;
using s3d::test::Shape;
using s3d::test::Side;

template <typename T>
struct Convolution {
  Convolution(const Problem& p, const Channels& c, Math math, bool with_bias, Random& random)
      : channels{static_cast<int>(c.in), static_cast<int>(c.out), static_cast<int>(c.groups)},
        x(p.source.features(random.values(p.source.size() * c.in), c.in), "x"),
        grad(p.target.features(random.values(p.target.size() * c.out), c.out), "grad"),
        weight(random.values(c.out * (c.in / c.groups) * p.shape.kernel.volume()), "weight"),
        out_bias(with_bias ? random.values(c.out) : std::vector<double>(), "bias"),
        in_bias(with_bias ? random.values(c.in) : std::vector<double>(), "bias"),
        y(p.target.size() * c.out),
        grad_x(p.source.size() * c.in),
        grad_weight(static_cast<int64_t>(weight.read.size())),
        forward(p.forward),
        transposed(p.transposed) {
    const int64_t in_group = c.in / c.groups, out_group = c.out / c.groups, taps = p.shape.kernel.volume();
    useful_flops = 2 * static_cast<int64_t>(p.pairs.size()) * c.in * out_group;
    add_bias(p.target, out_bias.read, y);
    add_bias(p.source, in_bias.read, grad_x);
    for (const Pair& pair : p.pairs) {
      for (int64_t o = 0; o < c.out; ++o) {
        for (int64_t i = 0; i < in_group; ++i) {
          const int64_t at_y = pair.target * c.out + o, at_x = pair.source * c.in + o / out_group * in_group + i;
          const int64_t at_w = (o * in_group + i) * taps + pair.tap;
          y.add(at_y, weight.read[at_w] * x.read[at_x]);
          grad_x.add(at_x, weight.read[at_w] * grad.read[at_y]);
          grad_weight.add(at_w, grad.read[at_y] * x.read[at_x]);
        }
      }
    }
    name = p.name + " channels " + std::to_string(c.in) + " to " + std::to_string(c.out) + " groups " +
           std::to_string(c.groups) + (with_bias ? " bias " : " ") + name_of<T>(math);
  }

  static void add_bias(const Side& side, const std::vector<double>& bias, Expected& to) {
    const auto channels = static_cast<int64_t>(bias.size());
    for (int64_t i = 0; i < static_cast<int64_t>(to.value.size()) && channels > 0; ++i) {
      if (side.visible(i / channels)) to.add(i, bias[i % channels]);
    }
  }

  ConvChannels channels;
  Operand<T> x, grad, weight, out_bias, in_bias;
  Expected y, grad_x, grad_weight;
  WindowBuffers forward, transposed;
  int64_t useful_flops;  // of each of the three
  std::string name;
};

// Of a bias, or null if there is none.
template <typename T>
T* data_or_null(Operand<T>& operand) {
  return operand.device.size() == 0 ? nullptr : operand.device.data();
}

// Sums to work with, that start as NaNs.
struct PartialSums : DeviceBuffer<float> {
  explicit PartialSums(int64_t count) : DeviceBuffer<float>(count, "partial sums") {
    for (size_t i = 0; i < size(); ++i) (*this)[i] = std::nanf("");
  }
};

// Of the launches of `kernel` since the last call: their useful FLOPs, and whether they have bank conflicts. Returns
// how many there are.
inline int check_launches(const std::string& kernel, int64_t useful_flops, bool may_conflict) {
  int count = 0;
  for (const emulator::LaunchRecord& launch : emulator::take_launches()) {
    if (launch.kernel != kernel) continue;
    ++count;
    CHECK_EQUAL(launch.counters.useful_flops, useful_flops);
    if (may_conflict) continue;
    CHECK_EQUAL(launch.counters.shared_read_conflicts, 0);
    CHECK_EQUAL(launch.counters.shared_write_conflicts, 0);
  }
  return count;
}

}  // namespace s3d::cuda::test
