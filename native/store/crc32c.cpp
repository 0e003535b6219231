// crc32c.cpp: the table version, and the choice between the table and the CRC32 instruction.
#include "store/crc32c.h"

#include <algorithm>
#include <array>

namespace argosy {
namespace reference {
namespace {

constexpr std::array<uint32_t, 256> make_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0u);
    table[byte] = crc;
  }
  return table;
}

constexpr std::array<uint32_t, 256> kTable = make_table();

}  // namespace

uint32_t update_crc32c(uint32_t crc, const uint8_t* data, size_t nbytes) {
  for (size_t i = 0; i < nbytes; ++i) crc = kTable[(crc ^ data[i]) & 0xff] ^ (crc >> 8);
  return crc;
}

void update_quarters(Quarters& quarters) {
  // Four chains in one loop: each waits only for its own table lookup. The last quarters may be shorter.
  const size_t common = *std::min_element(quarters.nbytes, quarters.nbytes + 4);
  for (size_t i = 0; i < common; ++i) {
    for (int q = 0; q < 4; ++q) {
      quarters.crc[q] = kTable[(quarters.crc[q] ^ quarters.data[q][i]) & 0xff] ^ (quarters.crc[q] >> 8);
    }
  }
  for (int q = 0; q < 4; ++q) {
    quarters.crc[q] = update_crc32c(quarters.crc[q], quarters.data[q] + common, quarters.nbytes[q] - common);
  }
}

}  // namespace reference

uint32_t crc32c(const uint8_t* data, size_t nbytes) {
  static const auto update = sse42::has_sse42() ? sse42::update_crc32c : reference::update_crc32c;
  return ~update(~0u, data, nbytes);
}

uint32_t crc32c_wide(const uint8_t* data, size_t nbytes) {
  static const auto update = sse42::has_sse42() ? sse42::update_quarters : reference::update_quarters;
  const size_t quarter = nbytes / 4 + (nbytes % 4 != 0);
  Quarters quarters;
  for (size_t i = 0; i < 4; ++i) {
    const size_t begin = std::min(i * quarter, nbytes);
    quarters.data[i] = data + begin;
    quarters.nbytes[i] = std::min(quarter, nbytes - begin);
    quarters.crc[i] = ~0u;
  }
  update(quarters);

  uint8_t words[16];
  for (size_t i = 0; i < 16; ++i) words[i] = uint8_t(~quarters.crc[i / 4] >> (8 * (i % 4)));
  return crc32c(words, sizeof(words));
}

}  // namespace argosy
