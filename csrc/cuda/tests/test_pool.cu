// Average and maximum pooling and their backward: random masks, windows that overlap, leave gaps and reach outside.
#include <limits>

#include "cuda/tests/results.h"
#include "tests/problem.h"

namespace s3d::cuda::test {
namespace {

using s3d::test::Pair;
using s3d::test::Problem;
using s3d::test::Random;
using s3d::test::Shape;
using s3d::test::times;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The largest of each window and its tap, -1: a masked voxel's zero, or masked itself.
struct Maxima {
  std::vector<double> value;
  std::vector<int> winner;
  std::vector<int64_t> from;  // the input, or -1
};

template <typename Inside>
Maxima maxima_of(const Problem& p, const std::vector<double>& x, int channels, const Inside& inside) {
  const int64_t size = p.target.size() * channels;
  Maxima most = {std::vector<double>(size, 0), std::vector<int>(size, -1), std::vector<int64_t>(size, -1)};
  std::vector<char> begun(size, 0);
  p.each_tap([&](int64_t voxel, int64_t tap, int64_t n, int64_t z, int64_t y, int64_t x_) {
    if (!inside(z, y, x_)) return;
    const int64_t other = p.source.at(n, z, y, x_);
    for (int64_t c = 0; c < channels; ++c) {
      const double value = other < 0 ? 0 : x[other * channels + c];
      const int64_t i = voxel * channels + c;
      if (begun[i] && !(value > most.value[i]) && !std::isnan(value)) continue;
      begun[i] = 1;
      most.value[i] = value;
      most.winner[i] = other < 0 ? -1 : static_cast<int>(tap);
      most.from[i] = other < 0 ? -1 : other * channels + c;
    }
  });
  return most;
}

// Runs call(out, winners) with each seed; both are found, and each alone is the same.
template <typename T, typename Call>
void check_maximum(const std::string& what, const Maxima& expected, const Call& call) {
  const size_t size = expected.value.size();
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator::set_options({seed, true});
    DeviceBuffer<T> out(size, "out"), out_alone(size, "out");
    DeviceBuffer<int16_t> winners(size, "winners"), winners_alone(size, "winners");
    for (size_t i = 0; i < size; ++i) winners[i] = winners_alone[i] = -9;
    call(out.data(), winners.data());
    call(out_alone.data(), nullptr);
    call(nullptr, winners_alone.data());
    for (size_t i = 0; i < size; ++i) {
      const double is = to_float(out[i]), wanted = expected.value[i];
      const bool same = std::isnan(wanted) ? std::isnan(is) : is == wanted;
      if (!same || winners[i] != expected.winner[i] || winners_alone[i] != winners[i] ||
          std::memcmp(&out_alone[i], &out[i], sizeof(T)) != 0) {
        std::printf("%s: element %zu is %.9g of tap %d, not %.9g of %d\n", what.c_str(), i, is, winners[i], wanted,
                    expected.winner[i]);
        std::exit(1);
      }
    }
  }
  emulator::set_options({});
}

template <typename T>
void check_pooling(const Problem& p, const Triple& volume, int channels, int divisor, uint64_t seed) {
  Random random(seed);
  const int64_t inputs = p.source.size(), outputs = p.target.size();
  Operand<T> x(p.source.features(random.values(inputs * channels), channels), "x");
  Operand<T> grad(p.target.features(random.values(outputs * channels), channels), "grad");
  // Equal numbers, and some that are none.
  std::vector<double> drawn = random.coarse(inputs * channels), special = drawn;
  for (double& value : special) {
    if (random.chance(0.04)) value = random.chance(0.3) ? s3d::test::kNaN : random.chance(0.5) ? kInfinity : -kInfinity;
  }
  for (double& value : special) value = random.chance(0.3) ? -kInfinity : value;
  Operand<T> coarse(p.source.features(drawn, channels), "x"), extreme(p.source.features(special, channels), "x");

  const auto inside = [&](int64_t z, int64_t y, int64_t x_) {
    return z >= 0 && z < volume.d && y >= 0 && y < volume.h && x_ >= 0 && x_ < volume.w;
  };
  std::vector<int64_t> counts(outputs, 0);
  p.each_tap([&](int64_t voxel, int64_t, int64_t, int64_t z, int64_t y, int64_t x_) {
    counts[voxel] += inside(z, y, x_);
  });
  const auto divides = [&](int64_t voxel) {
    return static_cast<double>(divisor > 0 ? divisor : std::max<int64_t>(1, counts[voxel]));
  };
  Expected mean(outputs * channels), mean_grad(inputs * channels), maximum_grad(inputs * channels);
  for (const Pair& pair : p.pairs) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at_y = pair.target * channels + c, at_x = pair.source * channels + c;
      mean.add(at_y, x.read[at_x] / divides(pair.target));
      mean_grad.add(at_x, grad.read[at_y] / divides(pair.target));
    }
  }
  const Maxima most = maxima_of(p, coarse.read, channels, inside);
  for (int64_t i = 0; i < outputs * channels; ++i) {
    if (most.from[i] >= 0) maximum_grad.add(most.from[i], grad.read[i]);
  }

  const WindowBuffers forward(p.forward), transposed(p.transposed);
  const std::vector<int32_t>& index = p.target.layout.index;
  const emulator::RegisteredBuffer registered(index.data(), index.size() * 4, "index");
  const PoolOutputs place = {index.data(), volume};
  const std::string name = " " + p.name + " volume " + s3d::test::text(volume) + " channels " +
                           std::to_string(channels) + " divisor " + std::to_string(divisor) + " " +
                           name_of<T>(Math::kExact);
  const Tolerance allowed = sizeof(T) == 2 ? tolerance<T>(Math::kExact) : Tolerance{1e-5, 0x1p-19};
  check_result<T>("pool_average" + name, mean, allowed, [&](T* out) {
    pool_average<T>(p.forward, place, x.device.data(), out, channels, divisor, nullptr);
  });
  check_result<T>("pool_average_grad" + name, mean_grad, allowed, [&](T* out) {
    pool_average_grad<T>(p.transposed, place, grad.device.data(), out, channels, divisor, nullptr);
  });
  for (Operand<T>* in : {&coarse, &extreme}) {
    const Maxima expected = maxima_of(p, in->read, channels, inside);
    check_maximum<T>("pool_maximum" + name, expected, [&](T* out, int16_t* winners) {
      pool_maximum<T>(p.forward, place, in->device.data(), out, winners, channels, nullptr);
    });
  }
  check_result<T>("pool_maximum_grad" + name, maximum_grad, allowed, [&](T* out) {
    DeviceBuffer<int16_t> winners(outputs * channels, "winners");
    pool_maximum<T>(p.forward, place, coarse.device.data(), nullptr, winners.data(), channels, nullptr);
    pool_maximum_grad<T>(p.transposed, winners.data(), grad.device.data(), out, channels, nullptr);
  });
}

struct Case {
  Shape shape;
  int channels;
  std::vector<double> share;  // of the blocks of each sample
  Triple beyond;              // how far the last blocks reach out of the volume
};

constexpr Triple kNone = {0, 0, 0}, kOne = {1, 1, 1}, kTwo = {2, 2, 2}, kThree = {3, 3, 3}, kFour = {4, 4, 4};

const Case kCases[] = {
    {{2, {2, 2, 2}, kFour, kTwo, kTwo, kNone}, 16, {0.7, 0.3}, kNone},
    {{2, {2, 2, 3}, kFour, kThree, kTwo, kOne}, 8, {0.6, 0.8}, {1, 0, 3}},
    {{2, {3, 2, 3}, kTwo, kThree, kOne, kOne}, 5, {0.6, 0}, {0, 1, 1}},
    {{1, {2, 2, 2}, {2, 4, 6}, {1, 2, 3}, {1, 2, 3}, kNone}, 24, {0.8}, {0, 1, 2}},
    {{1, {3, 3, 3}, kOne, kThree, kOne, kOne}, 3, {0.6}, kNone},
    {{1, {2, 2, 2}, {4, 4, 6}, {2, 1, 2}, {2, 2, 3}, kNone}, 1, {0.9}, kNone},  // inputs that no window reads
    {{2, {2, 2, 2}, kTwo, kTwo, kTwo, kNone}, 8, {0, 0}, kNone},
};

}  // namespace

void test_pool() {
  uint64_t seed = 400;
  for (const Case& c : kCases) {
    for (const double visible : {1.0, 0.6}) {
      Random random(++seed);
      const Shape& s = c.shape;
      const Triple full = times(s.grid, s.block);
      const Triple volume = {full.d - c.beyond.d, full.h - c.beyond.h, full.w - c.beyond.w};
      Problem p(s, c.share, c.share, visible == 1.0, visible, visible, 0, random);
      if (c.beyond.volume() + c.beyond.d + c.beyond.h + c.beyond.w > 0) {
        p.source.cut(volume);
        p.target.cut({(volume.d + s.stride.d - 1) / s.stride.d, (volume.h + s.stride.h - 1) / s.stride.h,
                      (volume.w + s.stride.w - 1) / s.stride.w});
        p.forward.gathered_voxels = p.transposed.written_voxels = p.source.voxels();
        p.forward.written_voxels = p.transposed.gathered_voxels = p.target.voxels();
        p.pairs.clear();
        p.list_pairs();
      }
      const int divisor = seed % 2 == 0 ? 0 : static_cast<int>(s.kernel.volume());
      check_pooling<bf16>(p, volume, c.channels, divisor, seed);
      check_pooling<float>(p, volume, c.channels, divisor == 0 ? 3 : 0, seed);
      if (seed % 2 == 0) check_pooling<fp16>(p, volume, c.channels, divisor, seed);
    }
  }
}

}  // namespace s3d::cuda::test
