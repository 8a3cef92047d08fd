// The emulator's side of cuda/mma.cuh and cuda/cp_async.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/memory.h"
#include "emulator/number_formats.h"

namespace s3d::emulator {

enum class MmaFormat { kBf16, kFp16, kTf32 };
void mma(MmaFormat format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where);

// `matrices` of 8 x 8 elements of 16 bits: one register each, row i of matrix j at the place of lane 8 * j + i.
void ldmatrix(uint32_t* registers, int matrices, bool transposed, const SharedPlace& row, Where where);

void cp_async(const SharedPlace& to, const GlobalPlace& from, uint32_t bytes, uint32_t source_bytes, Where where);
void cp_async_commit(Where where);

}  // namespace s3d::emulator

namespace s3d::cuda {

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Where where = emulator::here());
template <>
inline void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Where where) {
  emulator::mma(emulator::MmaFormat::kBf16, d, a, b, where);
}
template <>
inline void mma<fp16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Where where) {
  emulator::mma(emulator::MmaFormat::kFp16, d, a, b, where);
}
template <>
inline void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Where where) {
  emulator::mma(emulator::MmaFormat::kTf32, d, a, b, where);
}

template <int kMatrices, typename T>
void ldmatrix(uint32_t (&registers)[kMatrices], const Shared<T>& row, emulator::Where where = emulator::here()) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "one, two or four matrices");
  emulator::ldmatrix(registers, kMatrices, false, row.place(), where);
}

template <int kMatrices, typename T>
void ldmatrix_transposed(uint32_t (&registers)[kMatrices], const Shared<T>& row,
                         emulator::Where where = emulator::here()) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "one, two or four matrices");
  emulator::ldmatrix(registers, kMatrices, true, row.place(), where);
}

inline void count_useful_flops(int64_t flops, emulator::Where where = emulator::here()) {
  emulator::running_block(where).counters().useful_flops += flops;
}

enum class Cache { kAllLevels, kL2Only };

template <int kBytes, Cache kCache = kBytes == 16 ? Cache::kL2Only : Cache::kAllLevels, typename T, typename U>
void cp_async(const Shared<T>& to, const Global<U>& from, int source_bytes = kBytes,
              emulator::Where where = emulator::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "4, 8 or 16 bytes");
  static_assert(kCache == Cache::kAllLevels || kBytes == 16, "past the L1 cache go 16 bytes only");
  emulator::cp_async(to.place(), from.place(), kBytes, static_cast<uint32_t>(source_bytes), where);
}

inline void cp_async_commit(emulator::Where where = emulator::here()) { emulator::cp_async_commit(where); }

template <int kGroups>
void cp_async_wait(emulator::Where where = emulator::here()) {
  emulator::running_block(where).land_copies(kGroups, false);
}

inline void cp_async_wait_all(emulator::Where where = emulator::here()) {
  emulator::running_block(where).land_copies(0, true);
}

}  // namespace s3d::cuda
