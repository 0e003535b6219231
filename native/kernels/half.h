// half.h: float16 and bfloat16 to float32 and back, rounding to nearest even, for scalar code.
#pragma once

#include <cstdint>
#include <cstring>

namespace argosy {

// Not std::bit_cast; all_kernels.h gives the reason.
template <class To, class From>
static inline constexpr To bit_cast(From from) {
  return __builtin_bit_cast(To, from);
}

static inline float float_from_bf16(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

static inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t((bits >> 16) | 0x40u);  // NaN stays NaN
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

static inline float float_from_f16(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bit_cast<float>(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  if (magnitude >= 0x0400u) return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = float(magnitude) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(subnormal));
}

static inline uint16_t f16_from_float(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 moves the result to the low bits of the mantissa, and the addition rounds it.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3F000000u));
  }
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
}

// FP8 E4M3 of the Open Compute Project (arXiv:2209.05433): a sign bit, four exponent bits with bias 7, three
// mantissa bits; no infinities, and NaN if all seven magnitude bits are set.
static inline float float_from_f8(uint8_t code) {
  const uint32_t sign = uint32_t(code & 0x80u) << 24;
  const uint32_t magnitude = code & 0x7Fu;
  if (magnitude == 0x7Fu) return bit_cast<float>(sign | 0x7FC00000u);
  if (magnitude >= 0x08u) return bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  return bit_cast<float>(sign | bit_cast<uint32_t>(float(magnitude) * 0x1p-9f));
}

// A code as value / 256, with 480 / 256 for NaN: without its sign, it is a float16 whose exponent has a bias
// of 15 instead of 7, subnormals included.
static inline float float_from_f8_over_256(uint8_t code) {
  return float_from_f16(uint16_t((code & 0x80u) << 8 | (code & 0x7Fu) << 7));
}

// E8M0 of the OCP Microscaling Formats (MX) Specification v1.0: 2^(code - 127); NaN if all bits are set.
static inline float float_from_e8m0(uint8_t code) {
  if (code == 0xFF) return bit_cast<float>(0x7FC00000u);
  return bit_cast<float>(code == 0 ? 0x00400000u : uint32_t(code) << 23);  // 2^-127 is subnormal
}

template <class T>
static inline T read_unaligned(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace argosy
