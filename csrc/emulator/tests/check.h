// What the emulator's tests are written with.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "emulator/launch.h"

namespace s3d::emulator::test {

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::printf("%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);      \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

#define CHECK_EQUAL(value, expected)                                                                     \
  do {                                                                                                   \
    const long long is = static_cast<long long>(value), wanted = static_cast<long long>(expected);       \
    if (is != wanted) {                                                                                  \
      std::printf("%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #value, is, wanted);              \
      std::exit(1);                                                                                      \
    }                                                                                                    \
  } while (false)

// Memory that kernels may reach.
template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t size, std::string name = "buffer")
      : values_(size), registered_(values_.data(), size * sizeof(T), std::move(name)) {}
  T* data() { return values_.data(); }
  T& operator[](size_t i) { return values_[i]; }
  size_t size() const { return values_.size(); }
  int64_t bytes_read() const { return registered_.bytes_read(); }

 private:
  std::vector<T> values_;
  RegisteredBuffer registered_;
};

inline Counters counters_of(const std::function<void()>& launch) {
  take_launches();
  launch();
  const std::vector<LaunchRecord> launches = take_launches();
  CHECK_EQUAL(launches.size(), 1);
  return launches[0].counters;
}

// Every seed must end in one of these faults, told with all of `parts`.
inline void expect_fault(const char* what, const std::vector<FaultKind>& kinds, const std::vector<std::string>& parts,
                         const std::function<void()>& launch) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    set_options({seed, true});
    bool found = false;
    try {
      launch();
    } catch (const Fault& fault) {
      found = true;
      const std::string text = fault.what();
      bool right = std::count(kinds.begin(), kinds.end(), fault.kind) > 0;
      for (const std::string& part : parts) right = right && text.find(part) != std::string::npos;
      if (!right) {
        std::printf("%s: another fault: %s\n", what, fault.what());
        std::exit(1);
      }
      if (seed == 0) std::printf("  %s: %s\n", what, fault.what());
    }
    if (!found) {
      std::printf("%s: not found with seed %d\n", what, static_cast<int>(seed));
      std::exit(1);
    }
  }
  set_options({});
}

void test_layouts();
void test_numbers();
void test_counters();
void test_kernels();
void test_faults();
void measure();

}  // namespace s3d::emulator::test
