// CUDA's barriers, shuffles, votes and small functions, with CUDA's names.
//
// Stricter than the hardware: a lane named in a mask must not have exited, and all threads of a block must come to the
// same __syncthreads in the source.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/block.h"

namespace s3d::emulator {

struct Shuffle {
  uint64_t value;
  int source;
  uint64_t result;
};

struct Vote {
  bool predicate;
  uint32_t ballot;
};

void meet_to_shuffle(Warp& warp, uint32_t group);
void meet_to_vote(Warp& warp, uint32_t group);
void meet_to_sync(Warp& warp, uint32_t group);

template <typename T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "shuffles move 4 or 8 bytes");
  Shuffle exchange{0, source, 0};
  std::memcpy(&exchange.value, &value, sizeof value);
  running_block(where).meet_warp(mask, meet_to_shuffle, &exchange, where);
  std::memcpy(&value, &exchange.result, sizeof value);
  return value;
}

inline uint32_t vote(unsigned mask, bool predicate, Where where) {
  Vote ballot{predicate, 0};
  running_block(where).meet_warp(mask, meet_to_vote, &ballot, where);
  return ballot.ballot;
}

inline int lane_number(Where where) {
  running_block(where);
  return running.lane->number();
}

}  // namespace s3d::emulator

inline void __syncthreads(s3d::emulator::Where where = s3d::emulator::here()) {
  s3d::emulator::running_block(where).meet_block("__syncthreads", false, where);
}
inline int __syncthreads_count(int predicate, s3d::emulator::Where where = s3d::emulator::here()) {
  return s3d::emulator::running_block(where).meet_block("__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, s3d::emulator::Where where = s3d::emulator::here()) {
  return s3d::emulator::running_block(where).meet_block("__syncthreads_or", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, s3d::emulator::Where where = s3d::emulator::here()) {
  return s3d::emulator::running_block(where).meet_block("__syncthreads_and", predicate == 0, where) == 0;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF, s3d::emulator::Where where = s3d::emulator::here()) {
  s3d::emulator::running_block(where).meet_warp(mask, s3d::emulator::meet_to_sync, nullptr, where);
}

// A shuffle's source lies in the lane's own section of `width` lanes, or the lane keeps its value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              s3d::emulator::Where where = s3d::emulator::here()) {
  const int lane = s3d::emulator::lane_number(where);
  return s3d::emulator::shuffle(mask, value, (lane & -width) | (source & (width - 1)), where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 s3d::emulator::Where where = s3d::emulator::here()) {
  const int lane = s3d::emulator::lane_number(where);
  const int source = lane - static_cast<int>(delta);
  return s3d::emulator::shuffle(mask, value, source < (lane & -width) ? lane : source, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   s3d::emulator::Where where = s3d::emulator::here()) {
  const int lane = s3d::emulator::lane_number(where);
  const int source = lane + static_cast<int>(delta);
  return s3d::emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  s3d::emulator::Where where = s3d::emulator::here()) {
  const int lane = s3d::emulator::lane_number(where);
  const int source = lane ^ lane_mask;
  return s3d::emulator::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, s3d::emulator::Where where = s3d::emulator::here()) {
  return s3d::emulator::vote(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, s3d::emulator::Where where = s3d::emulator::here()) {
  return s3d::emulator::vote(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, s3d::emulator::Where where = s3d::emulator::here()) {
  return s3d::emulator::vote(mask, predicate == 0, where) == 0;
}

// Blocks run one after the other and a thread's writes to global memory are seen at once.
inline void __threadfence() {}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
