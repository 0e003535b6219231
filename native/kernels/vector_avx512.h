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
inline Vec square_root(Vec a) { return _mm512_sqrt_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max_or_second(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // if either is NaN: b
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

// The float16 at `from`, in every lane.
inline Vec broadcast_f16(const uint8_t* from) {
  return _mm512_cvtph_ps(_mm256_set1_epi16(read_unaligned<int16_t>(from)));
}
// Signed bytes as floats.
inline Vec load_i8(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Vec load_i8(const uint8_t* from, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), from)));
}

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

// Sixteen values, and those that the codes in eight bytes choose, the high half of a byte first.
struct SixteenFloats {
  explicit SixteenFloats(const uint8_t* from) : values(F32Weights::load(from)) {}
  Vec of_nibbles(const uint8_t* codes) const {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    const __m128i in_order = _mm_unpacklo_epi8(_mm_srli_epi16(bytes, 4), bytes);
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(in_order), values);  // takes the lowest four bits
  }
  Vec values;
};

// FP8 codes as value / 256: spreading the sign to bit 14 and clearing it there leaves a float16 whose
// exponent has a bias of 15 instead of 7, subnormals included.
inline __m256i halves_of_f8(__m128i codes) {
  const __m256i halves = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);
  return _mm256_and_si256(halves, _mm256_set1_epi16(int16_t(0xBF80)));
}
inline void load_f8(const uint8_t* from, Vec (&to)[1]) {
  to[0] = _mm512_cvtph_ps(halves_of_f8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline void load_f8(const uint8_t* from, int64_t n, Vec (&to)[1]) {
  to[0] = _mm512_cvtph_ps(halves_of_f8(_mm_maskz_loadu_epi8(first_lanes(n), from)));
}

// Converting two vectors together takes fewer instructions than converting each alone.
constexpr int kF8Vecs = 2;
inline __m512i halves_of_f8(__m256i codes) {
  const __m512i halves = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7);
  return _mm512_and_si512(halves, _mm512_set1_epi16(int16_t(0xBF80)));
}
inline __m512i load_halves_of_f8(const uint8_t* from) {
  return halves_of_f8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline __m512i load_halves_of_f8(const uint8_t* from, int64_t n) {
  return halves_of_f8(_mm256_maskz_loadu_epi8(__mmask32((uint64_t{1} << n) - 1), from));
}
inline void widen_halves(__m512i halves, Vec (&to)[kF8Vecs]) {
  to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  to[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
inline void load_f8(const uint8_t* from, Vec (&to)[kF8Vecs]) { widen_halves(load_halves_of_f8(from), to); }
inline void load_f8(const uint8_t* from, int64_t n, Vec (&to)[kF8Vecs]) {
  widen_halves(load_halves_of_f8(from, n), to);
}
// The float16 of the first n codes, up to two vectors of them, with zeros after them.
inline void halve_f8(const uint8_t* from, int64_t n, uint16_t* to) {
  _mm512_storeu_si512(to, n < kF8Vecs * kLanes ? load_halves_of_f8(from, n) : load_halves_of_f8(from));
}

#if ARGOSY_VBMI

// The same values by table lookup: the two bytes of the bfloat16 of a code without its sign. `order` permutes
// 64 codes into the order in which pairs of bytes become floats.
struct F8Tables {
  uint8_t low[128], high[128], order[64];
};
constexpr F8Tables f8_tables() {
  F8Tables tables = {};
  for (int code = 0; code < 128; ++code) {
    const float value =
        float(code % 8 + (code < 8 ? 0 : 8)) * 0x1p-17f * float(1 << (code < 8 ? 0 : code / 8 - 1));
    const uint32_t bits = bit_cast<uint32_t>(value);
    tables.low[code] = uint8_t(bits >> 16);
    tables.high[code] = uint8_t(bits >> 24);
  }
  // unpacklo and unpackhi take eight pairs of bytes from each 128 bits; of these pairs, every other one.
  for (int at = 0; at < 64; ++at) {
    const int vec = at % 16 / 8 * 2 + at % 2, lane = at / 16 * 4 + at % 8 / 2;
    tables.order[at] = uint8_t(vec * kLanes + lane);
  }
  return tables;
}
alignas(64) constexpr F8Tables kF8Tables = f8_tables();

inline void look_up_f8(__m512i codes, Vec (&to)[4]) {
  const auto table = [](const uint8_t* from) { return _mm512_load_si512(from); };
  const __m512i ordered = _mm512_permutexvar_epi8(table(kF8Tables.order), codes);
  const __m512i low = _mm512_permutex2var_epi8(table(kF8Tables.low), ordered, table(kF8Tables.low + 64));
  const __m512i magnitude =
      _mm512_permutex2var_epi8(table(kF8Tables.high), ordered, table(kF8Tables.high + 64));
  // magnitude | (code & sign)
  const __m512i high = _mm512_ternarylogic_epi32(magnitude, ordered, _mm512_set1_epi8(int8_t(0x80)), 0xF8);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512i pairs = i == 0 ? _mm512_unpacklo_epi8(low, high) : _mm512_unpackhi_epi8(low, high);
    to[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    to[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xFFFF0000))));
  }
}
inline void load_f8(const uint8_t* from, Vec (&to)[4]) { look_up_f8(_mm512_loadu_si512(from), to); }
inline void load_f8(const uint8_t* from, int64_t n, Vec (&to)[4]) {
  look_up_f8(_mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, from), to);
}

#endif

// Whether any of the n codes is NaN.
inline bool has_nan_code(const uint8_t* codes, int64_t n) {
  const __m512i low = _mm512_set1_epi8(0x7F);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 some = n - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (n - i)) - 1;
    largest = _mm512_max_epu8(largest, _mm512_and_si512(_mm512_maskz_loadu_epi8(some, codes + i), low));
  }
  return _mm512_cmpeq_epi8_mask(largest, low) != 0;
}

// The 16-bit elements of both halves in turn: 0, 16, 1, 17, ...
inline __m512i interleave_halves(__m512i elements) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                         22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, elements);
}

// Folds lanes in halves: 0+8, 1+9, ..., then 0+4, ..., then 0+2, 1+3, then 0+1.
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

// row[i][j] becomes row[j][i].
inline void transpose(Vec (&row)[kLanes]) {
  Vec pair[kLanes], quad[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2) {
    pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  const auto unpack = [](Vec a, Vec b, Vec& low, Vec& high) {
    low = Vec(_mm512_unpacklo_pd(__m512d(a), __m512d(b)));
    high = Vec(_mm512_unpackhi_pd(__m512d(a), __m512d(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    unpack(pair[i], pair[i + 2], quad[i], quad[i + 1]);
    unpack(pair[i + 1], pair[i + 3], quad[i + 2], quad[i + 3]);
  }
  // The 128 bits k of quad[4 i + j] are rows 4 i to 4 i + 3 of column 4 k + j.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const Vec low_even = _mm512_shuffle_f32x4(quad[j], quad[4 + j], 0x88);
    const Vec low_odd = _mm512_shuffle_f32x4(quad[j], quad[4 + j], 0xDD);
    const Vec high_even = _mm512_shuffle_f32x4(quad[8 + j], quad[12 + j], 0x88);
    const Vec high_odd = _mm512_shuffle_f32x4(quad[8 + j], quad[12 + j], 0xDD);
    row[j] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
    row[4 + j] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    row[8 + j] = _mm512_shuffle_f32x4(low_even, high_even, 0xDD);
    row[12 + j] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xDD);
  }
}

// x where a == b, `otherwise` elsewhere.
inline Vec where_equal(Vec a, Vec b, Vec x, Vec otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ), otherwise, x);
}
// Takes value and index where value > best; never takes a NaN.
inline void keep_greater(Vec value, Vec index, Vec& best, Vec& best_index) {
  const __mmask16 greater = _mm512_cmp_ps_mask(value, best, _CMP_GT_OQ);
  best = _mm512_mask_blend_ps(greater, best, value);
  best_index = _mm512_mask_blend_ps(greater, best_index, index);
}
inline Vec lane_numbers() { return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline Vec scale_by_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

}  // namespace
}  // namespace argosy
