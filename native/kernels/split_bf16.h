// split_bf16.h: float32 numbers as sums of two bfloat16, for products of tiles (amx.h).
//
// The high part is the number rounded to bfloat16, and the low part is the rest, rounded again. Together they
// keep 16 bits of a float32 and all 11 of a float16. A part below the smallest normal number is zero.
#pragma once

#include "kernels/vector_avx512.h"

namespace argosy {
namespace {

// Tiles of high and of low parts.
struct Split {
  uint8_t *high, *low;
  Split operator+(int64_t bytes) const { return {high + bytes, low + bytes}; }
};

// Hands out a call's scratch memory in parts, which all start at cache lines if their sizes are whole lines.
class TileMemory {
 public:
  explicit TileMemory(float* scratch)
      : at(reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(scratch), 64))) {}

  uint8_t* take(int64_t bytes) {
    uint8_t* taken = at;
    at += bytes;
    return taken;
  }
  float* take_floats(int64_t bytes) { return reinterpret_cast<float*>(take(bytes)); }
  Split take_split(int64_t bytes) { return Split{take(bytes), take(bytes)}; }

 private:
  uint8_t* at;
};

// What is left of a number without its high part.
inline Vec rest_of(Vec x, __m256i high) { return sub(x, Bf16Weights::widen(high)); }

// Splits 32 numbers: those of `first`, then those of `second`. The low part of an infinity is NaN.
inline void split(Vec first, Vec second, __m512i& high, __m512i& low) {
  high = __m512i(_mm512_cvtne2ps_pbh(second, first));
  const Vec first_rest = rest_of(first, _mm512_castsi512_si256(high));
  const Vec second_rest = rest_of(second, _mm512_extracti64x4_epi64(high, 1));
  low = __m512i(_mm512_cvtne2ps_pbh(second_rest, first_rest));
}

// The same, but the low part of a number with an infinite or NaN high part is zero.
inline void split_any(Vec first, Vec second, __m512i& high, __m512i& low) {
  constexpr int kInfiniteOrNan = 0x01 | 0x08 | 0x10 | 0x80;
  high = __m512i(_mm512_cvtne2ps_pbh(second, first));
  const Vec first_rest = rest_of(first, _mm512_castsi512_si256(high));
  const Vec second_rest = rest_of(second, _mm512_extracti64x4_epi64(high, 1));
  const __mmask32 dropped = _mm512_kunpackw(_mm512_fpclass_ps_mask(second_rest, kInfiniteOrNan),
                                            _mm512_fpclass_ps_mask(first_rest, kInfiniteOrNan));
  low = __m512i(_mm512_maskz_cvtne2ps_pbh(~dropped, second_rest, first_rest));
}

// A row of a tile whose elements are in order: the left operand of a product.
inline void put_row(const Split& to, Vec first, Vec second) {
  __m512i high, low;
  split(first, second, high, low);
  _mm512_store_si512(to.high, high);
  _mm512_store_si512(to.low, low);
}

// A row of a tile with pairs of one element of each: the right operand.
inline void put_pairs(const Split& to, Vec first, Vec second) {
  __m512i high, low;
  split(first, second, high, low);
  _mm512_store_si512(to.high, interleave_halves(high));
  _mm512_store_si512(to.low, interleave_halves(low));
}

inline void put_zeros(const Split& to) {
  _mm512_store_si512(to.high, _mm512_setzero_si512());
  _mm512_store_si512(to.low, _mm512_setzero_si512());
}

}  // namespace
}  // namespace argosy
