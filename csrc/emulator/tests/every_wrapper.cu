// What tests/kernels/test_cuda_build.py compiles with nvcc.
#include "emulator/tests/every_wrapper.cuh"

namespace s3d::cuda::test {

template void every_wrapper<bf16>(const bf16*, const float*, int*, float*, cudaStream_t);
template void every_wrapper<fp16>(const fp16*, const float*, int*, float*, cudaStream_t);

}  // namespace s3d::cuda::test
