// The emulator's own tests. Usage: test_emulator [--speed]
#include <cstring>
#include <exception>

#include "emulator/tests/check.h"

int main(int count, char** arguments) {
  using namespace s3d::emulator::test;
  try {
    if (count > 1 && std::strcmp(arguments[1], "--speed") == 0) {
      measure();
      return 0;
    }
    test_numbers();
    test_layouts();
    test_counters();
    test_kernels();
    test_faults();
  } catch (const std::exception& error) {
    std::printf("not expected: %s\n", error.what());
    return 1;
  }
  std::printf("emulator ok\n");
  return 0;
}
