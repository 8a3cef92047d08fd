// Pointers to global and shared memory: plain pointers under nvcc; in the emulator every access is checked.
//
//   Global<T>, Global<const T>   made by the host from a raw pointer or null, as a kernel's parameter or part of one
//   Shared<T>                    made by one of
//     dynamic_shared<T>(byte_offset, count)   a part of the launch's dynamic shared memory, which begins at 128 bytes
//     S3D_SHARED(type, name, count);          declares `name`, a static array; at 128 bytes
//
// Both know +, -, +=, [] (to read, = and +=), comparison with nullptr, and
//     load<V>(pointer), store(pointer, value)   one access of sizeof(V) <= 16 bytes, aligned to it: load<uint4>(x + i)
//     pointer_cast<U>(pointer)                  the same address as another type
//     atomicAdd atomicMin atomicMax atomicAnd atomicOr atomicExch atomicCAS   on integers: atomicAdd(counts + i, 1)
//
// Write the type of what [] gives, `float v = x[i];`: in the emulator `auto` would be a reference that reads later.
#pragma once

#include "cuda/device.cuh"

#ifdef S3D_EMULATOR
#include "emulator/memory.h"
#else
namespace s3d::cuda {

template <typename T>
using Global = T*;
template <typename T>
using Shared = T*;

template <typename V, typename T>
__device__ __forceinline__ V load(const T* pointer) {
  return *reinterpret_cast<const V*>(pointer);
}

template <typename V, typename T>
__device__ __forceinline__ void store(T* pointer, const V& value) {
  *reinterpret_cast<V*>(pointer) = value;
}

template <typename U, typename T>
__device__ __forceinline__ U* pointer_cast(T* pointer) {
  return reinterpret_cast<U*>(pointer);
}

template <typename T>
__device__ __forceinline__ Shared<T> dynamic_shared(uint32_t byte_offset, [[maybe_unused]] uint32_t count) {
  extern __shared__ __align__(128) unsigned char s3d_dynamic_shared[];
  return reinterpret_cast<T*>(s3d_dynamic_shared + byte_offset);
}

}  // namespace s3d::cuda

#define S3D_SHARED(type, name, count)                    \
  __shared__ __align__(128) type name##_storage[count]; \
  const ::s3d::cuda::Shared<type> name = name##_storage
#endif
