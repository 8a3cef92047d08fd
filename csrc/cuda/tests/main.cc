// The CUDA kernels, run by the emulator, against sums in double. Usage: test_cuda [--count | --list | TEST...]
#include <cstdio>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "cuda/tests/results.h"

int main(int argument_count, char** arguments) {
  using namespace s3d::cuda::test;
  const std::vector<std::pair<std::string, void (*)()>> tests = {
      // What takes longest comes first, for those who run several at once.
      {"conv3d", test_conv3d}, {"conv3d_halo", test_conv3d_halo}, {"conv3d_stem", test_conv3d_stem},
      {"conv3d_depthwise", test_conv3d_depthwise}, {"conv3d_fused", test_conv3d_fused}, {"norm", test_norm},
      {"blocks", test_blocks}, {"pool", test_pool}, {"table", test_table},
  };
  const std::vector<std::string> given(arguments + 1, arguments + argument_count);
  try {
    if (given == std::vector<std::string>{"--count"}) {
      count();
      return 0;
    }
    if (given == std::vector<std::string>{"--list"}) {
      for (const auto& test : tests) std::printf("%s\n", test.first.c_str());
      return 0;
    }
    size_t found = 0;
    for (const auto& [name, test] : tests) {
      bool chosen = given.empty();
      for (const std::string& other : given) chosen = chosen || other == name;
      if (!chosen) continue;
      ++found;
      test();
    }
    if (!given.empty() && found != given.size()) {
      std::printf("test_cuda has no such test; test_cuda --list names them\n");
      return 1;
    }
  } catch (const std::exception& error) {
    std::printf("not expected: %s\n", error.what());
    return 1;
  }
  std::printf("cuda kernels ok\n");
  return 0;
}
