// Convolution of few gathered channels and the gradient of its weight: every kind of window, 1 to 4 channels, the
// transposed window of a head.
#include "cuda/tests/convolution.h"

namespace s3d::cuda::test {
namespace {

template <typename T>
void check(const Problem& p, const Channels& c, Math math, uint64_t seed) {
  Random random(seed);
  const bool with_bias = random.chance(0.5);
  Convolution<T> conv(p, c, math, with_bias, random);
  const Tolerance allowed = tolerance<T>(math);
  CHECK_EQUAL(conv3d_stem_applies(p.forward, conv.channels), c.in <= 4 && c.groups == 1);
  CHECK_EQUAL(conv3d_stem_applies(p.transposed, conv.channels), c.out <= 4 && c.groups == 1);
  emulator::take_launches();
  if (conv3d_stem_applies(p.forward, conv.channels)) {
    check_result<T>("conv3d_stem " + conv.name, conv.y, allowed, [&](T* written) {
      conv3d_stem<T>(p.forward, conv.channels, math, conv.x.device.data(), conv.weight.device.data(),
                     data_or_null(conv.out_bias), written, nullptr);
    });
    check_launches("conv3d_stem", conv.useful_flops, true);
    check_result<T>("conv3d_stem_grad_weight " + conv.name, conv.grad_weight, allowed, [&](T* written) {
      PartialSums partial(conv3d_stem_grad_weight_partial_sums<T>(p.forward, conv.channels));
      conv3d_stem_grad_weight<T>(p.forward, conv.channels, math, conv.grad.device.data(), conv.x.device.data(),
                                 partial.data(), written, nullptr);
    });
    check_launches("conv3d_stem_grad_weight", conv.useful_flops, true);
  }
  if (conv3d_stem_applies(p.transposed, conv.channels)) {
    check_result<T>("conv3d_stem transposed " + conv.name, conv.grad_x, allowed, [&](T* written) {
      conv3d_stem<T>(p.transposed, conv.channels, math, conv.grad.device.data(), conv.weight.device.data(),
                     data_or_null(conv.in_bias), written, nullptr);
    });
    check_launches("conv3d_stem", conv.useful_flops, true);
  }
}

struct Case {
  Shape shape;
  Channels channels;
  std::vector<double> share;  // of the blocks of each sample
};

constexpr Triple kNone = {0, 0, 0}, kOne = {1, 1, 1}, kTwo = {2, 2, 2}, kThree = {3, 3, 3}, kFour = {4, 4, 4},
                 kFive = {5, 5, 5}, kSeven = {7, 7, 7}, kEight = {8, 8, 8};

const Case kCases[] = {
    {{1, {2, 2, 2}, kEight, kThree, kOne, kOne}, {1, 32, 1}, {0.6}},
    {{2, {2, 2, 2}, kFour, kThree, kOne, kOne}, {2, 40, 1}, {0.6, 0.4}},
    {{2, {2, 2, 3}, kFour, kThree, kOne, kOne}, {3, 7, 1}, {0.6, 0.2}},
    {{1, {2, 3, 2}, kFour, kThree, kOne, kOne}, {4, 64, 1}, {0.7}},
    {{2, {3, 2, 2}, kTwo, kThree, kOne, kOne}, {1, 70, 1}, {0.7, 0}},
    {{1, {5, 4, 4}, kOne, kThree, kOne, kOne}, {2, 33, 1}, {0.5}},
    {{2, {1, 2, 2}, {4, 6, 8}, {1, 3, 3}, kOne, {0, 1, 1}}, {1, 16, 1}, {0.8, 0.4}},
    {{1, {2, 2, 2}, {3, 5, 4}, kThree, kOne, kOne}, {3, 24, 1}, {0.8}},
    {{2, {2, 2, 2}, kFour, kThree, kTwo, kOne}, {1, 32, 1}, {0.6, 0.8}},
    {{1, {2, 2, 3}, kEight, kTwo, kTwo, kNone}, {4, 8, 1}, {0.5}},
    {{1, {3, 3, 3}, {2, 4, 4}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}}, {2, 33, 1}, {0.6}},
    {{1, {2, 2, 2}, kFour, kFive, kOne, kTwo}, {1, 48, 1}, {0.7}},
    {{1, {2, 2, 2}, kTwo, kFive, kOne, kTwo}, {2, 9, 1}, {0.8}},
    {{1, {2, 2, 1}, kFour, kSeven, kOne, kThree}, {1, 32, 1}, {0.8}},
    {{2, {2, 2, 2}, kFour, kOne, kOne, kNone}, {4, 32, 1}, {0.5, 1}},
    // Heads: the gradient of the input gathers few channels.
    {{1, {2, 2, 2}, kFour, kOne, kOne, kNone}, {32, 4, 1}, {0.8}},
    {{1, {2, 2, 2}, kFour, kThree, kOne, kOne}, {40, 3, 1}, {0.8}},
    {{2, {2, 2, 2}, kFour, kThree, kTwo, kOne}, {72, 2, 1}, {0.7, 0.4}},
    {{1, {2, 2, 3}, {8, 8, 4}, kTwo, kTwo, kNone}, {16, 1, 1}, {0.5}},
    {{1, {2, 2, 2}, kFour, kThree, kOne, kOne}, {4, 4, 1}, {0.8}},
    // Several parts of the gradient of the weight, the last of which is shorter.
    {{1, {3, 3, 3}, {4, 8, 8}, {1, 1, 2}, kOne, kNone}, {1, 8, 1}, {0.9}},
    {{2, {2, 2, 2}, kTwo, kThree, kOne, kOne}, {1, 8, 1}, {0, 0}},
};

void check_case(const Case& c, uint64_t seed, double visible) {
  Random random(seed);
  // Of one set of blocks and of two.
  const Problem p(c.shape, c.share, c.share, visible == 1.0, visible, visible, 0, random);
  check<bf16>(p, c.channels, Math::kTensorCores, seed);
  if (seed % 3 == 0) check<fp16>(p, c.channels, Math::kTensorCores, seed);
  if (seed % 3 == 1) check<float>(p, c.channels, Math::kTensorCores, seed);
  if (seed % 3 == 2) check<float>(p, c.channels, Math::kExact, seed);
}

// What does not fit shared memory is left to other kernels; nor are groups or five channels for this one.
void test_limits() {
  Window window{};
  window.written_rows = window.gathered_rows = 1;
  window.written_block = window.gathered_block = {32, 32, 32};
  window.stride = kOne;
  window.kernel = kThree;
  CHECK(conv3d_stem_applies(window, {4, 320, 1}));
  CHECK(!conv3d_stem_applies(window, {5, 32, 1}));
  CHECK(!conv3d_stem_applies(window, {4, 32, 2}));
  window.kernel = kSeven;
  CHECK(conv3d_stem_applies(window, {1, 64, 1}));
  CHECK(!conv3d_stem_applies(window, {4, 64, 1}));
  window.kernel = kThree;
  window.written_block = {1, 4096, 4096};
  CHECK(!conv3d_stem_applies(window, {1, 32, 1}));
}

// Of 16 bytes in all places there are no bank conflicts, whatever the type.
template <typename T>
void test_conflicts(Math math) {
  Random random(1);
  const Problem p({1, {1, 1, 1}, {8, 8, 32}, kThree, kOne, kOne}, {1}, {1}, true, 1, 1, 0, random);
  for (const int64_t in : {1, 2, 4}) {
    for (const int64_t out : {32, 64}) {
      Convolution<T> conv(p, {in, out, 1}, math, false, random);
      DeviceBuffer<T> y(p.target.size() * out), grad_weight(conv.weight.read.size());
      emulator::take_launches();
      conv3d_stem<T>(p.forward, conv.channels, math, conv.x.device.data(), conv.weight.device.data(), nullptr, y.data(),
                     nullptr);
      CHECK_EQUAL(check_launches("conv3d_stem", conv.useful_flops, false), 1);
      PartialSums partial(conv3d_stem_grad_weight_partial_sums<T>(p.forward, conv.channels));
      conv3d_stem_grad_weight<T>(p.forward, conv.channels, math, conv.grad.device.data(), conv.x.device.data(),
                                 partial.data(), grad_weight.data(), nullptr);
      CHECK_EQUAL(check_launches("conv3d_stem_grad_weight", conv.useful_flops, false), 1);
    }
  }
}

}  // namespace

void test_conv3d_stem() {
  test_limits();
  uint64_t seed = 1;
  for (const Case& c : kCases) {
    for (const double visible : {1.0, 0.6}) check_case(c, ++seed, visible);
  }
  test_conflicts<bf16>(Math::kTensorCores);
  test_conflicts<float>(Math::kTensorCores);
  test_conflicts<float>(Math::kExact);
}

}  // namespace s3d::cuda::test
