// What the convolutions of a ResEnc-L encoder do at a patch of 160^3 of which 75 % is masked, as the emulator counts
// it: the table in docs/performance.md. Of the blocks of a stage a few are computed; all of their neighbours are there.
#include "cuda/tests/results.h"
#include "tests/problem.h"

namespace s3d::cuda::test {
namespace {

using s3d::test::Layout;
using s3d::test::neighbour_table;
using s3d::test::Random;

struct Stage {
  int number;
  int64_t side;
  int channels;
  int64_t batch, rows;  // rows: how many blocks are computed
};

constexpr Stage kStages[] = {{0, 32, 32, 1, 1}, {1, 16, 64, 1, 2},   {2, 8, 128, 1, 4},
                             {3, 4, 256, 1, 8}, {4, 2, 320, 2, 62}, {5, 1, 320, 2, 62}};
constexpr int64_t kCells = 125, kVisible = 31;

Layout layout_of(int64_t batch) {
  for (uint64_t seed = 1;; ++seed) {
    Random random(seed);
    Layout layout(batch, {5, 5, 5}, std::vector<double>(batch, static_cast<double>(kVisible) / kCells), random);
    bool even = true;
    for (int64_t n = 0; n < batch; ++n) even = even && layout.offsets[n + 1] - layout.offsets[n] == kVisible;
    if (even) return layout;
  }
}

// input: bytes requested of features over those of the visible ones; bytes: all requested.
void print(const Stage& stage, const char* kernel, double input, double bytes) {
  emulator::Counters sum;
  for (const emulator::LaunchRecord& launch : emulator::take_launches()) {
    const emulator::Counters& c = launch.counters;
    sum.useful_flops += c.useful_flops;
    sum.mma_flops += c.mma_flops;
    sum.shared_read_conflicts += c.shared_read_conflicts;
    sum.shared_write_conflicts += c.shared_write_conflicts;
  }
  std::printf("| %d | %d^3 x %d | `%s` | %.3f | %lld / %lld | %.2f | %.0f |\n", stage.number,
              static_cast<int>(stage.side), stage.channels, kernel,
              static_cast<double>(sum.useful_flops) / static_cast<double>(sum.mma_flops),
              static_cast<long long>(sum.shared_read_conflicts), static_cast<long long>(sum.shared_write_conflicts),
              input, static_cast<double>(sum.useful_flops) / bytes);
  std::fflush(stdout);
}

void count_stage(const Stage& stage) {
  const Layout layout = layout_of(stage.batch);
  const std::vector<int32_t> all = neighbour_table(layout, layout, {1, 1, 1});
  std::vector<int32_t> table;
  for (int64_t i = 0; i < stage.rows; ++i) {
    const auto row = all.begin() + i * layout.rows / stage.rows * 27;
    table.insert(table.end(), row, row + 27);
  }
  const emulator::RegisteredBuffer registered(table.data(), table.size() * 4, "table");
  const Triple block = {stage.side, stage.side, stage.side}, three = {3, 3, 3}, one = {1, 1, 1};
  const Window window = {stage.rows, layout.rows, block, block, three, one, one, one, false,
                         table.data(), nullptr, nullptr};
  const ConvChannels channels = {stage.channels, stage.channels, 1};
  const int64_t written = stage.rows * block.volume();
  DeviceBuffer<bf16> x(layout.rows * block.volume() * stage.channels), y(written * stage.channels);
  DeviceBuffer<bf16> weight(int64_t{27} * stage.channels * stage.channels);
  DeviceBuffer<bf16> packed(conv3d_packed_elements<bf16>(window, channels));
  conv3d_pack_weight<bf16>(window, channels, Math::kTensorCores, weight.data(), packed.data(), nullptr);

  const auto count = [&](const char* kernel, const auto& compute) {
    emulator::take_launches();
    const int64_t x_before = x.bytes_read(), packed_before = packed.bytes_read(), y_before = y.bytes_read();
    compute();
    const auto read = static_cast<double>(x.bytes_read() - x_before + y.bytes_read() - y_before);
    const double own = static_cast<double>(written) * stage.channels * 2 * (y.bytes_read() > y_before ? 2 : 1);
    print(stage, kernel, read / own, read + static_cast<double>(packed.bytes_read() - packed_before));
  };
  count("conv3d_gather", [&] {
    conv3d_gather<bf16>(window, channels, Math::kTensorCores, x.data(), packed.data(), nullptr, y.data(), nullptr);
  });
  if (conv3d_halo_applies(window, channels)) {
    count("conv3d_halo", [&] {
      conv3d_halo<bf16>(window, channels, Math::kTensorCores, x.data(), packed.data(), nullptr, y.data(), nullptr);
    });
  }
  if (conv3d_pairs_applies(window, channels)) {
    DeviceBuffer<float> partial(conv3d_pairs_partial_sums<bf16>(window, channels));
    count("conv3d_pairs", [&] {
      conv3d_pairs<bf16>(window, channels, Math::kTensorCores, x.data(), packed.data(), nullptr, partial.data(),
                         y.data(), nullptr);
    });
  }
  DeviceBuffer<float> partial(conv3d_grad_weight_partial_sums(window, channels));
  count("conv3d_grad_weight", [&] {
    conv3d_grad_weight<bf16>(window, channels, Math::kTensorCores, y.data(), x.data(), partial.data(), weight.data(),
                             nullptr);
  });
  if (conv3d_halo_applies(window, channels)) {
    DeviceBuffer<float> sums(conv3d_grad_weight_halo_partial_sums<bf16>(window, channels));
    count("conv3d_grad_weight_halo", [&] {
      conv3d_grad_weight_halo<bf16>(window, channels, Math::kTensorCores, y.data(), x.data(), sums.data(),
                                    weight.data(), nullptr);
    });
  }
}

// The stem beside the kernels that it replaces: one channel to 32. Bytes requested per written voxel are those of the
// input, and all: with tables, the weight and, for its gradient, grad.
void count_stem(int64_t side, int64_t rows) {
  const Layout layout = layout_of(1);
  std::vector<int32_t> table = neighbour_table(layout, layout, {1, 1, 1});
  table.resize(rows * 27);
  table.shrink_to_fit();
  const emulator::RegisteredBuffer registered(table.data(), table.size() * 4, "table");
  const Triple block = {side, side, side}, three = {3, 3, 3}, one = {1, 1, 1};
  const Window window = {rows, layout.rows, block, block, three, one, one, one, false,
                         table.data(), nullptr, nullptr};
  const ConvChannels channels = {1, 32, 1};
  const auto written = static_cast<double>(rows * block.volume());
  DeviceBuffer<bf16> x(layout.rows * block.volume()), y(rows * block.volume() * 32), weight(27 * 32);
  DeviceBuffer<bf16> packed(conv3d_packed_elements<bf16>(window, channels));
  conv3d_pack_weight<bf16>(window, channels, Math::kTensorCores, weight.data(), packed.data(), nullptr);
  const auto count = [&](const char* kernel, const auto& compute) {
    emulator::take_launches();
    const int64_t before = x.bytes_read();
    compute();
    const emulator::Counters c = emulator::take_launches()[0].counters;
    std::printf("| %d^3, 1 to 32 | `%s` | %.3f | %lld / %lld | %.0f | %.0f |\n", static_cast<int>(side), kernel,
                static_cast<double>(c.useful_flops) / static_cast<double>(c.mma_flops),
                static_cast<long long>(c.shared_read_conflicts), static_cast<long long>(c.shared_write_conflicts),
                static_cast<double>(x.bytes_read() - before) / written,
                static_cast<double>(c.global_bytes_read) / written);
    std::fflush(stdout);
  };
  count("conv3d_gather", [&] {
    conv3d_gather<bf16>(window, channels, Math::kTensorCores, x.data(), packed.data(), nullptr, y.data(), nullptr);
  });
  count("conv3d_halo", [&] {
    conv3d_halo<bf16>(window, channels, Math::kTensorCores, x.data(), packed.data(), nullptr, y.data(), nullptr);
  });
  count("conv3d_stem", [&] {
    conv3d_stem<bf16>(window, channels, Math::kTensorCores, x.data(), weight.data(), nullptr, y.data(), nullptr);
  });
  DeviceBuffer<float> general(conv3d_grad_weight_partial_sums(window, channels));
  count("conv3d_grad_weight", [&] {
    conv3d_grad_weight<bf16>(window, channels, Math::kTensorCores, y.data(), x.data(), general.data(), weight.data(),
                             nullptr);
  });
  DeviceBuffer<float> partial(conv3d_stem_grad_weight_partial_sums<bf16>(window, channels));
  count("conv3d_stem_grad_weight", [&] {
    conv3d_stem_grad_weight<bf16>(window, channels, Math::kTensorCores, y.data(), x.data(), partial.data(),
                                  weight.data(), nullptr);
  });
}

}  // namespace

void count() {
  emulator::set_options({0, false});
  std::printf("| stage | block | kernel | useful / MMA FLOPs | bank conflicts, reads / writes | "
              "input bytes requested / visible | useful FLOPs / byte requested |\n");
  std::printf("| ---: | --- | --- | ---: | ---: | ---: | ---: |\n");
  for (const Stage& stage : kStages) count_stage(stage);
  std::printf("\n| block | kernel | useful / MMA FLOPs | bank conflicts, reads / writes | input bytes requested / "
              "voxel | bytes requested / voxel |\n");
  std::printf("| --- | --- | ---: | ---: | ---: | ---: |\n");
  count_stem(32, 1);
  count_stem(16, 4);
}

}  // namespace s3d::cuda::test
