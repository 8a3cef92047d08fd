// What conv3d_halo does besides: the affine function of its inputs, which leaves masked voxels zero, and the moments of
// its outputs, sample by sample.
#include <algorithm>

#include "cuda/tests/results.h"
#include "tests/problem.h"

namespace s3d::cuda::test {
namespace {

using s3d::test::Channels;
using s3d::test::kNaN;
using s3d::test::Pair;
using s3d::test::Problem;
using s3d::test::Random;
using s3d::test::Shape;

struct Case {
  Shape shape;
  Channels channels;
  std::vector<double> share;  // of the blocks of each sample
};

constexpr Triple kOne = {1, 1, 1}, kThree = {3, 3, 3}, kFour = {4, 4, 4};

const Case kCases[] = {
    {{2, {1, 1, 2}, {4, 8, 8}, kThree, kOne, kOne}, {40, 24, 1}, {0.6, 0.6}},
    {{4, {1, 3, 2}, kFour, kThree, kOne, kOne}, {8, 40, 1}, {0.6, 0, 0.2, 0.9}},
    {{3, {1, 1, 2}, {4, 8, 8}, {1, 3, 3}, kOne, {0, 1, 1}}, {80, 8, 2}, {0, 0.7, 0}},
    {{2, {1, 2, 1}, {4, 4, 8}, kThree, kOne, kOne}, {3, 5, 1}, {0.8, 0.5}},
};

template <typename T>
struct Normalised {
  Normalised(int64_t samples, int64_t channels, Random& random)
      : mean(random.values(samples * channels), "mean"),
        scale(random.values(samples * channels), "scale"),
        shift(random.values(samples * channels), "shift") {}
  double operator()(double x, int64_t at) const {
    const double value = (x - mean.read[at]) * scale.read[at] + shift.read[at];
    return to_float(from_float<T>(static_cast<float>(value < 0 ? value * kSlope : value)));
  }
  static constexpr double kSlope = 0.25;
  Operand<float> mean, scale, shift;
};

// Mean and squared deviations of `values` against what the kernels found, given the error of each value.
void check_moments(const std::string& what, const std::vector<double>& values, double error, double mean,
                   double squares) {
  const auto count = static_cast<double>(values.size());
  double wanted_mean = 0, wanted = 0;
  for (double v : values) wanted_mean += v / count;
  for (double v : values) wanted += (v - wanted_mean) * (v - wanted_mean);
  const double allowed = 2 * std::sqrt(wanted * count) * error + count * error * error + 1e-5 * wanted;
  if (std::abs(mean - wanted_mean) <= error && std::abs(squares - wanted) <= allowed) return;
  std::printf("%s: mean %.9g, not %.9g; squares %.9g, not %.9g\n", what.c_str(), mean, wanted_mean, squares, wanted);
  std::exit(1);
}

template <typename T>
void check_problem(const Problem& p, const Channels& c, Math math, uint64_t seed, bool affine, double offset) {
  Random random(seed);
  const int64_t in_group = c.in / c.groups, out_group = c.out / c.groups, taps = p.shape.kernel.volume();
  const int64_t samples = p.shape.batch;
  Operand<T> x(p.source.features(random.values(p.source.size() * c.in), c.in), "x");
  Operand<T> weight(random.values(c.out * in_group * taps), "weight");
  Operand<T> bias(random.values(c.out), "bias");
  for (int64_t i = 0; i < c.out; ++i) {
    bias.read[i] += offset;
    bias.device[i] = from_float<T>(static_cast<float>(bias.read[i]));
    bias.read[i] = to_float(bias.device[i]);
  }
  const Normalised<T> normalised(samples, c.in, random);

  const auto sample_of = [&](int64_t target) {
    return p.target.layout.index[target / p.target.block.volume() * 4];
  };
  Expected y(p.target.size() * c.out);
  for (int64_t i = 0; i < p.target.size() * c.out; ++i) {
    if (p.target.visible(i / c.out)) y.add(i, bias.read[i % c.out]);
  }
  for (const Pair& pair : p.pairs) {
    const int64_t sample = sample_of(pair.target);
    for (int64_t o = 0; o < c.out; ++o) {
      for (int64_t i = 0; i < in_group; ++i) {
        const int64_t channel = o / out_group * in_group + i;
        const double read = x.read[pair.source * c.in + channel];
        const double value = affine ? normalised(read, sample * c.in + channel) : read;
        y.add(pair.target * c.out + o, weight.read[(o * in_group + i) * taps + pair.tap] * value);
      }
    }
  }

  const Window& window = p.forward;
  const ConvChannels channels = {static_cast<int>(c.in), static_cast<int>(c.out), static_cast<int>(c.groups)};
  const emulator::RegisteredBuffer table(window.table, window.written_rows * window.columns() * 4, "table");
  const emulator::RegisteredBuffer written_voxels(window.written_voxels, p.target.mask.size(), "written voxels");
  const emulator::RegisteredBuffer gathered_voxels(window.gathered_voxels, p.source.mask.size(), "gathered voxels");
  const emulator::RegisteredBuffer offsets(p.target.layout.offsets.data(), (samples + 1) * 4, "sample offsets");
  DeviceBuffer<T> packed(conv3d_packed_elements<T>(window, channels), "packed weight");
  conv3d_pack_weight<T>(window, channels, math, weight.device.data(), packed.data(), nullptr);
  const std::string name = std::string("fused ") + (affine ? "affine " : "") + p.name + " channels " +
                           std::to_string(c.in) + " to " + std::to_string(c.out) + " groups " +
                           std::to_string(c.groups) + " offset " + std::to_string(offset) + " " + name_of<T>(math);
  DeviceBuffer<float> partials(conv3d_halo_partials(window, channels, static_cast<int>(samples)), "partials");
  DeviceBuffer<float> mean(samples * c.out, "means"), squares(samples * c.out, "squares");
  ConvFusion fusion;
  fusion.samples = static_cast<int>(samples);
  fusion.sample_offsets = p.target.layout.offsets.data();
  if (affine) {
    fusion.mean = const_cast<Operand<float>&>(normalised.mean).device.data();
    fusion.scale = const_cast<Operand<float>&>(normalised.scale).device.data();
    fusion.shift = const_cast<Operand<float>&>(normalised.shift).device.data();
    fusion.slope = Normalised<T>::kSlope;
  }
  fusion.partials = partials.data();
  std::vector<float> first;
  emulator::take_launches();
  check_result<T>(name, y, tolerance<T>(math), [&](T* written) {
    for (size_t i = 0; i < partials.size(); ++i) partials[i] = std::nanf("");
    conv3d_halo<T>(window, channels, math, x.device.data(), packed.data(), bias.device.data(), written, nullptr,
                   fusion);
    conv3d_halo_moments(window, channels, fusion, mean.data(), squares.data(), nullptr);
    std::vector<float> results(mean.data(), mean.data() + mean.size());
    results.insert(results.end(), squares.data(), squares.data() + squares.size());
    if (first.empty()) first = results;
    CHECK(std::memcmp(first.data(), results.data(), first.size() * sizeof(float)) == 0);
  });
  for (const emulator::LaunchRecord& launch : emulator::take_launches()) {
    const bool whole = in_group % 8 == 0 && out_group % 8 == 0;
    CHECK_EQUAL(whole ? launch.counters.shared_read_conflicts : 0, 0);
    CHECK_EQUAL(whole ? launch.counters.shared_write_conflicts : 0, 0);
  }

  // Inputs of 16 bits have exact products.
  const double rounding = sizeof(T) == 2 ? 0x1p-18 : math == Math::kExact ? 0x1p-20 : 0x1p-10;
  for (int64_t sample = 0; sample < samples; ++sample) {
    for (int64_t o = 0; o < c.out; ++o) {
      std::vector<double> values;
      double magnitude = 0;
      for (int64_t v = 0; v < p.target.size(); ++v) {
        if (sample_of(v) != sample || !p.target.visible(v)) continue;
        values.push_back(y.value[v * c.out + o]);
        magnitude = std::max(magnitude, y.magnitude[v * c.out + o]);
      }
      const int64_t at = sample * c.out + o;
      check_moments(name + " sample " + std::to_string(sample) + " channel " + std::to_string(o), values,
                    rounding * magnitude, mean[at], squares[at]);
    }
  }
}

}  // namespace

void test_conv3d_fused() {
  uint64_t seed = 100;
  for (const Case& c : kCases) {
    for (const double visible : {1.0, 0.6}) {
      Random random(++seed);
      const Problem p(c.shape, c.share, c.share, visible == 1.0, visible, visible, 0, random);
      check_problem<bf16>(p, c.channels, Math::kTensorCores, seed, true, 0);
      const double far = seed % 2 == 0 ? 100 : 0;
      if (seed % 3 == 0) check_problem<fp16>(p, c.channels, Math::kTensorCores, seed, false, far);
      if (seed % 3 == 1) check_problem<float>(p, c.channels, Math::kTensorCores, seed, true, far);
      if (seed % 3 == 2) check_problem<float>(p, c.channels, Math::kExact, seed, true, far);
    }
  }
}

}  // namespace s3d::cuda::test
