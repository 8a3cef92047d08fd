// Checks every native CPU kernel of every instruction set that this processor has against sums in double over pairs of
// voxels that are listed from dense coordinates. Needs nothing but the kernels. Usage: test_cpu [--every N] [--race]
//
// Buffers are as large as they must be, so that AddressSanitizer sees each access beyond them, and every other one
// starts off the alignment of vectors. Inputs hold NaN at masked voxels, outputs hold NaN before a kernel writes them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "tests/problem.h"

namespace s3d::cpu {
const InstructionSet& wide();  // isa_wide.cc
}

namespace {

using s3d::bfloat16;
using s3d::computed;
using s3d::float16;
using s3d::Triple;
using s3d::Window;
using s3d::cpu::InstructionSet;
using s3d::cpu::Place;
using s3d::cpu::Rows;
using s3d::cpu::Upconv;
using s3d::cpu::UpconvKernels;
using s3d::cpu::Volume;
using namespace s3d::test;

constexpr int kThreads[] = {1, 2, 3};

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), skipped_(made_++ % 2) {
    memory_ = static_cast<T*>(std::malloc((size + skipped_) * sizeof(T)));
    if (memory_ == nullptr) throw std::bad_alloc();
    std::fill_n(data(), size, s3d::narrow<T>(static_cast<computed<T>>(kNaN)));
  }
  explicit Buffer(const std::vector<double>& values) : Buffer(static_cast<int64_t>(values.size())) {
    for (int64_t i = 0; i < size_; ++i) data()[i] = s3d::narrow<T>(static_cast<computed<T>>(values[i]));
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return memory_ + skipped_; }
  const T* data() const { return memory_ + skipped_; }
  int64_t size() const { return size_; }
  bool same_bits(const Buffer& other) const { return std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0; }

 private:
  static int64_t made_;
  int64_t size_, skipped_;
  T* memory_;
};
template <typename T>
int64_t Buffer<T>::made_ = 0;

// ---- reports

struct Report {
  std::string set, type, kernel;
  int64_t problems = 0, failures = 0;
  double worst = 0;  // error by tolerance
};

std::deque<Report> reports;
int64_t complaints = 0;

Report& report(const std::string& set, const std::string& type, const std::string& kernel) {
  for (Report& r : reports) {
    if (r.set == set && r.type == type && r.kernel == kernel) return r;
  }
  reports.push_back({set, type, kernel});
  return reports.back();
}

void fail(Report& r, const std::string& problem, const std::string& what) {
  ++r.failures;
  if (++complaints > 40) return;
  std::fprintf(stderr, "%s %s %s: %s\n  %s\n", r.set.c_str(), r.type.c_str(), r.kernel.c_str(), what.c_str(),
               problem.c_str());
}

template <typename T>
const char* type_name() {
  return sizeof(T) == 4 ? "float" : sizeof(T) == 8 ? "double" : std::is_same_v<T, bfloat16> ? "bf16" : "fp16";
}

// A result and the sum of the magnitudes that were added up, which bounds its rounding; 0: it must be exact.
struct Expected {
  explicit Expected(int64_t size = 0) : value(size), magnitude(size) {}
  void add(int64_t i, double term) {
    value[i] += term;
    magnitude[i] += std::abs(term);
  }
  // With what rounding leaves over (Kahan), for sums so long that the kernels, which add in parts, are more exact.
  void add_long(int64_t i, double term) {
    rest.resize(value.size());
    const double exact = term - rest[i], sum = value[i] + exact;
    rest[i] = sum - value[i] - exact;
    value[i] = sum;
    magnitude[i] += std::abs(term);
  }
  std::vector<double> value, magnitude, rest;
};

// Calls call(outputs, threads) with each number of threads and compares its outputs; `ulps` is the tolerance.
template <typename T, typename Call>
void check(Report& r, const std::string& problem, const std::vector<Expected>& expected, double ulps,
           const Call& call) {
  ++r.problems;
  const double eps = std::numeric_limits<computed<T>>::epsilon();
  std::vector<std::unique_ptr<Buffer<T>>> first;
  for (int threads : kThreads) {
    std::vector<std::unique_ptr<Buffer<T>>> outputs;
    std::vector<T*> pointers;
    for (const Expected& e : expected) {
      outputs.push_back(std::make_unique<Buffer<T>>(static_cast<int64_t>(e.value.size())));
      pointers.push_back(outputs.back()->data());
    }
    call(pointers.data(), threads);
    if (first.empty()) {
      first = std::move(outputs);
      for (size_t o = 0; o < expected.size(); ++o) {
        for (int64_t i = 0; i < first[o]->size(); ++i) {
          const double got = s3d::widen(first[o]->data()[i]), want = expected[o].value[i];
          const double tolerance = ulps * eps * expected[o].magnitude[i];
          if (got == want) continue;  // also infinities
          const double error = std::abs(got - want);
          if (!(error <= tolerance)) {
            char text[200];
            std::snprintf(text, sizeof text, "output %d, element %lld: expected %.9g, got %.9g, tolerance %.2g",
                          static_cast<int>(o), static_cast<long long>(i), want, got, tolerance);
            fail(r, problem, text);
            return;
          }
          r.worst = std::max(r.worst, error / tolerance);
        }
      }
      continue;
    }
    for (size_t o = 0; o < expected.size(); ++o) {
      if (!first[o]->same_bits(*outputs[o])) {
        fail(r, problem, "output " + std::to_string(o) + " differs with " + std::to_string(threads) + " threads");
        return;
      }
    }
  }
}

// ---- convolution

std::vector<const InstructionSet*> sets;

// Winograd's method adds up what lies in other windows too: rounding is that of the largest result.
Expected blurred(Expected e, const Side* side, int64_t channels) {
  double most = 0;
  for (double m : e.magnitude) most = std::max(most, m);
  for (size_t i = 0; i < e.magnitude.size(); ++i) {
    if (side == nullptr || side->visible(static_cast<int64_t>(i) / channels)) e.magnitude[i] = most;
  }
  return e;
}

struct Convolution {
  Convolution(const Problem& p, const Channels& c, bool with_bias, Random& random)
      : p(p),
        c(c),
        x(p.source.features(random.values(p.source.size() * c.in), c.in)),
        grad(p.target.features(random.values(p.target.size() * c.out), c.out)),
        weight(random.values(c.out * (c.in / c.groups) * p.shape.kernel.volume())),
        out_bias(with_bias ? random.values(c.out) : std::vector<double>()),
        in_bias(with_bias ? random.values(c.in) : std::vector<double>()),
        y(p.target.size() * c.out),
        grad_x(p.source.size() * c.in),
        grad_weight(static_cast<int64_t>(weight.size())) {
    name = p.name + " channels " + std::to_string(c.in) + " to " + std::to_string(c.out) + " groups " +
           std::to_string(c.groups) + (with_bias ? " bias" : "");
    add_bias(p.target, out_bias, c.out, y);
    add_bias(p.source, in_bias, c.in, grad_x);
    const int64_t in_group = c.in / c.groups, out_group = c.out / c.groups, taps = p.shape.kernel.volume();
    for (const Pair& pair : p.pairs) {
      for (int64_t o = 0; o < c.out; ++o) {
        for (int64_t i = 0; i < in_group; ++i) {
          const int64_t at_y = pair.target * c.out + o, at_x = pair.source * c.in + o / out_group * in_group + i;
          const int64_t at_w = (o * in_group + i) * taps + pair.tap;
          y.add(at_y, weight[at_w] * x[at_x]);
          grad_x.add(at_x, weight[at_w] * grad[at_y]);
          grad_weight.add(at_w, grad[at_y] * x[at_x]);
        }
      }
    }
  }

  static void add_bias(const Side& side, const std::vector<double>& bias, int64_t channels, Expected& to) {
    for (int64_t i = 0; i < static_cast<int64_t>(to.value.size()) && !bias.empty(); ++i) {
      if (side.visible(i / channels)) to.add(i, bias[i % channels]);
    }
  }

  template <typename T>
  void check_all(const InstructionSet& set) const {
    const auto& kernels = std::get<s3d::cpu::Kernels<T>>(set.conv);
    const Buffer<T> x_(x), grad_(grad), weight_(weight), out_bias_(out_bias), in_bias_(in_bias);
    const T* b_out = out_bias.empty() ? nullptr : out_bias_.data();
    const T* b_in = in_bias.empty() ? nullptr : in_bias_.data();
    const auto line = [&](const char* kernel) -> Report& { return report(set.name, type_name<T>(), kernel); };
    const bool depthwise = c.groups == c.in && c.groups == c.out && c.groups > 1;
    const std::string kind = depthwise ? " depthwise" : c.groups > 1 ? " grouped" : "";
    check<T>(line(("conv3d" + kind).c_str()), name, {y}, 32, [&](T* const* out, int threads) {
      kernels.conv3d(p.forward, x_.data(), weight_.data(), b_out, out[0], c.in, c.out, c.groups, threads);
    });
    check<T>(line(("conv3d transposed" + kind).c_str()), name, {grad_x}, 32, [&](T* const* out, int threads) {
      kernels.conv3d(p.transposed, grad_.data(), weight_.data(), b_in, out[0], c.in, c.out, c.groups, threads);
    });
    check<T>(line(("conv3d_grad_weight" + kind).c_str()), name, {grad_weight}, 32, [&](T* const* out, int threads) {
      kernels.conv3d_grad_weight(p.forward, grad_.data(), x_.data(), out[0], c.in, c.out, c.groups, threads);
    });
    if (c.groups != 1 || !set.winograd_applies(p.forward)) return;
    check<T>(line("conv3d_winograd"), name, {blurred(y, &p.target, c.out)}, 32, [&](T* const* out, int threads) {
      kernels.conv3d_winograd(p.forward, x_.data(), weight_.data(), b_out, out[0], c.in, c.out, threads);
    });
    check<T>(line("conv3d_winograd transposed"), name, {blurred(grad_x, &p.source, c.in)}, 32,
             [&](T* const* out, int threads) {
               kernels.conv3d_winograd(p.transposed, grad_.data(), weight_.data(), b_in, out[0], c.in, c.out, threads);
             });
    check<T>(line("conv3d_grad_weight_winograd"), name, {blurred(grad_weight, nullptr, 1)}, 32,
             [&](T* const* out, int threads) {
               kernels.conv3d_grad_weight_winograd(p.forward, grad_.data(), x_.data(), out[0], c.in, c.out, threads);
             });
  }

  const Problem& p;
  Channels c;
  std::vector<double> x, grad, weight, out_bias, in_bias;
  Expected y, grad_x, grad_weight;
  std::string name;
};

// ---- fused up-convolution

struct Upconvolution {
  Upconvolution(const Upconv& u, bool with_bias, Random& random)
      : u(u),
        x(random.values(u.inputs())),
        grad(random.values(u.outputs())),
        weight(random.values(u.weights())),
        bias(with_bias ? random.values(u.out_channels) : std::vector<double>()),
        y(u.outputs()),
        grad_x(u.inputs()),
        grad_weight(u.weights()) {
    name = "up-convolution of " + std::to_string(u.batch) + " volumes " + text(u.shape) + " channels " +
           std::to_string(u.in_channels) + " to " + std::to_string(u.out_channels) + (with_bias ? " bias" : "");
    const Triple fine = times(u.shape, {2, 2, 2});
    for (int64_t voxel = 0; voxel < u.batch * fine.volume(); ++voxel) {
      const int64_t n = voxel / fine.volume(), z = voxel / fine.w / fine.h % fine.d, y_ = voxel / fine.w % fine.h;
      const int64_t x_ = voxel % fine.w, phase = z % 2 * 4 + y_ % 2 * 2 + x_ % 2;
      for (int64_t o = 0; o < u.out_channels && with_bias; ++o) y.add(voxel * u.out_channels + o, bias[o]);
      for (int64_t tap = 0; tap < 8; ++tap) {
        const int64_t from_z = (z + 1) / 2 - 1 + tap / 4, from_y = (y_ + 1) / 2 - 1 + tap / 2 % 2;
        const int64_t from_x = (x_ + 1) / 2 - 1 + tap % 2;
        if (from_z < 0 || from_z >= u.shape.d || from_y < 0 || from_y >= u.shape.h || from_x < 0) continue;
        if (from_x >= u.shape.w) continue;
        const int64_t from = ((n * u.shape.d + from_z) * u.shape.h + from_y) * u.shape.w + from_x;
        for (int64_t o = 0; o < u.out_channels; ++o) {
          for (int64_t i = 0; i < u.in_channels; ++i) {
            const int64_t at_y = voxel * u.out_channels + o, at_x = from * u.in_channels + i;
            const int64_t at_w = ((phase * u.out_channels + o) * u.in_channels + i) * 8 + tap;
            y.add(at_y, weight[at_w] * x[at_x]);
            grad_x.add(at_x, weight[at_w] * grad[at_y]);
            grad_weight.add(at_w, grad[at_y] * x[at_x]);
          }
        }
      }
    }
  }

  template <typename T>
  void check_all(const InstructionSet& set) const {
    const auto& kernels = std::get<UpconvKernels<T>>(set.upconv);
    const Buffer<T> x_(x), grad_(grad), weight_(weight), bias_(bias);
    const T* b = bias.empty() ? nullptr : bias_.data();
    const auto line = [&](const char* kernel) -> Report& { return report(set.name, type_name<T>(), kernel); };
    check<T>(line("upconv3d"), name, {blurred(y, nullptr, 1)}, 32, [&](T* const* out, int threads) {
      kernels.upconv3d(u, x_.data(), weight_.data(), b, out[0], threads);
    });
    check<T>(line("upconv3d_grad_input"), name, {blurred(grad_x, nullptr, 1)}, 32, [&](T* const* out, int threads) {
      kernels.grad_input(u, grad_.data(), weight_.data(), out[0], threads);
    });
    check<T>(line("upconv3d_grad_weight"), name, {blurred(grad_weight, nullptr, 1)}, 32, [&](T* const* out, int threads) {
      kernels.grad_weight(u, grad_.data(), x_.data(), out[0], threads);
    });
  }

  Upconv u;
  std::vector<double> x, grad, weight, bias;
  Expected y, grad_x, grad_weight;
  std::string name;
};

// ---- half precision: what the kernels for float give on the same values, rounded

template <typename S>
std::vector<double> exact_in(std::vector<double> values) {
  for (double& v : values) v = static_cast<double>(s3d::widen(s3d::narrow<S>(static_cast<computed<S>>(v))));
  return values;
}

template <typename S>
struct Both {
  explicit Both(const std::vector<double>& values) : half(values), wide(exact_in<S>(values)) {}
  Buffer<S> half;
  Buffer<float> wide;
};

// Compares `size` values in S and `table` values in float: half(S*, float*, threads) and wide(float*, float*).
template <typename S, typename Half, typename Wide>
void check_half(const InstructionSet& set, const char* kernel, const std::string& problem, int64_t size, int64_t table,
                const Half& half, const Wide& wide) {
  Report& r = report(set.name, type_name<S>(), kernel);
  ++r.problems;
  Buffer<float> values(size), expected_table(table);
  Buffer<S> expected(size);
  wide(values.data(), expected_table.data());
  for (int64_t i = 0; i < size; ++i) expected.data()[i] = s3d::narrow<S>(values.data()[i]);
  for (int threads : kThreads) {
    Buffer<S> got(size);
    Buffer<float> got_table(table);
    half(got.data(), got_table.data(), threads);
    if (!got.same_bits(expected) || !got_table.same_bits(expected_table)) {
      fail(r, problem, "differs from what is computed in float, with " + std::to_string(threads) + " threads");
      return;
    }
  }
}

template <typename S>
void check_half_convolution(const InstructionSet& set, const Problem& p, const Channels& c, uint64_t seed) {
  Random random(seed);
  const auto& halves = std::get<s3d::cpu::Kernels<S>>(set.conv);
  const auto& floats = std::get<s3d::cpu::Kernels<float>>(set.conv);
  const int64_t inputs = p.source.size() * c.in, outputs = p.target.size() * c.out;
  const int64_t weights = c.out * (c.in / c.groups) * p.shape.kernel.volume();
  const Both<S> x(p.source.features(random.values(inputs), c.in)), g(p.target.features(random.values(outputs), c.out));
  const Both<S> w(random.values(weights)), b(random.values(c.out));
  const std::string name = p.name + " channels " + std::to_string(c.in) + " to " + std::to_string(c.out) + " groups " +
                           std::to_string(c.groups);
  check_half<S>(
      set, "conv3d", name, outputs, 0,
      [&](S* out, float*, int threads) {
        halves.conv3d(p.forward, x.half.data(), w.half.data(), b.half.data(), out, c.in, c.out, c.groups, threads);
      },
      [&](float* out, float*) {
        floats.conv3d(p.forward, x.wide.data(), w.wide.data(), b.wide.data(), out, c.in, c.out, c.groups, 1);
      });
  check_half<S>(
      set, "conv3d transposed", name, inputs, 0,
      [&](S* out, float*, int threads) {
        halves.conv3d(p.transposed, g.half.data(), w.half.data(), nullptr, out, c.in, c.out, c.groups, threads);
      },
      [&](float* out, float*) {
        floats.conv3d(p.transposed, g.wide.data(), w.wide.data(), nullptr, out, c.in, c.out, c.groups, 1);
      });
  check_half<S>(
      set, "conv3d_grad_weight", name, weights, 0,
      [&](S* out, float*, int threads) {
        halves.conv3d_grad_weight(p.forward, g.half.data(), x.half.data(), out, c.in, c.out, c.groups, threads);
      },
      [&](float* out, float*) {
        floats.conv3d_grad_weight(p.forward, g.wide.data(), x.wide.data(), out, c.in, c.out, c.groups, 1);
      });
  if (c.groups != 1 || !set.winograd_applies(p.forward)) return;
  check_half<S>(
      set, "conv3d_winograd", name, outputs, 0,
      [&](S* out, float*, int threads) {
        halves.conv3d_winograd(p.forward, x.half.data(), w.half.data(), b.half.data(), out, c.in, c.out, threads);
      },
      [&](float* out, float*) {
        floats.conv3d_winograd(p.forward, x.wide.data(), w.wide.data(), b.wide.data(), out, c.in, c.out, 1);
      });
  check_half<S>(
      set, "conv3d_grad_weight_winograd", name, weights, 0,
      [&](S* out, float*, int threads) {
        halves.conv3d_grad_weight_winograd(p.forward, g.half.data(), x.half.data(), out, c.in, c.out, threads);
      },
      [&](float* out, float*) {
        floats.conv3d_grad_weight_winograd(p.forward, g.wide.data(), x.wide.data(), out, c.in, c.out, 1);
      });
}

template <typename S>
void check_half_upconvolution(const InstructionSet& set, const Upconvolution& c) {
  const Upconv& u = c.u;
  const auto& halves = std::get<UpconvKernels<S>>(set.upconv);
  const auto& floats = std::get<UpconvKernels<float>>(set.upconv);
  const Both<S> x(c.x), g(c.grad), w(c.weight), b(c.bias);
  const bool biased = !c.bias.empty();
  check_half<S>(
      set, "upconv3d", c.name, u.outputs(), 0,
      [&](S* out, float*, int threads) {
        halves.upconv3d(u, x.half.data(), w.half.data(), biased ? b.half.data() : nullptr, out, threads);
      },
      [&](float* out, float*) {
        floats.upconv3d(u, x.wide.data(), w.wide.data(), biased ? b.wide.data() : nullptr, out, 1);
      });
  check_half<S>(
      set, "upconv3d_grad_input", c.name, u.inputs(), 0,
      [&](S* out, float*, int threads) { halves.grad_input(u, g.half.data(), w.half.data(), out, threads); },
      [&](float* out, float*) { floats.grad_input(u, g.wide.data(), w.wide.data(), out, 1); });
  check_half<S>(
      set, "upconv3d_grad_weight", c.name, u.weights(), 0,
      [&](S* out, float*, int threads) { halves.grad_weight(u, g.half.data(), x.half.data(), out, threads); },
      [&](float* out, float*) { floats.grad_weight(u, g.wide.data(), x.wide.data(), out, 1); });
}

template <typename S>
void check_half_pooling(const InstructionSet& set, const Problem& p, const Triple& volume, int64_t channels,
                        int64_t divisor, uint64_t seed) {
  Random random(seed);
  const auto& halves = std::get<s3d::cpu::PoolKernels<S>>(set.pool);
  const auto& floats = std::get<s3d::cpu::PoolKernels<float>>(set.pool);
  const int64_t inputs = p.source.size() * channels, outputs = p.target.size() * channels;
  const Both<S> x(p.source.features(random.coarse(inputs), channels));
  const Both<S> g(p.target.features(random.values(outputs), channels));
  const Place place = {p.target.layout.index.data(), volume};
  const std::string name = p.name + " channels " + std::to_string(channels);
  check_half<S>(
      set, "average", name, outputs, 0,
      [&](S* out, float*, int n) { halves.average(p.forward, place, x.half.data(), out, channels, divisor, n); },
      [&](float* out, float*) { floats.average(p.forward, place, x.wide.data(), out, channels, divisor, 1); });
  check_half<S>(
      set, "average_grad", name, inputs, 0,
      [&](S* out, float*, int n) {
        halves.average_grad(p.forward, p.transposed, place, g.half.data(), out, channels, divisor, n);
      },
      [&](float* out, float*) {
        floats.average_grad(p.forward, p.transposed, place, g.wide.data(), out, channels, divisor, 1);
      });
  std::vector<int32_t> winners(outputs, -2), wanted(outputs, -2);
  check_half<S>(
      set, "maximum", name, outputs, 0,
      [&](S* out, float*, int n) {
        halves.maximum(p.forward, place, x.half.data(), out, winners.data(), channels, n);
      },
      [&](float* out, float*) {
        floats.maximum(p.forward, place, x.wide.data(), out, wanted.data(), channels, 1);
      });
  if (winners != wanted) fail(report(set.name, type_name<S>(), "maximum"), name, "other winners");
  check_half<S>(
      set, "maximum_grad", name, inputs, 0,
      [&](S* out, float*, int n) { halves.maximum_grad(p.transposed, wanted.data(), g.half.data(), out, channels, n); },
      [&](float* out, float*) { floats.maximum_grad(p.transposed, wanted.data(), g.wide.data(), out, channels, 1); });
}

template <typename S>
void check_half_norm(const InstructionSet& set, const Side& side, int64_t channels, uint64_t seed) {
  Random random(seed);
  const auto& halves = std::get<s3d::cpu::NormKernels<S>>(set.norm);
  const auto& floats = std::get<s3d::cpu::NormKernels<float>>(set.norm);
  const int64_t samples = side.layout.batch, size = side.size() * channels, table = samples * channels;
  const Rows rows = {samples, side.layout.offsets.data(), side.block.volume(), side.voxels()};
  const auto drawn = [&] { return side.features(random.values(size), channels); };
  const Both<S> x(drawn()), g(drawn()), y(drawn());
  const Buffer<float> mean(random.values(table)), rstd(random.values(table)), scale(random.values(table)),
      shift(random.values(table)), tilt(random.values(table));
  const float *m = mean.data(), *d = rstd.data(), *a = scale.data(), *b = shift.data(), *t = tilt.data();
  const std::string name = std::to_string(samples) + " samples, " + std::to_string(side.layout.rows) + " blocks " +
                           text(side.block) + (side.voxels() ? " masked" : "") + " channels " +
                           std::to_string(channels);
  check_half<S>(
      set, "norm statistics", name, 0, 2 * table,
      [&](S*, float* out, int n) { halves.statistics(rows, x.half.data(), out, out + table, channels, n); },
      [&](float*, float* out) { floats.statistics(rows, x.wide.data(), out, out + table, channels, 1); });
  for (const bool add : {false, true}) {
    check_half<S>(
        set, "norm apply", name, size, 0,
        [&](S* out, float*, int n) {
          halves.apply(rows, x.half.data(), m, a, b, add ? y.half.data() : nullptr, 0.1f, out, channels, n);
        },
        [&](float* out, float*) {
          floats.apply(rows, x.wide.data(), m, a, b, add ? y.wide.data() : nullptr, 0.1f, out, channels, 1);
        });
  }
  for (int kind = 0; kind < 3; ++kind) {
    const bool before = kind > 0, by_y = kind > 1;
    const float slope = before ? 0.1f : 1;
    check_half<S>(
        set, "norm grad_sums", name, before ? size : 0, 2 * table,
        [&](S* out, float* sums, int n) {
          halves.grad_sums(rows, g.half.data(), x.half.data(), by_y ? y.half.data() : nullptr, m, d, a, b, slope,
                           before ? out : nullptr, sums, sums + table, channels, n);
        },
        [&](float* out, float* sums) {
          floats.grad_sums(rows, g.wide.data(), x.wide.data(), by_y ? y.wide.data() : nullptr, m, d, a, b, slope,
                           before ? out : nullptr, sums, sums + table, channels, 1);
        });
  }
  check_half<S>(
      set, "norm grad_input", name, size, 0,
      [&](S* out, float*, int n) {
        halves.grad_input(rows, g.half.data(), x.half.data(), m, d, a, b, t, out, channels, n);
      },
      [&](float* out, float*) {
        floats.grad_input(rows, g.wide.data(), x.wide.data(), m, d, a, b, t, out, channels, 1);
      });
  check_half<S>(
      set, "channel_sums", name, channels, 0,
      [&](S* out, float*, int n) { halves.channel_sums(rows, x.half.data(), out, channels, n); },
      [&](float* out, float*) { floats.channel_sums(rows, x.wide.data(), out, channels, 1); });
}

// The value of finite bits, by the definition of the format.
double value_of(uint32_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, offset = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  return std::ldexp(mantissa + (exponent > 0 ? 1 << mantissa_bits : 0), std::max(exponent, 1) - offset - mantissa_bits);
}

// Each value of S widened; each value, the middle to the next one and the floats beside that rounded. In lines of
// `length` channels: short ones are converted one by one, long ones as vectors.
template <typename S>
void check_conversions(const InstructionSet& set, int64_t length) {
  const auto& kernels = std::get<s3d::cpu::NormKernels<S>>(set.norm);
  Report& r = report(set.name, type_name<S>(), "conversions");
  ++r.problems;
  const int exponent_bits = std::is_same_v<S, bfloat16> ? 8 : 5;
  const uint32_t infinite = 0x8000u - (1u << (15 - exponent_bits));
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<std::pair<double, uint16_t>> values;  // and their bits
  for (uint32_t bits = 0; bits <= infinite; ++bits) values.push_back({value_of(bits, exponent_bits), bits});
  // Infinity stands where the next value would lie, so the last middle is as the others.
  std::vector<std::pair<float, uint16_t>> rounded;
  for (uint32_t bits = 0; bits < infinite; ++bits) {
    const float low = static_cast<float>(values[bits].first);
    const double sum = values[bits].first + values[bits + 1].first;
    const float middle = static_cast<float>(sum / 2);
    rounded.push_back({low, bits});
    rounded.push_back({std::nextafter(middle, 0.0f), bits});
    rounded.push_back({middle, bits + bits % 2});
    rounded.push_back({std::nextafter(middle, std::numeric_limits<float>::infinity()), bits + 1});
  }
  values.back().first = kInfinity;
  rounded.push_back({std::numeric_limits<float>::infinity(), infinite});
  rounded.push_back({std::numeric_limits<float>::max(), infinite});
  for (uint32_t bits = infinite + 1; bits < 0x8000u; ++bits) values.push_back({kNaN, bits});
  const auto both_signs = [&](auto& all) {
    for (size_t i = 0, size = all.size(); i < size; ++i) all.push_back({-all[i].first, all[i].second | 0x8000u});
    while (all.size() % length != 0) all.push_back({0, 0});
  };
  both_signs(values);
  both_signs(rounded);

  // One voxel. Its gradient's sums are the gradient; -0 + shift is the shift.
  const int32_t offsets[2] = {0, 1};
  const Rows rows = {1, offsets, 1, nullptr};
  const Buffer<float> zeros(std::vector<double>(length, 0)), ones(std::vector<double>(length, 1));
  const float *zero = zeros.data(), *one = ones.data();
  const Buffer<S> minus_zeros(std::vector<double>(length, -0.0));
  const auto complain = [&](const char* what, double from, unsigned got) {
    char text[100];
    std::snprintf(text, sizeof text, "%s %.9g gave bits %x", what, from, got);
    fail(r, "lines of " + std::to_string(length), text);
  };
  Buffer<S> line(length), out(length);
  Buffer<float> shift(length), sums(length), products(length);
  for (size_t first = 0; first < values.size(); first += length) {
    for (int64_t i = 0; i < length; ++i) line.data()[i].bits = values[first + i].second;
    kernels.grad_sums(rows, line.data(), minus_zeros.data(), nullptr, zero, zero, zero, zero, 1, nullptr, sums.data(),
                      products.data(), length, 1);
    for (int64_t i = 0; i < length; ++i) {
      const double want = values[first + i].first, got = sums.data()[i];
      if (got == want || (std::isnan(want) && std::isnan(got))) continue;
      complain("widening to", want, values[first + i].second);
    }
    kernels.apply(rows, line.data(), zero, one, zero, minus_zeros.data(), 1, out.data(), length, 1);
    for (int64_t i = 0; i < length; ++i) {
      const double want = values[first + i].first;
      if (std::isnan(want) && !std::isnan(s3d::widen(out.data()[i]))) complain("NaN", want, out.data()[i].bits);
    }
  }
  for (size_t first = 0; first < rounded.size(); first += length) {
    for (int64_t i = 0; i < length; ++i) shift.data()[i] = rounded[first + i].first;
    kernels.apply(rows, minus_zeros.data(), zero, one, shift.data(), nullptr, 1, out.data(), length, 1);
    for (int64_t i = 0; i < length; ++i) {
      const uint16_t got = out.data()[i].bits;
      if (got != rounded[first + i].second) complain("rounding", rounded[first + i].first, got);
    }
  }
}

// ---- all types and instruction sets

void check_convolution(const Problem& p, const Channels& c, Random& random) {
  const Convolution convolution(p, c, random.chance(0.5), random);
  const uint64_t seed = static_cast<uint64_t>(random.below(1 << 30));
  for (const InstructionSet* set : sets) {
    convolution.check_all<float>(*set);
    convolution.check_all<double>(*set);
    check_half_convolution<bfloat16>(*set, p, c, seed);
    check_half_convolution<float16>(*set, p, c, seed);
  }
}

// ---- tables

void check_tables(const Problem& p) {
  Report& reverse = report("any", "int", "reverse_table");
  ++reverse.problems;
  const std::vector<int32_t> wanted = neighbour_table(p.source.layout, p.target.layout, p.forward.radius);
  if (p.reversed != wanted) fail(reverse, p.name, "differs from the neighbours of the source blocks");
  Report& far = report("any", "int", "windows beyond the table");
  Window near = p.forward;
  near.radius = {0, 0, 0};
  if (p.forward.radius.volume() == 0 || p.shape.padding.d == 0) return;
  ++far.problems;
  try {
    const s3d::Locator locator(near);
    fail(far, p.name, "are not refused");
  } catch (const std::invalid_argument&) {
  }
}

// ---- pooling

template <typename T>
void check_pooling_of(const InstructionSet& set, const Problem& p, const Triple& volume, int64_t channels,
                      int64_t divisor, uint64_t seed) {
  const auto& kernels = std::get<s3d::cpu::PoolKernels<T>>(set.pool);
  Random random(seed);
  const int64_t inputs = p.source.size(), outputs = p.target.size();
  const std::vector<double> x = p.source.features(random.values(inputs * channels), channels);
  const std::vector<double> coarse = p.source.features(random.coarse(inputs * channels), channels);  // has equal ones
  const std::vector<double> grad = p.target.features(random.values(outputs * channels), channels);
  const Place place = {p.target.layout.index.data(), volume};
  const std::string name = p.name + " volume " + text(volume) + " channels " + std::to_string(channels) + " divisor " +
                           std::to_string(divisor);
  std::vector<int64_t> counts(outputs, 0);
  const auto inside = [&](int64_t z, int64_t y, int64_t x_) {
    return z >= 0 && z < volume.d && y >= 0 && y < volume.h && x_ >= 0 && x_ < volume.w;
  };
  p.each_tap([&](int64_t voxel, int64_t, int64_t, int64_t z, int64_t y, int64_t x_) {
    counts[voxel] += inside(z, y, x_);
  });
  const auto divides = [&](int64_t voxel) {
    return static_cast<double>(divisor > 0 ? divisor : std::max<int64_t>(1, counts[voxel]));
  };
  Expected mean(outputs * channels), most(outputs * channels);
  Expected mean_grad(inputs * channels), max_grad(inputs * channels);
  for (const Pair& pair : p.pairs) {
    for (int64_t c = 0; c < channels; ++c) {
      mean.add(pair.target * channels + c, x[pair.source * channels + c] / divides(pair.target));
      mean_grad.add(pair.source * channels + c, grad[pair.target * channels + c] / divides(pair.target));
    }
  }
  std::vector<int32_t> winners(outputs * channels, -1);
  for (int64_t i = 0; i < outputs * channels; ++i) {
    if (p.target.visible(i / channels)) most.value[i] = -std::numeric_limits<double>::infinity();
  }
  std::vector<int64_t> from(outputs * channels, -1);
  p.each_tap([&](int64_t voxel, int64_t tap, int64_t n, int64_t z, int64_t y, int64_t x_) {
    if (!inside(z, y, x_)) return;
    const int64_t other = p.source.at(n, z, y, x_);
    for (int64_t c = 0; c < channels; ++c) {
      const double value = other < 0 ? 0 : coarse[other * channels + c];
      const int64_t i = voxel * channels + c;
      if (value <= most.value[i]) continue;
      most.value[i] = value;
      winners[i] = other < 0 ? -1 : static_cast<int32_t>(tap);
      from[i] = other < 0 ? -1 : other * channels + c;
    }
  });
  for (int64_t i = 0; i < outputs * channels; ++i) {
    if (from[i] >= 0) max_grad.add(from[i], grad[i]);
  }

  const Buffer<T> x_(x), coarse_(coarse), grad_(grad);
  const auto line = [&](const char* kernel) -> Report& { return report(set.name, type_name<T>(), kernel); };
  check<T>(line("average"), name, {mean}, 32, [&](T* const* out, int threads) {
    kernels.average(p.forward, place, x_.data(), out[0], channels, divisor, threads);
  });
  check<T>(line("average_grad"), name, {mean_grad}, 32, [&](T* const* out, int threads) {
    kernels.average_grad(p.forward, p.transposed, place, grad_.data(), out[0], channels, divisor, threads);
  });
  Report& maximum = line("maximum");
  check<T>(maximum, name, {most}, 0, [&](T* const* out, int threads) {
    kernels.maximum(p.forward, place, coarse_.data(), out[0], nullptr, channels, threads);
  });
  check<T>(maximum, name, {most}, 0, [&](T* const* out, int threads) {
    std::vector<int32_t> found(winners.size(), -2);
    kernels.maximum(p.forward, place, coarse_.data(), out[0], found.data(), channels, threads);
    if (found != winners) fail(maximum, name, "other winners");
  });
  check<T>(line("maximum_grad"), name, {max_grad}, 32, [&](T* const* out, int threads) {
    kernels.maximum_grad(p.transposed, winners.data(), grad_.data(), out[0], channels, threads);
  });
}

void check_pooling(Problem& p, const Triple& volume, int64_t channels, int64_t divisor, Random& random) {
  const uint64_t seed = static_cast<uint64_t>(random.below(1 << 30));
  for (const InstructionSet* set : sets) {
    check_pooling_of<float>(*set, p, volume, channels, divisor, seed);
    check_pooling_of<double>(*set, p, volume, channels, divisor, seed);
    check_half_pooling<bfloat16>(*set, p, volume, channels, divisor, seed);
    check_half_pooling<float16>(*set, p, volume, channels, divisor, seed);
  }
}

// ---- blocks of a dense volume

template <typename T>
void check_blocks_of(const Side& side, const Triple& shape, int64_t channels, uint64_t seed) {
  Random random(seed);
  const int64_t batch = side.layout.batch;
  Volume volume = {batch, channels, shape, {}};
  const int64_t sizes[5] = {batch, channels, shape.d, shape.h, shape.w};
  // Any order of the axes in memory.
  int order[5] = {0, 1, 2, 3, 4};
  for (int i = 4; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  int64_t step = 1;
  for (int axis : order) {
    volume.strides[axis] = step;
    step *= sizes[axis];
  }
  std::vector<double> dense(step, kNaN);
  Expected blocks(side.size() * channels), scattered(step);
  const std::vector<double> fill = exact_in<T>(random.values(channels));
  for (int64_t i = 0; i < step; ++i) scattered.value[i] = fill[i % channels];
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t z = 0; z < shape.d; ++z) {
      for (int64_t y = 0; y < shape.h; ++y) {
        for (int64_t x = 0; x < shape.w; ++x) {
          const int64_t voxel = side.at(n, z, y, x), at[5] = {n, 0, z, y, x};
          for (int64_t c = 0; c < channels && voxel >= 0; ++c) {
            int64_t place = c * volume.strides[1];
            for (int i = 0; i < 5; ++i) place += at[i] * volume.strides[i];
            const double value = exact_in<T>({random.value()})[0];
            dense[place] = blocks.value[voxel * channels + c] = value;
            scattered.value[(((n * shape.d + z) * shape.h + y) * shape.w + x) * channels + c] = value;
          }
        }
      }
    }
  }
  const std::string name = "batch " + std::to_string(batch) + " block " + text(side.block) + " shape " + text(shape) +
                           " rows " + std::to_string(side.layout.rows) + " channels " + std::to_string(channels);
  const int64_t rows = side.layout.rows;
  const int32_t* index = side.layout.index.data();
  const Buffer<T> dense_(dense), fill_(fill), blocks_(side.features(blocks.value, channels));
  check<T>(report("any", type_name<T>(), "gather"), name, {blocks}, 0, [&](T* const* out, int threads) {
    s3d::cpu::gather<T>(dense_.data(), volume, index, side.voxels(), side.block, rows, out[0], threads);
  });
  check<T>(report("any", type_name<T>(), "scatter"), name, {scattered}, 0, [&](T* const* out, int threads) {
    s3d::cpu::scatter<T>(blocks_.data(), fill_.data(), volume, index, side.voxels(), side.block, rows, out[0], threads);
  });
}

// ---- norm

template <typename T>
void check_norm_of(const InstructionSet& set, const Side& side, int64_t channels, uint64_t seed) {
  Random random(seed);
  const int64_t samples = side.layout.batch, size = side.size(), table = samples * channels;
  const Rows rows = {samples, side.layout.offsets.data(), side.block.volume(), side.voxels()};
  const auto& kernels = std::get<s3d::cpu::NormKernels<T>>(set.norm);
  std::vector<double> drawn = random.values(size * channels);
  for (int64_t i = 0; i < size * channels; ++i) drawn[i] += static_cast<double>(i % channels % 5);
  const std::vector<double> x = side.features(drawn, channels);
  // The sign of the affine is exact for these.
  const std::vector<double> coarse = side.features(random.coarse(size * channels), channels);
  const std::vector<double> residual = side.features(random.coarse(size * channels), channels);
  const std::vector<double> grad = side.features(random.values(size * channels), channels);
  const std::vector<double> mean = random.coarse(table), scale = random.coarse(table), shift = random.coarse(table);
  const std::vector<double> rstd = random.values(table), offset = random.values(table), tilt = random.values(table);
  const T slope = static_cast<T>(0.125);
  const std::string name = std::to_string(samples) + " samples, " + std::to_string(side.layout.rows) + " blocks " +
                           text(side.block) + (side.voxels() ? " masked" : "") + " channels " +
                           std::to_string(channels);

  // calls use(sample's row of a table, element) for visible voxels.
  const auto each = [&](const auto& use) {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t v = side.layout.offsets[n] * rows.block; v < side.layout.offsets[n + 1] * rows.block; ++v) {
        for (int64_t c = 0; c < channels && side.visible(v); ++c) use(n * channels + c, v * channels + c);
      }
    }
  };
  Expected means(table), squares(table), sums(channels);
  std::vector<double> count(table);
  each([&](int64_t t, int64_t i) {
    ++count[t];
    means.add_long(t, x[i]);
    sums.add_long(i % channels, x[i]);
  });
  for (int64_t t = 0; t < table; ++t) {
    means.value[t] /= std::max(1.0, count[t]);
    means.magnitude[t] /= std::max(1.0, count[t]);
  }
  each([&](int64_t t, int64_t i) { squares.add_long(t, (x[i] - means.value[t]) * (x[i] - means.value[t])); });

  Expected y(size * channels), z(size * channels), grad_x(size * channels);
  const auto affine = [&](int64_t t, int64_t i) { return (coarse[i] - mean[t]) * scale[t] + shift[t]; };
  const auto leaky = [&](double value) { return value > 0 ? value : value * static_cast<double>(slope); };
  each([&](int64_t t, int64_t i) {
    y.value[i] = leaky(affine(t, i));
    z.value[i] = leaky(affine(t, i) + residual[i]);
    grad_x.add(i, scale[t] * grad[i]);
    grad_x.add(i, -offset[t]);
    grad_x.add(i, -tilt[t] * (coarse[i] - mean[t]) * rstd[t]);
  });
  // of_grad, of_product and before, where the sign is 1 everywhere, that of z, or that of the affine.
  std::vector<Expected> of[3];
  for (int kind = 0; kind < 3; ++kind) {
    of[kind] = {Expected(table), Expected(table), Expected(size * channels)};
    each([&](int64_t t, int64_t i) {
      const bool positive = kind == 0 || (kind == 1 ? z.value[i] : affine(t, i)) > 0;
      const double before = positive ? grad[i] : grad[i] * static_cast<double>(slope);
      of[kind][0].add_long(t, before);
      of[kind][1].add_long(t, before * (coarse[i] - mean[t]) * rstd[t]);
      of[kind][2].value[i] = before;
    });
  }
  of[0].pop_back();

  const Buffer<T> x_(x), coarse_(coarse), residual_(residual), grad_(grad), mean_(mean), scale_(scale), shift_(shift),
      rstd_(rstd), offset_(offset), tilt_(tilt), z_(side.features(z.value, channels));
  const auto line = [&](const char* kernel) -> Report& { return report(set.name, type_name<T>(), kernel); };
  // Up to 4096 squares are added one after the other.
  check<T>(line("norm statistics"), name, {means, squares}, 64, [&](T* const* out, int threads) {
    kernels.statistics(rows, x_.data(), out[0], out[1], channels, threads);
  });
  for (const bool add : {false, true}) {
    const char* kernel = add ? "norm apply, residual" : "norm apply";
    check<T>(line(kernel), name, {add ? z : y}, 0, [&](T* const* out, int threads) {
      kernels.apply(rows, coarse_.data(), mean_.data(), scale_.data(), shift_.data(), add ? residual_.data() : nullptr,
                    slope, out[0], channels, threads);
    });
  }
  const char* names[3] = {"norm grad_sums", "norm grad_sums, sign of y", "norm grad_sums, sign of x"};
  for (int kind = 0; kind < 3; ++kind) {
    check<T>(line(names[kind]), name, of[kind], 32, [&](T* const* out, int threads) {
      kernels.grad_sums(rows, grad_.data(), coarse_.data(), kind == 1 ? z_.data() : nullptr, mean_.data(), rstd_.data(),
                        scale_.data(), shift_.data(), kind == 0 ? T(1) : slope, kind == 0 ? nullptr : out[2], out[0],
                        out[1], channels, threads);
    });
  }
  check<T>(line("norm grad_input"), name, {grad_x}, 32, [&](T* const* out, int threads) {
    kernels.grad_input(rows, grad_.data(), coarse_.data(), mean_.data(), rstd_.data(), scale_.data(), offset_.data(),
                       tilt_.data(), out[0], channels, threads);
  });
  check<T>(line("channel_sums"), name, {sums}, 32, [&](T* const* out, int threads) {
    kernels.channel_sums(rows, x_.data(), out[0], channels, threads);
  });
}

// ---- all problems

const Channels kChannels[] = {{1, 1, 1},  {3, 17, 1}, {4, 6, 2},    {17, 33, 1}, {33, 33, 33}, {33, 3, 1},
                              {16, 8, 1}, {1, 33, 1}, {34, 66, 2},  {12, 18, 3}, {50, 1, 1},   {3, 3, 3}};

void check_windows(int64_t every) {
  const Triple blocks[] = {{1, 1, 1}, {2, 2, 2}, {4, 4, 4}, {5, 5, 5}, {6, 6, 6}, {2, 4, 6}, {1, 4, 5}, {2, 3, 1}};
  const Triple kernels[] = {{3, 3, 3}, {1, 1, 1}, {2, 2, 2}, {5, 5, 5}, {1, 3, 3}};
  const Triple strides[] = {{1, 1, 1}, {2, 2, 2}, {1, 2, 2}};
  constexpr int64_t all = sizeof kChannels / sizeof kChannels[0];
  int64_t number = 0;
  for (const Triple& block : blocks) {
    for (const Triple& kernel : kernels) {
      for (const Triple& stride : strides) {
        if (block.d % stride.d || block.h % stride.h || block.w % stride.w) continue;
        const bool winograd = kernel.volume() == 27 && stride.volume() == 1;
        for (int repeat = 0; repeat < (winograd ? 6 : 3); ++repeat) {
          if (number++ % every) continue;
          Random random(static_cast<uint64_t>(number));
          Shape s = {3, {1 + random.below(3), 1 + random.below(3), 1 + random.below(4)}, block, kernel, stride, {}};
          while (s.grid.volume() * block.volume() > 700 && s.grid.volume() > 1) {
            s.grid = {(s.grid.d + 1) / 2, (s.grid.h + 1) / 2, (s.grid.w + 1) / 2};
          }
          const auto pad = [&](int64_t k) { return winograd || random.chance(0.7) ? (k - 1) / 2 : random.below(k); };
          s.padding = {pad(kernel.d), pad(kernel.h), pad(kernel.w)};
          const int64_t kind = random.below(8);
          const double few = kind == 0 ? 0 : 0.3, many = kind == 0 ? 0 : kind < 3 ? 1 : 0.8;
          const double source_voxels = random.chance(0.5) ? 1 : 0.5, target_voxels = random.chance(0.5) ? 1 : 0.5;
          Problem p(s, {many, 0, few}, {few, many, 0.5}, kind < 6, source_voxels, target_voxels, kind == 5, random);
          check_tables(p);
          check_convolution(p, kChannels[number % all], random);
          const int64_t channels = kChannels[random.below(all)].in;
          check_pooling(p, times(s.grid, block), channels, random.chance(0.5) ? kernel.volume() : 0, random);
          // Blocks at the far faces that reach beyond the volume.
          const Triple full = times(s.grid, block);
          const Triple less = {full.d - random.below(block.d), full.h - random.below(block.h),
                               full.w - random.below(block.w)};
          Problem q(s, {many, 0, few}, {few, many, 0.5}, kind < 6, 0.8, target_voxels, 0, random);
          q.source.cut(less);
          q.forward.gathered_voxels = q.transposed.written_voxels = q.source.voxels();
          q.pairs.clear();
          q.list_pairs();
          check_pooling(q, less, channels, random.chance(0.5) ? kernel.volume() : 0, random);
          const uint64_t seed = static_cast<uint64_t>(random.below(1 << 30));
          for (const Problem* either : {&p, &q}) {
            check_blocks_of<float>(either->source, either == &p ? full : less, channels, seed);
            check_blocks_of<double>(either->source, either == &p ? full : less, channels, seed);
            check_blocks_of<bfloat16>(either->source, either == &p ? full : less, channels, seed);
            check_blocks_of<float16>(either->source, either == &p ? full : less, channels, seed);
          }
        }
      }
    }
  }
}

// Enough voxels for many tiles, chunks and parts.
void check_large_windows() {
  Random random(1);
  const Triple one = {1, 1, 1}, two = {2, 2, 2}, three = {3, 3, 3};
  const Problem dense({1, {5, 5, 6}, {4, 4, 4}, three, one, one}, {1}, {}, true, 1, 1, 0, random);
  check_convolution(dense, {3, 5, 1}, random);
  check_convolution(dense, {3, 3, 3}, random);
  const Problem sparse({2, {4, 4, 4}, {2, 4, 6}, three, one, one}, {0.9, 0.3}, {}, true, 0.5, 0.5, 0, random);
  check_convolution(sparse, {17, 33, 1}, random);
  check_convolution(sparse, {6, 4, 2}, random);
  const Problem strided({1, {4, 5, 5}, {6, 6, 6}, two, two, {}}, {0.8}, {}, true, 1, 1, 0, random);
  check_convolution(strided, {3, 18, 1}, random);
}

// Tiles of 3x3x3 hang over the border or do not; few of them, and enough for several groups.
void check_upconvolutions(int64_t every) {
  const Upconv problems[] = {{1, {13, 11, 10}, 34, 20}, {1, {1, 1, 1}, 1, 1},    {2, {1, 2, 3}, 3, 5},
                             {1, {3, 6, 3}, 17, 33},    {2, {2, 4, 5}, 6, 50},   {1, {4, 3, 2}, 66, 3},
                             {1, {7, 5, 8}, 20, 18},    {3, {4, 1, 2}, 1, 33},   {2, {2, 3, 3}, 34, 64},
                             {0, {2, 2, 2}, 3, 4}};
  constexpr int64_t all = sizeof problems / sizeof problems[0];
  Random random(3);
  for (int64_t i = 0; i < all; i += every) {
    const Upconvolution upconvolution(problems[i], random.chance(0.5), random);
    for (const InstructionSet* set : sets) {
      upconvolution.check_all<float>(*set);
      upconvolution.check_all<double>(*set);
      check_half_upconvolution<bfloat16>(*set, upconvolution);
      check_half_upconvolution<float16>(*set, upconvolution);
    }
  }
}

void check_norms() {
  struct Case {
    std::vector<double> share;
    Triple grid, block;
    double voxels;
  };
  const Case cases[] = {{{0.5, 0, 1}, {2, 2, 2}, {4, 4, 4}, 1},   {{0.2, 0.9}, {2, 2, 3}, {5, 5, 5}, 0.5},
                        {{0, 0}, {2, 2, 2}, {2, 2, 2}, 1},        {{1}, {1, 1, 1}, {1, 1, 1}, 1},
                        {{0.6, 0.1}, {4, 4, 4}, {6, 6, 6}, 1},    {{0.5, 0.5}, {2, 3, 4}, {1, 2, 3}, 0.1},
                        {{}, {1, 1, 1}, {2, 2, 2}, 1},            {{1, 0.5}, {3, 3, 3}, {2, 4, 6}, 0.7}};
  Random random(2);
  for (const Case& c : cases) {
    const Side side(Layout(static_cast<int64_t>(c.share.size()), c.grid, c.share, random), c.block, c.voxels, random);
    for (int64_t channels : {1, 3, 17, 33}) {
      const uint64_t seed = static_cast<uint64_t>(random.below(1 << 30));
      for (const InstructionSet* set : sets) {
        check_norm_of<float>(*set, side, channels, seed);
        check_norm_of<double>(*set, side, channels, seed);
        check_half_norm<bfloat16>(*set, side, channels, seed);
        check_half_norm<float16>(*set, side, channels, seed);
      }
    }
  }
}

// What ThreadSanitizer must find; run.sh asks for it to know that it would find one in the kernels.
int race() {
  volatile int shared = 0;
#pragma omp parallel for num_threads(2) schedule(static)
  for (int i = 0; i < 1000; ++i) shared = shared + 1;
  std::printf("%d of 1000 after a race\n", static_cast<int>(shared));
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  int64_t every = 1;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--race") return race();
    if (argument == "--every" && i + 1 < count) {
      every = std::max(1, std::atoi(arguments[++i]));
    } else {
      std::fprintf(stderr, "unknown argument %s\n", argument.c_str());
      return 2;
    }
  }
  const InstructionSet* const known[] = {
      &s3d::cpu::generic(),
#ifdef __x86_64__
      &s3d::cpu::avx2(), &s3d::cpu::avx512(),
#endif
      &s3d::cpu::wide()};
  for (const InstructionSet* set : known) {
    if (set->supported()) {
      sets.push_back(set);
    } else {
      std::printf("%-8s not on this processor\n", set->name);
    }
  }
  check_windows(every);
  if (every == 1) check_large_windows();
  check_upconvolutions(every);
  check_norms();
  for (const InstructionSet* set : sets) {
    for (const int64_t length : {3, 64}) {
      check_conversions<bfloat16>(*set, length);
      check_conversions<float16>(*set, length);
    }
  }
  int64_t failures = 0;
  for (const Report& r : reports) {
    failures += r.failures;
    std::printf("%-8s %-6s %-33s %5lld problems, error %3.0f %% of the tolerance  %s\n", r.set.c_str(), r.type.c_str(),
                r.kernel.c_str(), static_cast<long long>(r.problems), 100 * r.worst,
                r.failures ? ("FAILED " + std::to_string(r.failures)).c_str() : "ok");
  }
  std::printf(failures ? "%lld failures\n" : "all good\n", static_cast<long long>(failures));
  return failures ? 1 : 0;
}
