// activations.h: one token's activations as 16-bit integers, split into two bytes, for quantised weights.
//
//   x  float32, from column 32 * group_begin on.    activations  one row of `cols`, laid out as in formats.h.
//
// A group whose largest magnitude is below 1e-33 becomes zero. A group with an infinity or a NaN gets that
// value as its scale and zeros as its quants, so every product with it is NaN.
#pragma once

#include "kernels/formats.h"
#include "kernels/half.h"

namespace argosy {
namespace {

constexpr float kSmallestGroup = 1e-33f;    // kLargestQuant divided by this is still a finite float
constexpr float kLargestQuant = 256 * 127;  // keeps the high byte within -127 to 127

// `sum` is the sum of the quants; `high_sum_0` and `high_sum_1` are the sums of their high bytes in the first
// and second half of the group.
inline void finish_activation_group(uint8_t* activations, int64_t cols, int64_t group, float absmax,
                                    int32_t sum, int32_t high_sum_0, int32_t high_sum_1) {
  const auto put = [&](int64_t at, auto value) { std::memcpy(activations + at, &value, sizeof value); };
  const float scale = absmax < kSmallestGroup ? 0.0f : absmax / 127.0f;
  const int32_t high_sum = high_sum_0 + high_sum_1;
  put(activation_scales_at(Format::q4, cols) + 4 * group, scale);
  put(activation_scales_at(Format::q8, cols) + 4 * group, scale * 0.00390625f);
  put(activation_negated_sums_at(Format::q8, cols) + 4 * group, -sum);
  put(activation_negated_sums_at(Format::q4, cols) + 4 * group, -high_sum);
  put(activation_negated_sums_at(Format::q6_k, cols) + 8 * group, -high_sum_0);
  put(activation_negated_sums_at(Format::q6_k, cols) + 8 * group + 4, -high_sum_1);
  put(activation_negated_sums_at(Format::q3_k, cols) + 4 * group, int16_t(-high_sum_0));
  put(activation_negated_sums_at(Format::q3_k, cols) + 4 * group + 2, int16_t(-high_sum_1));
  put(activation_sums_at(cols) + 4 * group, scale * float(high_sum));
}

#if !ARGOSY_VECTOR  // the reference

void quantize_activations(const float* x, int64_t cols, int64_t group_begin, int64_t group_end,
                          uint8_t* activations) {
  x -= group_begin * kGroupSize;
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t begin = group * kGroupSize;
    const int64_t n = cols - begin < kGroupSize ? cols - begin : kGroupSize;
    // Compare magnitudes as bit patterns: they sort like the numbers, with infinity and NaN on top.
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t magnitude = read_unaligned<uint32_t>(x + begin + i) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float absmax = bit_cast<float>(largest);
    const bool usable = absmax >= kSmallestGroup && largest < 0x7F800000u;
    const float inverse = usable ? kLargestQuant / absmax : 0.0f;
    int8_t high[kGroupSize] = {}, low[kGroupSize] = {};
    int16_t whole[kGroupSize] = {};
    int32_t sum = 0, high_sum[2] = {};
    for (int64_t i = 0; i < n && usable; ++i) {
      // Adding 1.5 * 2^23 leaves no bits for a fraction, so the sum rounds to nearest even.
      const int32_t quant = int32_t((x[begin + i] * inverse + 12582912.0f) - 12582912.0f);
      high[i] = int8_t((quant + 128) >> 8);
      low[i] = int8_t(quant - 256 * high[i]);
      whole[i] = int16_t(quant);
      sum += quant;
      high_sum[i / 16] += high[i];
    }
    std::memcpy(activations + begin, high, kGroupSize);
    std::memcpy(activations + activation_low_at(cols) + begin, low, kGroupSize);
    std::memcpy(activations + activation_whole_at(cols) + 2 * begin, whole, sizeof whole);
    finish_activation_group(activations, cols, group, absmax, sum, high_sum[0], high_sum[1]);
  }
}

#elif ARGOSY_AVX512

// Sums 32 signed bytes, separately for each half. Once the bytes are unsigned, one instruction sums their
// differences from zero.
inline void sum_halves(__m256i bytes, int32_t (&sums)[2]) {
  const __m256i unsigned_bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(int8_t(-128)));
  const __m256i eights = _mm256_sad_epu8(unsigned_bytes, _mm256_setzero_si256());
  const __m256i halves = _mm256_add_epi64(eights, _mm256_unpackhi_epi64(eights, eights));
  sums[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(halves)) - 16 * 128;
  sums[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(halves, 1)) - 16 * 128;
}

void quantize_activations(const float* x, int64_t cols, int64_t group_begin, int64_t group_end,
                          uint8_t* activations) {
  x -= group_begin * kGroupSize;
  const __m512i magnitude_bits = _mm512_set1_epi32(0x7FFFFFFF);
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t begin = group * kGroupSize;
    const int64_t n = cols - begin < kGroupSize ? cols - begin : kGroupSize;
    const Vec first = n >= 16 ? load(x + begin) : load(x + begin, n);
    const Vec second = n > 16 ? load(x + begin + 16, n - 16) : zeros();
    const __m512i magnitudes =
        _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(first), magnitude_bits),
                         _mm512_and_si512(_mm512_castps_si512(second), magnitude_bits));
    const int32_t largest = _mm512_reduce_max_epi32(magnitudes);
    const float absmax = bit_cast<float>(largest);
    const bool usable = absmax >= kSmallestGroup && largest < 0x7F800000;
    const Vec inverse = broadcast(usable ? kLargestQuant / absmax : 0.0f);
    // Infinity times zero is NaN, which converts to the smallest integer. The mask zeroes it with the rest of
    // an unusable group.
    const __mmask16 kept = usable ? __mmask16(0xFFFF) : __mmask16(0);
    const __m512i quants[2] = {_mm512_maskz_cvtps_epi32(kept, mul(first, inverse)),
                               _mm512_maskz_cvtps_epi32(kept, mul(second, inverse))};
    const auto high_bytes = [](__m512i quant) {
      return _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(quant, _mm512_set1_epi32(128)), 8));
    };
    const __m256i high = _mm256_set_m128i(high_bytes(quants[1]), high_bytes(quants[0]));
    // The low byte of a quant is the remainder: the high byte was rounded up where the low byte is negative.
    const __m256i low = _mm256_set_m128i(_mm512_cvtepi32_epi8(quants[1]), _mm512_cvtepi32_epi8(quants[0]));
    uint8_t* to = activations + begin;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + activation_low_at(cols)), low);
    auto* whole = reinterpret_cast<__m256i*>(activations + activation_whole_at(cols) + 2 * begin);
    _mm256_storeu_si256(whole, _mm512_cvtepi32_epi16(quants[0]));
    _mm256_storeu_si256(whole + 1, _mm512_cvtepi32_epi16(quants[1]));
    int32_t high_sum[2], low_sum[2];
    sum_halves(high, high_sum);
    sum_halves(low, low_sum);
    const int32_t sum = 256 * (high_sum[0] + high_sum[1]) + low_sum[0] + low_sum[1];
    finish_activation_group(activations, cols, group, absmax, sum, high_sum[0], high_sum[1]);
  }
}

#else  // AVX2

// Stores 32 numbers from -128 to 127 as bytes.
inline void store_as_bytes(uint8_t* to, const __m256i (&numbers)[4]) {
  // Packing works within 128-bit halves; the permutation restores the order of the columns.
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(numbers[0], numbers[1]),
                                            _mm256_packs_epi32(numbers[2], numbers[3]));
  const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), ordered);
}

inline int32_t sum_of(__m256i sums) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1));
  return _mm_cvtsi128_si32(sum);
}

void quantize_activations(const float* x, int64_t cols, int64_t group_begin, int64_t group_end,
                          uint8_t* activations) {
  x -= group_begin * kGroupSize;
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7FFFFFFF);
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t begin = group * kGroupSize;
    const int64_t n = cols - begin < kGroupSize ? cols - begin : kGroupSize;
    alignas(32) float padded[kGroupSize] = {};
    std::memcpy(padded, x + begin, size_t(n) * sizeof(float));
    Vec part[4];
    __m256i magnitudes = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
      part[i] = load(padded + 8 * i);
      magnitudes =
          _mm256_max_epi32(magnitudes, _mm256_and_si256(_mm256_castps_si256(part[i]), magnitude_bits));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(magnitudes), _mm256_extracti128_si256(magnitudes, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    const int32_t largest = _mm_cvtsi128_si32(four);
    const float absmax = bit_cast<float>(largest);
    const bool usable = absmax >= kSmallestGroup && largest < 0x7F800000;
    const Vec inverse = broadcast(usable ? kLargestQuant / absmax : 0.0f);
    const __m256i kept = _mm256_set1_epi32(usable ? -1 : 0);
    __m256i quants[4], high[4], low[4];
    for (int i = 0; i < 4; ++i) {
      quants[i] = _mm256_and_si256(kept, _mm256_cvtps_epi32(mul(part[i], inverse)));
      high[i] = _mm256_srai_epi32(_mm256_add_epi32(quants[i], _mm256_set1_epi32(128)), 8);
      low[i] = _mm256_sub_epi32(quants[i], _mm256_slli_epi32(high[i], 8));
    }
    store_as_bytes(activations + begin, high);
    store_as_bytes(activations + activation_low_at(cols) + begin, low);
    auto* whole = reinterpret_cast<__m256i*>(activations + activation_whole_at(cols) + 2 * begin);
    for (int i = 0; i < 2; ++i) {  // packing works within 128-bit halves
      const __m256i packed = _mm256_packs_epi32(quants[2 * i], quants[2 * i + 1]);
      _mm256_storeu_si256(whole + i, _mm256_permute4x64_epi64(packed, 0xD8));
    }
    const __m256i sums =
        _mm256_add_epi32(_mm256_add_epi32(quants[0], quants[1]), _mm256_add_epi32(quants[2], quants[3]));
    finish_activation_group(activations, cols, group, absmax, sum_of(sums),
                            sum_of(_mm256_add_epi32(high[0], high[1])),
                            sum_of(_mm256_add_epi32(high[2], high[3])));
  }
}

#endif

}  // namespace
}  // namespace argosy
