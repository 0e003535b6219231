// vector_avx2.h: eight floats, the few operations the kernels need.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels/half.h"

namespace argosy {
namespace {

using Vec = __m256;
constexpr int64_t kLanes = 8;

inline Vec zeros() { return _mm256_setzero_ps(); }
inline Vec broadcast(float value) { return _mm256_set1_ps(value); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec square_root(Vec a) { return _mm256_sqrt_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max_or_second(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // if either is NaN: b
inline Vec min_or_second(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round_to_nearest(Vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// In the bit patterns below, lane i is set for i < n.
inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec keep_lanes(Vec a, int64_t begin, int64_t end, float otherwise) {
  const __m256i kept = _mm256_andnot_si256(first_lanes(begin), first_lanes(end));
  return _mm256_blendv_ps(broadcast(otherwise), a, _mm256_castsi256_ps(kept));
}

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const float* from, int64_t n) { return _mm256_maskload_ps(from, first_lanes(n)); }
inline void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
inline void store(float* to, Vec a, int64_t n) { _mm256_maskstore_ps(to, first_lanes(n), a); }

struct F32Weights {
  static constexpr int64_t kBytes = 4;
  static Vec load(const uint8_t* from) { return _mm256_loadu_ps(reinterpret_cast<const float*>(from)); }
  static Vec load(const uint8_t* from, int64_t n) {
    return _mm256_maskload_ps(reinterpret_cast<const float*>(from), first_lanes(n));
  }
};

// Loads the first n of eight 16-bit values, with zeros after them.
inline __m128i load_16bit(const uint8_t* from, int64_t n) {
  uint16_t values[8] = {};
  std::memcpy(values, from, size_t(n) * 2);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
}

struct F16Weights {
  static constexpr int64_t kBytes = 2;
  static Vec load(const uint8_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vec load(const uint8_t* from, int64_t n) { return _mm256_cvtph_ps(load_16bit(from, n)); }
};

// The float16 at `from`, in every lane.
inline Vec broadcast_f16(const uint8_t* from) {
  return _mm256_cvtph_ps(_mm_set1_epi16(read_unaligned<int16_t>(from)));
}
// Signed bytes as floats.
inline Vec load_i8(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Vec load_i8(const uint8_t* from, int64_t n) {
  uint8_t values[kLanes] = {};
  std::memcpy(values, from, size_t(n));
  return load_i8(values);
}

struct Bf16Weights {
  static constexpr int64_t kBytes = 2;
  static Vec widen(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static Vec load(const uint8_t* from) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vec load(const uint8_t* from, int64_t n) { return widen(load_16bit(from, n)); }
};

// Sixteen values, and those that the codes in four bytes choose, the high half of a byte first.
struct SixteenFloats {
  explicit SixteenFloats(const uint8_t* from)
      : low(F32Weights::load(from)), high(F32Weights::load(from + 32)) {}
  Vec of_nibbles(const uint8_t* codes) const {
    const __m128i bytes = _mm_cvtsi32_si128(read_unaligned<int32_t>(codes));
    const __m128i in_order = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);
    const __m256i chosen = _mm256_cvtepu8_epi32(in_order);
    // vpermps takes the lowest three bits; the fourth becomes a sign.
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, chosen), _mm256_permutevar8x32_ps(high, chosen),
                            _mm256_castsi256_ps(_mm256_slli_epi32(chosen, 28)));
  }
  Vec low, high;
};

// FP8 codes as value / 256: spreading the sign to bit 14 and clearing it there leaves a float16 whose
// exponent has a bias of 15 instead of 7, subnormals included.
constexpr int kF8Vecs = 2;  // vectors converted to float at once
inline __m256i load_halves_of_f8(const uint8_t* from) {
  const __m256i codes = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(int16_t(0xBF80)));
}
inline void load_f8(const uint8_t* from, Vec (&to)[kF8Vecs]) {
  const __m256i halves = load_halves_of_f8(from);
  to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
  to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
}
inline void load_f8(const uint8_t* from, int64_t n, Vec (&to)[kF8Vecs]) {
  uint8_t codes[kF8Vecs * kLanes] = {};
  std::memcpy(codes, from, size_t(n));
  load_f8(codes, to);
}
// The float16 of the first n codes, up to two vectors of them, with zeros after them.
inline void halve_f8(const uint8_t* from, int64_t n, uint16_t* to) {
  uint8_t codes[kF8Vecs * kLanes] = {};
  if (n < kF8Vecs * kLanes) from = static_cast<const uint8_t*>(std::memcpy(codes, from, size_t(n)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), load_halves_of_f8(from));
}
// Whether any of the n codes is NaN.
inline bool has_nan_code(const uint8_t* codes, int64_t n) {
  const __m256i low = _mm256_set1_epi8(0x7F);
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i magnitudes =
        _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)), low);
    largest = _mm256_max_epu8(largest, magnitudes);
  }
  bool found = _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, low)) != 0;
  for (; i < n; ++i) found |= (codes[i] & 0x7F) == 0x7F;
  return found;
}

// Folds lanes in halves: 0+4, 1+5, ..., then 0+2, 1+3, then 0+1.
inline float sum_lanes(Vec a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_lanes(Vec a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// row[i][j] becomes row[j][i].
inline void transpose(Vec (&row)[kLanes]) {
  Vec quad[kLanes];
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {
    const auto unpack = [](Vec a, Vec b, Vec& low, Vec& high) {
      low = Vec(_mm256_unpacklo_pd(__m256d(a), __m256d(b)));
      high = Vec(_mm256_unpackhi_pd(__m256d(a), __m256d(b)));
    };
    unpack(_mm256_unpacklo_ps(row[i], row[i + 1]), _mm256_unpacklo_ps(row[i + 2], row[i + 3]), quad[i],
           quad[i + 1]);
    unpack(_mm256_unpackhi_ps(row[i], row[i + 1]), _mm256_unpackhi_ps(row[i + 2], row[i + 3]), quad[i + 2],
           quad[i + 3]);
  }
  // The 128 bits k of quad[4 i + j] are rows 4 i to 4 i + 3 of column 4 k + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    row[j] = _mm256_permute2f128_ps(quad[j], quad[4 + j], 0x20);
    row[4 + j] = _mm256_permute2f128_ps(quad[j], quad[4 + j], 0x31);
  }
}

// x where a == b, `otherwise` elsewhere.
inline Vec where_equal(Vec a, Vec b, Vec x, Vec otherwise) {
  return _mm256_blendv_ps(otherwise, x, _mm256_cmp_ps(a, b, _CMP_EQ_OQ));
}
// Takes value and index where value > best; never takes a NaN.
inline void keep_greater(Vec value, Vec index, Vec& best, Vec& best_index) {
  const Vec greater = _mm256_cmp_ps(value, best, _CMP_GT_OQ);
  best = _mm256_blendv_ps(best, value, greater);
  best_index = _mm256_blendv_ps(best_index, index, greater);
}
inline Vec lane_numbers() { return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7); }

// a * 2^n for whole n from -250 to 250, in two steps so that 2^n need not be a float.
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(exponent, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i second = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, half), bias), 23);
  return mul(mul(a, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
}

}  // namespace
}  // namespace argosy
