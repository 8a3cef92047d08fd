// What tests/kernels/test_cuda_build.py compiles with nvcc.
#include "emulator/tests/gemm.cuh"

namespace s3d::cuda::test {

template void gemm<bf16>(const bf16*, const bf16*, float*, int, int, int, cudaStream_t);
template void gemm<fp16>(const fp16*, const fp16*, float*, int, int, int, cudaStream_t);
template void gemm<float>(const float*, const float*, float*, int, int, int, cudaStream_t);

}  // namespace s3d::cuda::test
