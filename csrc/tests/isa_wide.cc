// The shape of the AVX-512 kernels in instructions that every processor has, so that their code is checked everywhere.
#define S3D_SET wide
#define VECTOR_BYTES 64
#define REGISTER_ROWS 12
#define S3D_SUPPORTED true
#include "cpu/kernels.inl"
