// Any processor: vectors of 16 bytes are SSE2 on x86-64, NEON on aarch64, and scalar code elsewhere.
#define S3D_SET generic
#define VECTOR_BYTES 16
#ifdef __aarch64__
#define REGISTER_ROWS 12
#else
#define REGISTER_ROWS 6
#endif
#define S3D_SUPPORTED true
#include "cpu/kernels.inl"
