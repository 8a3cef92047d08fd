// Blocks of a dense volume and back, in every memory format: each number written once, with the bits that it had.
#include <array>

#include "cuda/tests/results.h"
#include "tests/problem.h"

namespace s3d::cuda::test {
namespace {

using s3d::test::Layout;
using s3d::test::Random;
using s3d::test::Side;
using s3d::test::times;

// kSlice: the first channels of one more, kEverySecond: every second one of twice as many, both channels last.
enum class Format { kChannelsFirst, kChannelsLast, kTransposed, kPadded, kSlice, kEverySecond };

// Calls call(result) with each seed: the same bits as expected, in one launch.
template <typename T, typename Call>
void check_bits(const std::string& what, const std::vector<T>& expected, size_t offset, const Call& call) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    emulator::set_options({seed, true});
    DeviceBuffer<T> result(expected.size() + offset, "result");
    for (size_t i = 0; i < result.size(); ++i) std::memset(static_cast<void*>(&result[i]), 0x5A, sizeof(T));
    emulator::take_launches();
    call(result.data() + offset);
    const std::vector<emulator::LaunchRecord> launches = emulator::take_launches();
    CHECK(launches.size() <= 1);
    for (size_t i = 0; i < expected.size(); ++i) {
      if (std::memcmp(&expected[i], result.data() + offset + i, sizeof(T)) == 0) continue;
      std::printf("%s: element %zu has other bits\n", what.c_str(), i);
      std::exit(1);
    }
  }
  emulator::set_options({});
}

// With an offset nothing is aligned to 16 bytes.
template <typename T>
void check_blocks(const Side& side, const Triple& shape, int channels, Format format, int offset, bool zeros,
                  uint64_t seed) {
  Random random(seed);
  const int64_t batch = side.layout.batch, area = shape.h * shape.w, volume = shape.volume();
  int64_t elements = batch * volume * channels;
  DenseVolume dense = {static_cast<int>(batch), channels, shape, {}};
  const auto set_strides = [&](const std::array<int64_t, 5>& s) { std::copy(s.begin(), s.end(), dense.strides); };
  const auto channels_last = [&](int64_t step_c, int64_t step) {
    set_strides({volume * step, step_c, area * step, shape.w * step, step});
    elements = batch * volume * step;
  };
  if (format == Format::kChannelsFirst) set_strides({volume * channels, volume, area, shape.w, 1});
  if (format == Format::kChannelsLast) channels_last(1, channels);
  if (format == Format::kPadded) channels_last(1, 2 * channels);
  if (format == Format::kSlice) channels_last(1, channels + 1);
  if (format == Format::kEverySecond) channels_last(2, 2 * channels);
  if (format == Format::kTransposed) {  // [C, W, D, N, H]
    set_strides({shape.h, elements / channels, batch * shape.h, 1, shape.d * batch * shape.h});
  }
  const BlockRows rows = {side.layout.index.data(), side.voxels(), side.block, side.layout.rows};
  const emulator::RegisteredBuffer index(side.layout.index.data(), side.layout.index.size() * 4, "index");
  const emulator::RegisteredBuffer cells(side.layout.row.data(), side.layout.row.size() * 4, "cells");
  const emulator::RegisteredBuffer voxels(side.voxels(), side.mask.size(), "voxels");
  // Any bits: NaNs with payloads, infinities, subnormal numbers.
  const auto drawn = [&](DeviceBuffer<T>& buffer) {
    for (size_t i = 0; i < buffer.size(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(random.below(int64_t{1} << 32));
      std::memcpy(static_cast<void*>(buffer.data() + i), &bits, sizeof(T));
    }
  };
  DeviceBuffer<T> values(elements + offset, "dense"), blocks(side.size() * channels + offset, "blocks");
  DeviceBuffer<T> fill(channels + offset, "fill");
  drawn(values), drawn(blocks), drawn(fill);
  T zero, untouched;
  std::memset(static_cast<void*>(&zero), 0, sizeof(T));
  std::memset(static_cast<void*>(&untouched), 0x5A, sizeof(T));
  std::vector<T> gathered(side.size() * channels, zero), scattered(elements, untouched);
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t at = 0; at < volume; ++at) {
      const int64_t z = at / area, y = at / shape.w % shape.h, x = at % shape.w, voxel = side.at(n, z, y, x);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t* s = dense.strides;
        const int64_t place = n * s[0] + c * s[1] + z * s[2] + y * s[3] + x * s[4];
        if (voxel >= 0) gathered[voxel * channels + c] = values[offset + place];
        const T elsewhere = zeros ? zero : fill[offset + c];
        scattered[place] = voxel >= 0 ? blocks[offset + voxel * channels + c] : elsewhere;
      }
    }
  }
  const std::string name = " channels " + std::to_string(channels) + " bytes " + std::to_string(sizeof(T)) +
                           " format " + std::to_string(static_cast<int>(format)) + " offset " + std::to_string(offset);
  check_bits("gather_blocks" + name, gathered, offset, [&](T* result) {
    gather_blocks<T>(rows, dense, values.data() + offset, result, nullptr);
  });
  check_bits("scatter_blocks" + name, scattered, offset, [&](T* result) {
    scatter_blocks<T>(rows, dense, side.layout.row.data(), blocks.data() + offset,
                      zeros ? nullptr : fill.data() + offset, result, nullptr);
  });
}

// Every number is written once, the volume's and the blocks' sectors are written whole.
void check_counts() {
  Random random(1);
  const Side side(Layout(1, {2, 2, 2}, {0.6}, random), {8, 8, 8}, 1, random);
  const emulator::RegisteredBuffer index(side.layout.index.data(), side.layout.index.size() * 4, "index");
  const emulator::RegisteredBuffer cells(side.layout.row.data(), side.layout.row.size() * 4, "cells");
  const BlockRows rows = {side.layout.index.data(), nullptr, side.block, side.layout.rows};
  for (const int form : {1, 4, 32, 40, -3, -4, -40}) {  // negative: channels last
    const int channels = std::abs(form);
    const DenseVolume dense = form > 0 ? DenseVolume{1, channels, {16, 16, 16}, {0, 4096, 256, 16, 1}}
                                       : DenseVolume{1, channels, {16, 16, 16}, {0, 1, 256 * channels, 16 * channels,
                                                                                 channels}};
    DeviceBuffer<float> values(4096 * channels), blocks(side.size() * channels), fill(channels);
    const emulator::Counters gather =
        emulator::test::counters_of([&] { gather_blocks<float>(rows, dense, values.data(), blocks.data(), nullptr); });
    const emulator::Counters scatter = emulator::test::counters_of([&] {
      scatter_blocks<float>(rows, dense, side.layout.row.data(), blocks.data(), fill.data(), values.data(), nullptr);
    });
    CHECK_EQUAL(gather.global_bytes_written, 4 * side.size() * channels);
    CHECK_EQUAL(scatter.global_bytes_written, 4 * 4096 * channels);
    for (const emulator::Counters& counters : {gather, scatter}) {
      CHECK_EQUAL(counters.global_sectors_written * 32, counters.global_bytes_written);
      CHECK_EQUAL(counters.shared_read_conflicts, 0);
      CHECK_EQUAL(counters.shared_write_conflicts, 0);
    }
  }
}

}  // namespace

void test_blocks() {
  struct Case {
    std::vector<double> share;
    Triple grid, block, beyond;  // beyond: how far the last blocks reach out of the volume
    double visible;
    int channels;
  };
  const Case cases[] = {{{0.6, 0, 0.3}, {2, 2, 2}, {4, 4, 4}, {0, 0, 0}, 1, 40},
                        {{0.7, 0.3}, {2, 3, 2}, {1, 2, 3}, {0, 1, 2}, 0.6, 3},
                        {{0.5}, {2, 2, 2}, {5, 6, 7}, {3, 0, 1}, 0.8, 1},
                        {{1}, {3, 3, 3}, {1, 1, 1}, {0, 0, 0}, 1, 8},
                        {{0.5, 0.8}, {2, 1, 2}, {2, 4, 2}, {0, 0, 0}, 0.5, 64},
                        {{0}, {2, 2, 2}, {2, 2, 2}, {1, 0, 0}, 1, 5},
                        {{}, {1, 1, 1}, {2, 2, 2}, {0, 0, 0}, 1, 5}};
  uint64_t seed = 200;
  for (const Case& c : cases) {
    for (const Format format : {Format::kChannelsFirst, Format::kChannelsLast, Format::kTransposed, Format::kPadded,
                                Format::kSlice, Format::kEverySecond}) {
      Random random(++seed);
      const Side side(Layout(static_cast<int64_t>(c.share.size()), c.grid, c.share, random), c.block, c.visible,
                      random);
      const Triple full = times(c.grid, c.block);
      const Triple shape = {full.d - c.beyond.d, full.h - c.beyond.h, full.w - c.beyond.w};
      check_blocks<float>(side, shape, c.channels, format, 0, false, seed);
      check_blocks<bf16>(side, shape, c.channels, format, 0, true, seed);
      check_blocks<fp16>(side, shape, c.channels, format, 1, false, seed);
    }
  }
  check_counts();
}

}  // namespace s3d::cuda::test
