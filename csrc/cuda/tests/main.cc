// The CUDA kernels, run by the emulator, against sums in double. Usage: test_cuda [--count]
#include <cstdio>
#include <cstring>
#include <exception>

#include "cuda/tests/results.h"

int main(int argument_count, char** arguments) {
  try {
    if (argument_count > 1 && std::strcmp(arguments[1], "--count") == 0) {
      s3d::cuda::test::count();
      return 0;
    }
    s3d::cuda::test::test_table();
    s3d::cuda::test::test_blocks();
    s3d::cuda::test::test_norm();
    s3d::cuda::test::test_pool();
    s3d::cuda::test::test_conv3d_stem();
    s3d::cuda::test::test_conv3d_depthwise();
    s3d::cuda::test::test_conv3d();
    s3d::cuda::test::test_conv3d_fused();
  } catch (const std::exception& error) {
    std::printf("not expected: %s\n", error.what());
    return 1;
  }
  std::printf("cuda kernels ok\n");
  return 0;
}
