// The CUDA kernels, run by the emulator, against sums in double. Usage: test_cuda
#include <cstdio>
#include <exception>

#include "cuda/tests/results.h"

int main() {
  try {
    s3d::cuda::test::test_table();
    s3d::cuda::test::test_blocks();
    s3d::cuda::test::test_norm();
    s3d::cuda::test::test_pool();
    s3d::cuda::test::test_conv3d();
    s3d::cuda::test::test_conv3d_fused();
  } catch (const std::exception& error) {
    std::printf("not expected: %s\n", error.what());
    return 1;
  }
  std::printf("cuda kernels ok\n");
  return 0;
}
