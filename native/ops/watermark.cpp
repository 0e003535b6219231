#include "ops/watermark.h"

#include <bit>

namespace argosy {

namespace {

class SipHash {
 public:
  explicit SipHash(const WatermarkKey& key)
      : v0_(key.low ^ 0x736f6d6570736575),
        v1_(key.high ^ 0x646f72616e646f6d),
        v2_(key.low ^ 0x6c7967656e657261),
        v3_(key.high ^ 0x7465646279746573) {}

  void take(uint64_t block) {
    v3_ ^= block;
    round();
    round();
    v0_ ^= block;
  }

  uint64_t finish() {
    v2_ ^= 0xff;
    for (int i = 0; i < 4; ++i) round();
    return v0_ ^ v1_ ^ v2_ ^ v3_;
  }

 private:
  void round() {
    v0_ += v1_;
    v2_ += v3_;
    v1_ = std::rotl(v1_, 13) ^ v0_;
    v3_ = std::rotl(v3_, 16) ^ v2_;
    v0_ = std::rotl(v0_, 32) + v3_;
    v2_ += v1_;
    v1_ = std::rotl(v1_, 17) ^ v2_;
    v3_ = std::rotl(v3_, 21) ^ v0_;
    v2_ = std::rotl(v2_, 32);
  }

  uint64_t v0_, v1_, v2_, v3_;
};

}  // namespace

void ngram_words(const WatermarkKey& key, const uint32_t* ngrams, int64_t num_rows, int64_t row_size,
                 uint64_t* words) {
  // The last block has what is left of the ids, and the number of bytes in its highest byte.
  const uint64_t length = uint64_t(4 * row_size) << 56;
  for (int64_t row = 0; row < num_rows; ++row) {
    const uint32_t* ids = ngrams + row * row_size;
    SipHash hash(key);
    int64_t i = 0;
    for (; i + 1 < row_size; i += 2) hash.take(ids[i] | uint64_t(ids[i + 1]) << 32);
    hash.take(length | (i < row_size ? ids[i] : 0));
    words[row] = hash.finish();
  }
}

void tournament(const uint64_t* words, int64_t num_tokens, int depth, double* weights) {
  for (int i = 0; i < depth; ++i) {
    double mass = 0.0;
    for (int64_t token = 0; token < num_tokens; ++token)
      mass += double(words[token] >> i & 1) * weights[token];
    for (int64_t token = 0; token < num_tokens; ++token)
      weights[token] *= 1.0 + double(words[token] >> i & 1) - mass;
  }
}

}  // namespace argosy
