// bfloat16 and float16: memory holds them, arithmetic is in float. Conversions, of one value or of a vector of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace s3d {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type in which values of a storage type are computed.
template <typename S>
struct Computed {
  using type = S;
};
template <>
struct Computed<bfloat16> {
  using type = float;
};
template <>
struct Computed<float16> {
  using type = float;
};
template <typename S>
using computed = typename Computed<S>::type;

// Each translation unit has its own copy, compiled for its instruction set.
namespace {

template <typename To, typename From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// F is float or a vector of it, U is uint32_t or a vector of as many, the 16 bits of a value in the low half. Rounding is
// to nearest, ties to even; a NaN stays one. Floating-point steps meet no subnormal float that counts, so that results
// are the same where the processor flushes these to zero.

template <typename F, typename U>
inline F from_bfloat16(U half) {
  return same_bits<F>(half << 16);
}

template <typename U, typename F>
inline U to_bfloat16(F value) {
  const U bits = same_bits<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return value == value ? rounded : quiet;
}

// As in https://github.com/Maratyszcza/FP16: the offset of the exponent is changed by a multiplication, which keeps
// infinities and NaN; subnormals are the difference of two normal numbers.
template <typename F, typename U>
inline F from_float16(U half) {
  const U magnitude = half << 17;
  const F normal = same_bits<F>((magnitude >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const F subnormal = same_bits<F>((magnitude >> 17) | (126u << 23)) - 0.5f;
  const U bits = magnitude < (1u << 27) ? same_bits<U>(subnormal) : same_bits<U>(normal);
  return same_bits<F>(bits | (half & 0x8000u) << 16);
}

// Rounding happens in the addition of a power of two so large that the sum has as many bits left as the result.
template <typename U, typename F>
inline U to_float16(F value) {
  const U bits = same_bits<U>(value), magnitude = bits << 1, exponent = magnitude & 0xff000000u;
  const U least = U{} + 0x71000000u, nan = U{} + 0x7e00u;
  const F scaled = same_bits<F>(bits & 0x7fffffffu) * 0x1p112f * 0x1p-110f;  // infinite where the result is
  const U shift = ((exponent < least ? least : exponent) >> 1) + 0x07800000u;
  const U sum = same_bits<U>(same_bits<F>(shift) + scaled);
  const U rounded = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  return (magnitude > 0xff000000u ? nan : rounded) | ((bits >> 16) & 0x8000u);
}

// A value as it is computed, and as it is stored.
template <typename T>
inline T widen(T value) {
  return value;
}
inline float widen(bfloat16 value) { return from_bfloat16<float>(uint32_t(value.bits)); }
inline float widen(float16 value) { return from_float16<float>(uint32_t(value.bits)); }

template <typename S>
inline S narrow(computed<S> value) {
  return value;
}
template <>
inline bfloat16 narrow<bfloat16>(float value) {
  return {static_cast<uint16_t>(to_bfloat16<uint32_t>(value))};
}
template <>
inline float16 narrow<float16>(float value) {
  return {static_cast<uint16_t>(to_float16<uint32_t>(value))};
}

}  // namespace
}  // namespace s3d
