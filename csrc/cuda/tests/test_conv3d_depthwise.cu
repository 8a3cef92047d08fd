// Convolution of each channel by itself, forward and its gradients: every kind of window, odd numbers of channels.
#include "cuda/tests/convolution.h"

namespace s3d::cuda::test {
namespace {

template <typename T>
void check(const Problem& p, int64_t count, uint64_t seed) {
  constexpr Math kMath = Math::kExact;  // of sums in float of whatever type
  Random random(seed);
  const bool with_bias = random.chance(0.5);
  Convolution<T> conv(p, {count, count, count}, kMath, with_bias, random);
  const Tolerance allowed = tolerance<T>(kMath);
  CHECK(conv3d_depthwise_applies(p.forward, conv.channels));
  CHECK(conv3d_depthwise_applies(p.transposed, conv.channels));
  emulator::take_launches();
  check_result<T>("conv3d_depthwise " + conv.name, conv.y, allowed, [&](T* written) {
    conv3d_depthwise<T>(p.forward, conv.channels, conv.x.device.data(), conv.weight.device.data(),
                        data_or_null(conv.out_bias), written, nullptr);
  });
  check_launches("conv3d_depthwise", conv.useful_flops, true);
  check_result<T>("conv3d_depthwise transposed " + conv.name, conv.grad_x, allowed, [&](T* written) {
    conv3d_depthwise<T>(p.transposed, conv.channels, conv.grad.device.data(), conv.weight.device.data(),
                        data_or_null(conv.in_bias), written, nullptr);
  });
  check_launches("conv3d_depthwise", conv.useful_flops, true);
  check_result<T>("conv3d_depthwise_grad_weight " + conv.name, conv.grad_weight, allowed, [&](T* written) {
    PartialSums partial(conv3d_depthwise_grad_weight_partial_sums(p.forward, conv.channels));
    conv3d_depthwise_grad_weight<T>(p.forward, conv.channels, conv.grad.device.data(), conv.x.device.data(),
                                    partial.data(), written, nullptr);
  });
  check_launches("conv3d_depthwise_grad_weight", conv.useful_flops, true);
}

struct Case {
  Shape shape;
  int64_t channels;
  std::vector<double> share;  // of the blocks of each sample
};

constexpr Triple kNone = {0, 0, 0}, kOne = {1, 1, 1}, kTwo = {2, 2, 2}, kThree = {3, 3, 3}, kFour = {4, 4, 4},
                 kFive = {5, 5, 5}, kEight = {8, 8, 8};

const Case kCases[] = {
    {{1, {2, 2, 2}, kEight, kThree, kOne, kOne}, 32, {0.6}},
    {{2, {2, 2, 2}, kFour, kThree, kOne, kOne}, 40, {0.6, 0.4}},
    {{2, {2, 2, 3}, kFour, kThree, kOne, kOne}, 8, {0.6, 0.2}},
    {{1, {2, 3, 2}, kFour, kThree, kOne, kOne}, 33, {0.7}},
    {{2, {3, 2, 2}, kTwo, kThree, kOne, kOne}, 12, {0.7, 0}},
    {{1, {5, 4, 4}, kOne, kThree, kOne, kOne}, 72, {0.5}},
    {{2, {1, 2, 2}, {4, 6, 8}, {1, 3, 3}, kOne, {0, 1, 1}}, 7, {0.8, 0.4}},
    {{1, {2, 2, 2}, {3, 5, 4}, kThree, kOne, kOne}, 3, {0.8}},
    {{2, {2, 2, 2}, kFour, kThree, kTwo, kOne}, 16, {0.6, 0.8}},
    {{1, {2, 2, 3}, kEight, kTwo, kTwo, kNone}, 1, {0.5}},
    {{1, {3, 3, 3}, {2, 4, 4}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}}, 24, {0.6}},
    {{1, {2, 2, 2}, kFour, kFive, kOne, kTwo}, 8, {0.7}},
    {{2, {2, 2, 2}, kFour, kOne, kOne, kNone}, 24, {0.5, 1}},
    // Several parts of the gradient of the weight, the last of which is shorter.
    {{1, {3, 3, 3}, {4, 8, 8}, {1, 1, 2}, kOne, kNone}, 8, {0.9}},
    {{2, {2, 2, 2}, kTwo, kThree, kOne, kOne}, 8, {0, 0}},
};

void check_case(const Case& c, uint64_t seed, double visible) {
  Random random(seed);
  // Of one set of blocks and of two.
  const Problem p(c.shape, c.share, c.share, visible == 1.0, visible, visible, 0, random);
  check<float>(p, c.channels, seed);
  if (seed % 2 == 0) {
    check<bf16>(p, c.channels, seed);
  } else {
    check<fp16>(p, c.channels, seed);
  }
}

void test_limits() {
  Window window{};
  window.written_rows = window.gathered_rows = 1;
  window.written_block = window.gathered_block = {32, 32, 32};
  window.stride = kOne;
  window.kernel = {7, 7, 7};
  CHECK(conv3d_depthwise_applies(window, {320, 320, 320}));
  CHECK(!conv3d_depthwise_applies(window, {320, 640, 320}));
  CHECK(!conv3d_depthwise_applies(window, {320, 320, 160}));
  window.kernel = {11, 11, 11};
  CHECK(!conv3d_depthwise_applies(window, {320, 320, 320}));
}

}  // namespace

void test_conv3d_depthwise() {
  test_limits();
  uint64_t seed = 1;
  for (const Case& c : kCases) {
    for (const double visible : {1.0, 0.6}) check_case(c, ++seed, visible);
  }
}

}  // namespace s3d::cuda::test
