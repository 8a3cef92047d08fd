// bfloat16, half and TF32 by their bits, rounded as CUDA rounds them.
#pragma once

#include <cstdint>
#include <cstring>

namespace s3d::emulator {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline bool is_nan(uint32_t bits) { return (bits & 0x7FFFFFFF) > 0x7F800000; }

inline float bf16_to_float(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (is_nan(bits)) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

inline float fp16_to_float(uint16_t bits) {
  // As the bits of a float the number is 2^112 times too small; the multiplication makes subnormals normal as well.
  const float magnitude = float_of(static_cast<uint32_t>(bits & 0x7FFF) << 13) * 0x1p112f;
  uint32_t result = bits_of(magnitude);
  if ((bits & 0x7C00) == 0x7C00) result |= 0x7F800000;  // infinities and NaNs
  return float_of(result | static_cast<uint32_t>(bits & 0x8000) << 16);
}

inline uint16_t float_to_fp16(float value) {
  const uint32_t bits = bits_of(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (is_nan(bits)) return 0x7FFF;
  if (magnitude >= 0x47800000) return sign | 0x7C00;  // 65536 and more
  if (magnitude < 0x38800000) {
    // Below the normal numbers: adding 0.5 makes the addition round to multiples of 2^-24.
    return sign | static_cast<uint16_t>(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
inline uint32_t float_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7F800000) == 0x7F800000) return bits;
  return (bits + 0x1000) & 0xFFFFE000;
}

}  // namespace s3d::emulator

namespace s3d::cuda {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

inline float to_float(bf16 value) { return emulator::bf16_to_float(value.bits); }
inline float to_float(fp16 value) { return emulator::fp16_to_float(value.bits); }
inline float to_float(float value) { return value; }

template <typename T>
T from_float(float value);
template <>
inline bf16 from_float<bf16>(float value) {
  return {emulator::float_to_bf16(value)};
}
template <>
inline fp16 from_float<fp16>(float value) {
  return {emulator::float_to_fp16(value)};
}
template <>
inline float from_float<float>(float value) {
  return value;
}

template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

template <typename T>
void unpack(uint32_t packed, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(packed)});
  high = to_float(T{static_cast<uint16_t>(packed >> 16)});
}

inline uint32_t to_tf32(float value) { return emulator::float_to_tf32(value); }

}  // namespace s3d::cuda
