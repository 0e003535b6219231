// probe.h: the two operations that bound the products, alone: loads from memory and integer multiply-adds.
//
//   read_memory    the sum of all 64-bit words, with the widest loads.
//   multiply_int8  a round is kInt8ProductsPerRound products of int8 numbers, each added to a sum, with the
//                  instructions of the q4 tile (vpdpbusd; without VNNI, vpmaddubsw and an addition), on
//                  enough independent sums to hide their latency, and without loads.
#pragma once

#include "kernels/half.h"

namespace argosy {
namespace {

constexpr int64_t kReadStep = 512;  // read_memory reads whole steps

// Prevents the compiler from computing rounds in advance.
template <class T>
[[gnu::always_inline]] inline void forget(T& value) {
#if ARGOSY_VECTOR
  asm volatile("" : "+x"(value));
#else
  asm volatile("" : "+r"(value));
#endif
}

#if !ARGOSY_VECTOR  // the reference

uint64_t read_memory(const uint8_t* data, int64_t nbytes) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < nbytes; i += 8) sum += read_unaligned<uint64_t>(data + i);
  return sum;
}

constexpr int kIndependentSums = 12;
constexpr int64_t kInt8ProductsPerRound = kIndependentSums;

uint64_t multiply_int8(int64_t rounds) {
  int32_t sum[kIndependentSums];
  for (int i = 0; i < kIndependentSums; ++i) sum[i] = i;
  int32_t weight = 3;
  int32_t activation = -5;
  for (int64_t round = 0; round < rounds; ++round) {
    forget(weight);
    forget(activation);
    for (int i = 0; i < kIndependentSums; ++i)
      sum[i] = int32_t(uint32_t(sum[i]) + uint32_t(weight * activation));
  }
  uint64_t total = 0;
  for (int i = 0; i < kIndependentSums; ++i) total += uint64_t(int64_t(sum[i]));
  return total;
}

#elif ARGOSY_AVX512

uint64_t read_memory(const uint8_t* data, int64_t nbytes) {
  __m512i sum[8] = {};
  for (int64_t i = 0; i < nbytes; i += kReadStep) {
    // Read cache lines in order: another order would hide the stream from the hardware prefetcher.
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m512i words = _mm512_load_si512(data + i + 64 * j);
      forget(words);
      sum[j] = _mm512_add_epi64(sum[j], words);
    }
  }
  uint64_t total = 0;
  for (const __m512i& each : sum) {
    uint64_t words[8];  // not _mm512_reduce_add_epi64: it adds signed words, which must not overflow
    _mm512_storeu_si512(words, each);
    for (const uint64_t word : words) total += word;
  }
  return total;
}

constexpr int kIndependentSums = 12;
constexpr int64_t kInt8ProductsPerRound = kIndependentSums * 64;

uint64_t multiply_int8(int64_t rounds) {
  __m512i weights = _mm512_set1_epi8(3);
  __m512i activations = _mm512_set1_epi8(-5);
  __m512i sum[kIndependentSums];
#pragma GCC unroll 12
  // The sums must differ, or the compiler merges them.
  for (int i = 0; i < kIndependentSums; ++i) sum[i] = _mm512_set1_epi32(i);
  for (int64_t round = 0; round < rounds; ++round) {
    forget(weights);
#pragma GCC unroll 12
    for (int i = 0; i < kIndependentSums; ++i) {
      sum[i] = _mm512_dpbusd_epi32(sum[i], weights, activations);
    }
  }
  uint64_t total = 0;
  for (const __m512i& each : sum) total += uint64_t(int64_t(_mm512_reduce_add_epi32(each)));
  return total;
}

#else  // AVX2

uint64_t read_memory(const uint8_t* data, int64_t nbytes) {
  __m256i sum[8] = {};
  for (int64_t i = 0; i < nbytes; i += kReadStep) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(data + i + 32 * j));
      forget(words);
      sum[j % 8] = _mm256_add_epi64(sum[j % 8], words);
    }
  }
  uint64_t total = 0;
  for (const __m256i& each : sum) {
    uint64_t words[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), each);
    for (const uint64_t word : words) total += word;
  }
  return total;
}

constexpr int kIndependentSums = 6;  // twelve would not fit in registers
constexpr int64_t kInt8ProductsPerRound = kIndependentSums * 32;

uint64_t multiply_int8(int64_t rounds) {
  __m256i weights = _mm256_set1_epi8(3);
  const __m256i activations = _mm256_set1_epi8(-5);
  __m256i sum[kIndependentSums];
#pragma GCC unroll 6
  for (int i = 0; i < kIndependentSums; ++i) sum[i] = _mm256_set1_epi16(int16_t(i));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 6
    for (int i = 0; i < kIndependentSums; ++i) {
      forget(weights);  // in every step, or the compiler merges all products of a round
      sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(weights, activations));
    }
  }
  uint64_t total = 0;
  for (const __m256i& each : sum) total += uint64_t(_mm256_extract_epi16(each, 0));
  return total;
}

#endif

}  // namespace
}  // namespace argosy
