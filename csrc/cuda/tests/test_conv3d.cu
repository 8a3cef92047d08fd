// Convolution and the gradient of its input: random masks, every kind of window, odd numbers of channels, groups.
#include <iterator>

#include "cuda/tests/convolution.h"

namespace s3d::cuda::test {
namespace {

template <typename T>
void check_problem(const Problem& p, const Channels& c, Math math, uint64_t seed, bool only_halo) {
  Random random(seed);
  const bool with_bias = random.chance(0.5);
  Convolution<T> conv(p, c, math, with_bias, random);
  const ConvChannels& channels = conv.channels;
  const std::string& name = conv.name;
  // Of channels in whole chunks of 16 bytes.
  const bool whole = c.in / c.groups % 8 == 0 && c.out / c.groups % 8 == 0;
  const auto check = [&](const std::string& direction, const Window& window, Operand<T>& gathered, Operand<T>& bias,
                         const Expected& expected) {
    DeviceBuffer<T> packed(conv3d_packed_elements<T>(window, channels), "packed weight");
    for (size_t i = 0; i < packed.size(); ++i) packed[i] = from_float<T>(std::nanf(""));
    conv3d_pack_weight<T>(window, channels, math, conv.weight.device.data(), packed.data(), nullptr);
    T* const added = data_or_null(bias);
    if (!only_halo) {
      check_result<T>("conv3d_gather" + direction + name, expected, tolerance<T>(math), [&](T* written) {
        conv3d_gather<T>(window, channels, math, gathered.device.data(), packed.data(), added, written, nullptr);
      });
      if (conv3d_pairs_applies(window, channels)) {
        const int64_t sums = conv3d_pairs_partial_sums<T>(window, channels);
        emulator::take_launches();
        check_result<T>("conv3d_pairs" + direction + name, expected, tolerance<T>(math), [&](T* written) {
          PartialSums partial(sums);
          conv3d_pairs<T>(window, channels, math, gathered.device.data(), packed.data(), added, partial.data(), written,
                          nullptr);
        });
        for (const emulator::LaunchRecord& launch : emulator::take_launches()) {
          if (launch.kernel != "conv3d_pairs") continue;
          CHECK_EQUAL(launch.counters.useful_flops, conv.useful_flops);
        }
      }
    }
    const bool halo = conv3d_halo_applies(window, channels);
    CHECK(halo || !only_halo);
    if (!halo) return;
    emulator::take_launches();
    check_result<T>("conv3d_halo" + direction + name, expected, tolerance<T>(math), [&](T* written) {
      conv3d_halo<T>(window, channels, math, gathered.device.data(), packed.data(), added, written, nullptr);
    });
    // Each pair is multiplied, and nothing that is no pair counts as useful.
    for (const emulator::LaunchRecord& launch : emulator::take_launches()) {
      const emulator::Counters& counters = launch.counters;
      CHECK_EQUAL(whole ? counters.shared_read_conflicts : 0, 0);
      CHECK_EQUAL(whole ? counters.shared_write_conflicts : 0, 0);
      CHECK_EQUAL(counters.useful_flops, conv.useful_flops);
    }
  };
  check(" ", p.forward, conv.x, conv.out_bias, conv.y);
  check(" transposed ", p.transposed, conv.grad, conv.in_bias, conv.grad_x);
  if (conv3d_halo_applies(p.forward, channels)) {
    emulator::take_launches();
    int calls = 0;
    check_result<T>("conv3d_grad_weight_halo " + name, conv.grad_weight, tolerance<T>(math), [&](T* written) {
      // On a large GPU and on a small one, which has fewer buffers.
      if (calls++ > 0) emulator::set_options({1, true, 99 << 10});
      PartialSums partial(conv3d_grad_weight_halo_partial_sums<T>(p.forward, channels));
      conv3d_grad_weight_halo<T>(p.forward, channels, math, conv.grad.device.data(), conv.x.device.data(),
                                 partial.data(), written, nullptr);
    });
    for (const emulator::LaunchRecord& launch : emulator::take_launches()) {
      if (launch.kernel != "conv3d_grad_weight_halo") continue;
      CHECK_EQUAL(whole ? launch.counters.shared_read_conflicts : 0, 0);
      CHECK_EQUAL(whole ? launch.counters.shared_write_conflicts : 0, 0);
      CHECK_EQUAL(launch.counters.useful_flops, conv.useful_flops);
    }
  }
  if (only_halo) return;
  check_result<T>("conv3d_grad_weight " + name, conv.grad_weight, tolerance<T>(math), [&](T* written) {
    PartialSums partial(conv3d_grad_weight_partial_sums(p.forward, channels));
    conv3d_grad_weight<T>(p.forward, channels, math, conv.grad.device.data(), conv.x.device.data(), partial.data(),
                          written, nullptr);
  });
}

struct Case {
  Shape shape;
  Channels channels;
  std::vector<double> share;  // of the blocks of each sample
};

constexpr Triple kNone = {0, 0, 0}, kOne = {1, 1, 1}, kTwo = {2, 2, 2}, kThree = {3, 3, 3}, kFour = {4, 4, 4},
                 kFive = {5, 5, 5}, kEight = {8, 8, 8};

const Case kCases[] = {
    {{2, {2, 2, 2}, kFour, kThree, kOne, kOne}, {32, 64, 1}, {0.4, 0.2}},
    {{3, {3, 3, 2}, kTwo, kThree, kOne, kOne}, {40, 24, 1}, {0.7, 0, 0.4}},
    {{1, {6, 6, 6}, kOne, kThree, kOne, kOne}, {72, 80, 1}, {0.5}},
    {{2, {1, 2, 2}, {4, 8, 8}, {1, 3, 3}, kOne, {0, 1, 1}}, {7, 5, 1}, {0.8, 0.4}},
    {{2, {2, 2, 2}, kFour, kOne, kOne, kNone}, {33, 96, 1}, {0.5, 1}},
    {{2, {2, 3, 2}, kOne, kFive, kOne, kTwo}, {8, 9, 1}, {0.9, 0.5}},
    {{1, {1, 2, 1}, kFour, kFive, kOne, kTwo}, {8, 16, 1}, {1}},
    {{2, {2, 1, 2}, kFour, kThree, kTwo, kOne}, {16, 32, 1}, {0.6, 0.8}},
    {{2, {2, 2, 3}, {8, 8, 8}, kTwo, kTwo, kNone}, {24, 8, 1}, {0.3, 0.1}},
    {{2, {3, 3, 3}, kTwo, kTwo, kTwo, kNone}, {24, 40, 1}, {0.6, 0.3}},
    {{1, {3, 3, 3}, {2, 4, 4}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}}, {17, 33, 1}, {0.6}},
    {{2, {1, 2, 2}, kFour, kThree, kOne, kOne}, {32, 48, 2}, {0.5, 0.5}},
    {{1, {2, 3, 2}, kTwo, kThree, kOne, kOne}, {12, 6, 3}, {0.8}},
    {{1, {1, 2, 1}, kFour, kThree, kTwo, kOne}, {8, 8, 8}, {1}},
    {{1, {1, 2, 1}, kFour, kThree, kOne, kOne}, {5, 32, 1}, {1}},
    {{2, {2, 2, 2}, kTwo, kThree, kOne, kOne}, {8, 8, 1}, {0, 0}},
    // Lists of pairs: taps in splits, more taps than a bit mask has, groups, odd channels.
    {{2, {2, 3, 2}, kTwo, kThree, kOne, kOne}, {64, 70, 1}, {0.6, 0.3}},
    {{1, {3, 3, 2}, kOne, kFive, kOne, kTwo}, {40, 48, 1}, {0.6}},
    {{2, {3, 2, 2}, kTwo, kThree, kOne, kOne}, {80, 96, 2}, {0.5, 0.7}},
    {{1, {6, 6, 5}, {1, 2, 2}, kThree, kOne, kOne}, {36, 33, 1}, {0.7}},
    // Voxels of more than one part of the gradient of the weight.
    {{1, {2, 2, 3}, {8, 8, 8}, {1, 1, 2}, kOne, kNone}, {8, 8, 1}, {0.9}},
};

// For conv3d_halo; it computes some of the others, too.
const Case kHaloCases[] = {
    {{1, {2, 2, 1}, kEight, kThree, kOne, kOne}, {32, 32, 1}, {0.8}},
    {{2, {1, 1, 2}, {4, 8, 8}, kThree, kOne, kOne}, {40, 72, 1}, {0.6, 0.4}},
    {{1, {1, 1, 1}, {4, 16, 16}, kThree, kOne, kOne}, {16, 8, 1}, {1}},
    {{2, {2, 2, 2}, kFour, kThree, kOne, kOne}, {80, 40, 1}, {0.5, 0.3}},
    {{1, {2, 2, 2}, {4, 8, 8}, {1, 3, 3}, kOne, {0, 1, 1}}, {72, 24, 1}, {0.6}},
    {{2, {1, 2, 2}, {8, 4, 8}, {3, 1, 3}, kOne, {1, 0, 1}}, {40, 40, 1}, {0.4, 0.8}},
    {{1, {2, 1, 1}, {12, 8, 4}, {3, 3, 1}, kOne, {1, 1, 0}}, {24, 16, 1}, {1}},
    {{2, {2, 1, 2}, {4, 8, 8}, {3, 1, 1}, kOne, {1, 0, 0}}, {72, 8, 1}, {0.7, 0.3}},
    {{1, {1, 1, 1}, {4, 8, 16}, kThree, kOne, kOne}, {64, 80, 2}, {1}},
    {{1, {2, 2, 1}, {4, 8, 8}, kThree, kOne, kOne}, {3, 7, 1}, {0.8}},
    {{1, {1, 2, 2}, kFour, kThree, kOne, kOne}, {9, 15, 3}, {0.8}},
    {{1, {1, 2, 2}, kEight, kThree, kOne, kOne}, {8, 8, 1}, {0}},
};

// So few voxels that a tile has few steps: planes of the halo are brought while others are still on their way.
const Case kSparse[] = {
    {{1, {1, 1, 2}, {4, 8, 8}, kThree, kOne, kOne}, {168, 8, 1}, {1}},
    {{2, {1, 2, 2}, kFour, kThree, kOne, kOne}, {8, 168, 1}, {1, 0.5}},
};

void check_case(const Case& c, uint64_t seed, double visible, bool only_halo) {
  Random random(seed);
  // Of one set of blocks and of two.
  const bool same_blocks = visible == 1.0;
  const Problem p(c.shape, c.share, c.share, same_blocks, visible, visible, 0, random);
  // Of every case one type of 16 bits and, by turns, one more; of those for conv3d_halo, which are larger, one.
  if (!only_halo || seed % 3 == 0) check_problem<bf16>(p, c.channels, Math::kTensorCores, seed, only_halo);
  if (!only_halo && seed % 3 == 0) check_problem<fp16>(p, c.channels, Math::kTensorCores, seed, only_halo);
  if (seed % 3 == 1) check_problem<float>(p, c.channels, Math::kTensorCores, seed, only_halo);
  if (seed % 3 == 2) check_problem<float>(p, c.channels, Math::kExact, seed, only_halo);
}

}  // namespace

void test_conv3d() {
  uint64_t seed = 1;
  for (const Case& c : kCases) {
    for (const double visible : {1.0, 0.6}) check_case(c, ++seed, visible, false);
  }
}

void test_conv3d_halo() {
  uint64_t seed = 1 + 2 * std::size(kCases);
  for (const Case& c : kHaloCases) {
    for (const double visible : {1.0, 0.6}) check_case(c, ++seed, visible, true);
  }
  for (const Case& c : kSparse) {
    for (const double visible : {0.05, 0.02, 0.01}) check_case(c, ++seed, visible, true);
  }
}

}  // namespace s3d::cuda::test
