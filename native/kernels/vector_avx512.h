// vector_avx512.h: sixteen floats, the few operations the kernels need.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/half.h"

namespace argosy {
namespace {

using Vec = __m512;
constexpr int64_t kLanes = 16;

inline Vec zeros() { return _mm512_setzero_ps(); }
inline Vec broadcast(float value) { return _mm512_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max_or_second(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // NaN in either: b
inline Vec min_or_second(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round_to_nearest(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline __mmask16 first_lanes(int64_t n) { return __mmask16((1u << n) - 1u); }
inline Vec keep_lanes(Vec a, int64_t begin, int64_t end, float otherwise) {
  const __mmask16 kept = __mmask16(first_lanes(end) & ~first_lanes(begin));
  return _mm512_mask_blend_ps(kept, broadcast(otherwise), a);
}

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const float* from, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), from); }
inline void store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
inline void store(float* to, Vec a, int64_t n) { _mm512_mask_storeu_ps(to, first_lanes(n), a); }

struct F32Weights {
  static constexpr int64_t kBytes = 4;
  static Vec load(const uint8_t* from) { return _mm512_loadu_ps(from); }
  static Vec load(const uint8_t* from, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), from); }
};

struct F16Weights {
  static constexpr int64_t kBytes = 2;
  static Vec load(const uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vec load(const uint8_t* from, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), from));
  }
};

struct Bf16Weights {
  static constexpr int64_t kBytes = 2;
  static Vec widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static Vec load(const uint8_t* from) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vec load(const uint8_t* from, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first_lanes(n), from));
  }
};

// FP8 codes as value / 256: with the sign spread to bit 14 and cleared there, what is left is a float16 whose
// exponent has a bias of 15 instead of 7, subnormals included. NaN codes come out as 480 / 256.
inline __m256i halves_of_f8(__m128i codes) {
  const __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  return _mm256_and_si256(halves, _mm256_set1_epi16(int16_t(0xBF80)));
}
inline Vec load_f8(const uint8_t* from) {
  return _mm512_cvtph_ps(halves_of_f8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Vec load_f8(const uint8_t* from, int64_t n) {
  return _mm512_cvtph_ps(halves_of_f8(_mm_maskz_loadu_epi8(first_lanes(n), from)));
}
// The float16 of n codes, zeros behind them.
inline void halve_f8(const uint8_t* from, int64_t n, uint16_t* to) {
  const __m256i halves = halves_of_f8(_mm_maskz_loadu_epi8(first_lanes(n), from));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
// Whether one of n codes is NaN.
inline bool has_nan_code(const uint8_t* codes, int64_t n) {
  const __m512i low = _mm512_set1_epi8(0x7F);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 some = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
    largest = _mm512_max_epu8(largest, _mm512_and_si512(_mm512_maskz_loadu_epi8(some, codes + i), low));
  }
  return _mm512_cmpeq_epi8_mask(largest, low) != 0;
}

// Lanes are folded in halves: 0+8, 1+9, ..., then 0+4, ..., then 0+2, 1+3, then 0+1.
inline float sum_lanes(Vec a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Vec a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// x where a == b, `otherwise` elsewhere.
inline Vec where_equal(Vec a, Vec b, Vec x, Vec otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), otherwise, x);
}
// Takes over value and index where value > best; NaN is not.
inline void keep_greater(Vec value, Vec index, Vec& best, Vec& best_index) {
  const __mmask16 greater = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
  best = _mm512_mask_blend_ps(greater, best, value);
  best_index = _mm512_mask_blend_ps(greater, best_index, index);
}
inline Vec lane_numbers() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

}  // namespace
}  // namespace argosy
