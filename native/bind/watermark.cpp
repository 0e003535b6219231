// watermark.cpp: binds keyed bits of n-grams, and tournament sampling.

#include "ops/watermark.h"

#include "bind/bind.h"

namespace argosy {

using namespace nb::literals;

namespace {

uint64_t little_endian(const uint8_t* bytes) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

}  // namespace

void bind_watermark(nb::module_& m) {
  m.def(
      "ngram_words",
      [](const nb::bytes& key, const ArrayOf<uint32_t>& ngrams, const OutArrayOf<uint64_t>& words) {
        require_size("bytes of key", int64_t(key.size()), 16);
        const uint8_t* secret = static_cast<const uint8_t*>(key.data());
        const WatermarkKey halves = {little_endian(secret), little_endian(secret + 8)};
        const uint32_t* ids = read_array("ngrams", ngrams, {kAnySize, kAnySize});
        const int64_t num_rows = int64_t(ngrams.shape(0)), row_size = int64_t(ngrams.shape(1));
        require_range("ids of an n-gram", row_size, 1, 63);
        uint64_t* out = write_array("words", words, {num_rows});
        nb::gil_scoped_release released;
        ngram_words(halves, ids, num_rows, row_size, out);
      },
      "key"_a, "ngrams"_a, "words"_a.noconvert(),
      R"(
    Keyed bits of n-grams, for a watermark (native/ops/watermark.h).

    Args:
        key: 16 bytes.   ngrams: uint32 [n, size], 1 to 63 ids each.   words: uint64 [n], overwritten.)");
  m.def(
      "tournament",
      [](const ArrayOf<uint64_t>& words, const OutArrayOf<double>& weights, int64_t depth) {
        const uint64_t* bits = read_array("words", words, {kAnySize});
        const int64_t num_tokens = int64_t(words.shape(0));
        double* reweighed = write_array("weights", weights, {num_tokens});
        require_range("depth", depth, 0, kMostTournamentRounds);
        nb::gil_scoped_release released;
        tournament(bits, num_tokens, int(depth), reweighed);
      },
      "words"_a, "weights"_a.noconvert(), nb::kw_only(), "depth"_a,
      R"(
    Reweigh tokens by a tournament of `depth` rounds (native/ops/watermark.h).

    Args:
        words: uint64 [tokens], the bits of each.   weights: float64 [tokens], which sum to 1; changed in place.
        depth: 0 to 64.)");
}

}  // namespace argosy
