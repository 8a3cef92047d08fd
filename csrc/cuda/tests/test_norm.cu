// Norms: statistics, the elementwise pass, backward, and the gradient of a bias.
#include <limits>

#include "cuda/tests/results.h"
#include "tests/problem.h"

namespace s3d::cuda::test {
namespace {

using s3d::test::Layout;
using s3d::test::Random;
using s3d::test::Side;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What lies at masked voxels: NaNs and infinities.
std::vector<double> hidden(const Side& side, std::vector<double> values, int channels) {
  values = side.features(std::move(values), channels);
  for (int64_t v = 0; v < side.size(); v += 3) {
    if (side.visible(v)) continue;
    for (int c = 0; c < channels; ++c) values[v * channels + c] = c % 2 == 0 ? kInfinity : -kInfinity;
  }
  return values;
}

// Of [voxels, channels] and of tables: what is computed in double from what the kernels read.
template <typename T>
void check_norm(const Side& side, int channels, double offset_of_x, uint64_t seed) {
  Random random(seed);
  const int64_t size = side.size() * channels, samples = side.layout.batch, tables = samples * channels;
  std::vector<double> drawn = random.values(size);
  for (double& value : drawn) value = value * 0.25 + offset_of_x;
  Operand<T> x(hidden(side, drawn, channels)), grad(hidden(side, random.values(size), channels));
  Operand<T> residual(hidden(side, random.values(size), channels));
  Operand<T> y(hidden(side, random.values(size), channels));
  std::vector<double> drawn_mean = random.values(tables);
  for (double& value : drawn_mean) value += offset_of_x;
  Operand<float> mean(drawn_mean), rstd(random.values(tables)), scale(random.values(tables));
  Operand<float> shift(random.values(tables)), offset(random.values(tables)), tilt(random.values(tables));
  const emulator::RegisteredBuffer offsets(side.layout.offsets.data(), side.layout.offsets.size() * 4, "offsets");
  const emulator::RegisteredBuffer voxels(side.voxels(), side.mask.size(), "voxels");
  const SampleRows rows = {static_cast<int>(samples), side.layout.offsets.data(), side.layout.rows,
                           side.block.volume(), side.voxels()};
  const auto each = [&](const auto& use) {
    for (int64_t i = 0; i < size; ++i) {
      if (!side.visible(i / channels)) continue;
      const int64_t n = side.layout.index[i / channels / side.block.volume() * 4];
      use(i, n * channels + i % channels);
    }
  };
  const std::string name = std::string(" ") + name_of<T>(Math::kExact) + " channels " + std::to_string(channels) +
                           " rows " + std::to_string(side.layout.rows) + (side.voxels() ? " masked" : "");
  const Tolerance in_float = {1e-5, 0x1p-19}, rounded = sizeof(T) == 2 ? tolerance<T>(Math::kExact) : in_float;
  // Calls call(partial sums, result, more...) and tells whether it took this many launches.
  const auto with_partial = [&](size_t launches, const auto& call) {
    return [&, launches, call](auto* result) {
      DeviceBuffer<float> partial(norm_partial_sums(rows, channels), "partial sums");
      for (size_t i = 0; i < partial.size(); ++i) partial[i] = std::nanf("");
      emulator::take_launches();
      call(partial.data(), result);
      CHECK(emulator::take_launches().size() <= launches);
    };
  };

  std::vector<double> counts(tables), sums(tables), means(tables);
  each([&](int64_t i, int64_t at) { counts[at] += 1, sums[at] += x.read[i]; });
  Expected wanted_tables(2 * tables);
  for (int64_t at = 0; at < tables; ++at) means[at] = counts[at] > 0 ? sums[at] / counts[at] : 0;
  for (int64_t at = 0; at < tables; ++at) wanted_tables.add(at, means[at]);
  each([&](int64_t i, int64_t at) {
    const double difference = x.read[i] - means[at], rounding = std::abs(x.read[i]) * 0x1p-23;
    wanted_tables.add(tables + at, difference * difference);
    wanted_tables.magnitude[tables + at] += (2 * std::abs(difference) + rounding) * rounding * 0x1p19;
  });
  // Squares alone too: the means are far larger.
  const Tolerance far = {1e-5 * std::max(1.0, offset_of_x / 4), 0x1p-19};
  check_result<float>("norm_statistics" + name, wanted_tables, far, with_partial(2, [&](float* partial, float* result) {
    norm_statistics<T>(rows, x.device.data(), partial, result, result + tables, channels, nullptr);
  }));

  const double slope = random.chance(0.5) ? 0.01 : 0;
  for (const bool with_residual : {false, true}) {
    Expected wanted(size);
    each([&](int64_t i, int64_t at) {
      const double add = with_residual ? residual.read[i] : 0;
      double value = (x.read[i] - mean.read[at]) * scale.read[at] + shift.read[at] + add;
      if (value < 0) value *= static_cast<float>(slope);
      wanted.add(i, value);
      wanted.magnitude[i] += std::abs((x.read[i] - mean.read[at]) * scale.read[at]) + std::abs(add) + 1;
    });
    check_result<T>("norm_apply" + name, wanted, rounded, [&](T* result) {
      norm_apply<T>(rows, x.device.data(), mean.device.data(), scale.device.data(), shift.device.data(),
                    with_residual ? residual.device.data() : nullptr, static_cast<float>(slope), result, channels,
                    nullptr);
    });
  }

  enum Kind { kNoActivation, kSignOfAffine, kSignOfY };
  for (const Kind kind : {kNoActivation, kSignOfAffine, kSignOfY}) {
    const bool active = kind != kNoActivation;
    Expected wanted(2 * tables), before(active ? size : 0);
    each([&](int64_t i, int64_t at) {
      const double centred = x.read[i] - mean.read[at];
      const double affine = centred * scale.read[at] + shift.read[at];
      const double sign = kind == kSignOfY ? y.read[i] : affine;
      double g = grad.read[i];
      if (active && !(sign > 0)) g *= static_cast<float>(slope);
      // Where rounding decides about the sign, both are right.
      const double either = kind == kSignOfAffine && std::abs(sign) < 1e-6 ? 0x1p19 * std::abs(grad.read[i]) : 0;
      if (active) before.add(i, g), before.magnitude[i] += either;
      wanted.add(at, g);
      wanted.add(tables + at, g * (centred * rstd.read[at]));
      wanted.magnitude[at] += either, wanted.magnitude[tables + at] += either;
    });
    std::vector<T> last_before;
    check_result<float>("norm_grad_sums" + name, wanted, in_float, with_partial(2, [&](float* partial, float* result) {
      DeviceBuffer<T> out(before.value.size(), "before");
      for (size_t i = 0; i < out.size(); ++i) out[i] = from_float<T>(std::nanf(""));
      norm_grad_sums<T>(rows, grad.device.data(), x.device.data(), kind == kSignOfY ? y.device.data() : nullptr,
                        mean.device.data(), rstd.device.data(), scale.device.data(), shift.device.data(),
                        static_cast<float>(slope), active ? out.data() : nullptr, partial, result, result + tables,
                        channels, nullptr);
      last_before.assign(out.data(), out.data() + out.size());
    }));
    check_result<T>("norm_grad_sums before" + name, before, rounded,
                    [&](T* result) { std::copy(last_before.begin(), last_before.end(), result); });
  }

  Expected wanted(size), bias(channels);
  each([&](int64_t i, int64_t at) {
    wanted.add(i, scale.read[at] * grad.read[i]);
    wanted.add(i, -offset.read[at]);
    wanted.add(i, -tilt.read[at] * (x.read[i] - mean.read[at]) * rstd.read[at]);
    bias.add(i % channels, grad.read[i]);
  });
  check_result<T>("norm_grad_input" + name, wanted, rounded, [&](T* result) {
    norm_grad_input<T>(rows, grad.device.data(), x.device.data(), mean.device.data(), rstd.device.data(),
                       scale.device.data(), offset.device.data(), tilt.device.data(), result, channels, nullptr);
  });
  const Tolerance cancelling = {1e-2, rounded.element};  // one number may be the sum of all
  check_result<T>("channel_sums" + name, bias, cancelling, with_partial(2, [&](float* partial, T* result) {
    channel_sums<T>(rows, grad.device.data(), partial, result, channels, nullptr);
  }));
}

// Whole sectors are read and written, once; masked voxels are not read; shared memory has no conflicts.
template <typename T>
void check_counts() {
  constexpr int kChannels = 64, kRows = 24, kBlock = 64, kBytes = kChannels * sizeof(T);
  DeviceBuffer<T> x(kRows * kBlock * kChannels), residual(x.size()), y(x.size());
  DeviceBuffer<float> table(2 * kChannels), sums(2 * kChannels), products(2 * kChannels);
  DeviceBuffer<uint8_t> voxels(kRows * kBlock);
  DeviceBuffer<int32_t> offsets(3);
  offsets[1] = 10, offsets[2] = kRows;
  int64_t visible = 0;
  for (size_t v = 0; v < voxels.size(); ++v) visible += voxels[v] = v % 3 != 0;
  const SampleRows rows = {2, offsets.data(), kRows, kBlock, voxels.data()};
  DeviceBuffer<float> partial(norm_partial_sums(rows, kChannels));
  const float* const t = table.data();
  emulator::take_launches();
  norm_statistics<T>(rows, x.data(), partial.data(), sums.data(), products.data(), kChannels, nullptr);
  norm_apply<T>(rows, x.data(), t, t, t, residual.data(), 0.01f, y.data(), kChannels, nullptr);
  norm_grad_sums<T>(rows, x.data(), residual.data(), nullptr, t, t, t, t, 0.01f, y.data(), partial.data(),
                    sums.data(), products.data(), kChannels, nullptr);
  norm_grad_input<T>(rows, x.data(), residual.data(), t, t, t, t, t, y.data(), kChannels, nullptr);
  channel_sums<T>(rows, x.data(), partial.data(), y.data(), kChannels, nullptr);
  const std::vector<emulator::LaunchRecord> launches = emulator::take_launches();
  const int tensors[] = {1, 0, 2, 2, 0, 2, 1, 0};  // that each launch reads; sums of parts come behind
  CHECK_EQUAL(launches.size(), std::size(tensors));
  for (size_t i = 0; i < launches.size(); ++i) {
    const emulator::Counters& counters = launches[i].counters;
    CHECK_EQUAL(counters.shared_read_conflicts, 0);
    CHECK_EQUAL(counters.shared_write_conflicts, 0);
    if (tensors[i] == 0) continue;
    const int64_t read = tensors[i] * visible * kBytes;
    // Beside tensors there are tables, and for each voxel whether it is visible.
    CHECK(counters.global_bytes_read >= read);
    CHECK(counters.global_sectors_read * 32 >= read && counters.global_sectors_read * 32 < 2 * read);
    if (launches[i].kernel != "norm_apply" && launches[i].kernel != "norm_grad_input") continue;
    CHECK_EQUAL(counters.global_bytes_written, voxels.size() * kBytes);
    CHECK_EQUAL(counters.global_sectors_written * 32, counters.global_bytes_written);
  }
}

// ReLU makes a zero of -inf and leaves NaN; its gradient is zero where the sign is not positive, whatever comes in.
void check_relu() {
  constexpr int kChannels = 8;
  const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
  const float in[kChannels] = {-infinity, nan, infinity, -1, -0.0f, 0, 2, -3};
  DeviceBuffer<float> x(kChannels), grad(kChannels), y(kChannels), before(kChannels), zero(kChannels), one(kChannels);
  DeviceBuffer<int32_t> offsets(2);
  offsets[1] = 1;
  const SampleRows rows = {1, offsets.data(), 1, 1, nullptr};
  DeviceBuffer<float> partial(norm_partial_sums(rows, kChannels)), sums(kChannels), products(kChannels);
  for (int c = 0; c < kChannels; ++c) {
    x[c] = in[c];
    one[c] = 1;
    grad[c] = c == 3 ? nan : 5;
  }
  norm_apply<float>(rows, x.data(), zero.data(), one.data(), zero.data(), nullptr, 0, y.data(), kChannels, nullptr);
  norm_grad_sums<float>(rows, grad.data(), x.data(), y.data(), zero.data(), one.data(), one.data(), zero.data(), 0,
                        before.data(), partial.data(), sums.data(), products.data(), kChannels, nullptr);
  for (int c = 0; c < kChannels; ++c) {
    CHECK(std::isnan(in[c]) ? std::isnan(y[c]) : y[c] == (in[c] > 0 ? in[c] : 0));
    CHECK(before[c] == (in[c] > 0 ? 5 : 0));
    CHECK(sums[c] == before[c]);
  }
}

// Parts without visible voxels have mean 0: they must not be taken for numbers far away, whose squares overflow.
void check_large_numbers() {
  constexpr int kChannels = 5, kRows = 20, kBlock = 64;
  DeviceBuffer<float> x(kRows * kBlock * kChannels), mean(kChannels), squares(kChannels);
  DeviceBuffer<uint8_t> voxels(kRows * kBlock);
  DeviceBuffer<int32_t> offsets(2);
  offsets[1] = kRows;
  for (size_t i = 0; i < x.size(); ++i) x[i] = 0x1p120f;
  for (const int visible : {3, 700, 1279}) {
    voxels[visible] = 1;
    const SampleRows rows = {1, offsets.data(), kRows, kBlock, voxels.data()};
    DeviceBuffer<float> partial(norm_partial_sums(rows, kChannels));
    norm_statistics<float>(rows, x.data(), partial.data(), mean.data(), squares.data(), kChannels, nullptr);
    for (int c = 0; c < kChannels; ++c) {
      CHECK(mean[c] == 0x1p120f);
      CHECK_EQUAL(squares[c], 0);
    }
  }
}

}  // namespace

void test_norm() {
  struct Case {
    std::vector<double> share;
    Triple grid, block;
    double visible;
    int channels;
    double offset_of_x;  // far from 0, E[x^2] - E[x]^2 would fail
  };
  const Case cases[] = {{{0.5, 0, 1}, {2, 2, 2}, {4, 4, 4}, 1, 40, 4},
                        {{0.2, 0.9}, {2, 2, 3}, {5, 5, 5}, 0.5, 3, 100},
                        {{0, 0}, {2, 2, 2}, {2, 2, 2}, 1, 8, 0},
                        {{1}, {1, 1, 1}, {1, 1, 1}, 1, 33, 0},
                        {{0.9, 0.8}, {3, 3, 3}, {4, 4, 4}, 0.7, 8, 100},
                        {{0.5, 0.5}, {2, 3, 4}, {1, 2, 3}, 0.1, 72, 0},
                        {{0.9, 0.9}, {2, 2, 2}, {2, 2, 2}, 0, 16, 4},
                        {{1}, {3, 4, 4}, {8, 8, 8}, 0.9, 1, 4},
                        {{}, {1, 1, 1}, {2, 2, 2}, 1, 8, 0}};
  uint64_t seed = 100;
  for (const Case& c : cases) {
    Random random(++seed);
    const Side side(Layout(static_cast<int64_t>(c.share.size()), c.grid, c.share, random), c.block, c.visible, random);
    check_norm<float>(side, c.channels, c.offset_of_x, seed);
    check_norm<bf16>(side, c.channels, c.offset_of_x, seed);
    check_norm<fp16>(side, c.channels, c.offset_of_x, seed);
  }
  check_relu();
  check_large_numbers();
  check_counts<float>();
  check_counts<bf16>();
}

}  // namespace s3d::cuda::test
