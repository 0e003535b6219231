// rope.h: applies the rotary position embedding to one token, in place (Su et al., arXiv:2104.09864).
//
//   x  float32 [num_heads][head_dim].    cosine, sine  float32 [num_pairs], num_pairs <= head_dim / 2.
//
// Dimension i < num_pairs rotates with dimension i + num_pairs; if pairs are interleaved, dimension 2 i
// rotates with 2 i + 1, as in the paper. Dimensions from 2 num_pairs on stay unchanged. One version for all
// instruction sets: each element takes three operations, whatever the vector width.
#pragma once

namespace argosy {
namespace {

void rope_interleaved(float* x, int64_t num_heads, int64_t head_dim, const float* __restrict cosine,
                      const float* __restrict sine, int64_t num_pairs) {
  for (int64_t head = 0; head < num_heads; ++head) {
    float* __restrict pair = x + head * head_dim;
    for (int64_t i = 0; i < num_pairs; ++i) {
      const float a = pair[2 * i];
      const float b = pair[2 * i + 1];
      pair[2 * i] = a * cosine[i] - b * sine[i];
      pair[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
  }
}

void rope(float* x, int64_t num_heads, int64_t head_dim, const float* __restrict cosine,
          const float* __restrict sine, int64_t num_pairs, bool is_interleaved) {
  if (is_interleaved) return rope_interleaved(x, num_heads, head_dim, cosine, sine, num_pairs);
  for (int64_t head = 0; head < num_heads; ++head) {
    float* __restrict first = x + head * head_dim;
    float* __restrict second = first + num_pairs;
    for (int64_t i = 0; i < num_pairs; ++i) {
      const float a = first[i];
      const float b = second[i];
      first[i] = a * cosine[i] - b * sine[i];
      second[i] = b * cosine[i] + a * sine[i];
    }
  }
}

}  // namespace
}  // namespace argosy
