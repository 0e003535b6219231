// test_crc32c.cpp: the vectors of RFC 3720 appendix B.4, and the instruction against the table.
#include <algorithm>
#include <numeric>
#include <vector>

#include "check.h"
#include "store/crc32c.h"

namespace {

using Bytes = std::vector<uint8_t>;

uint32_t table_crc(const uint8_t* data, size_t nbytes) {
  return ~argosy::reference::update_crc32c(~0u, data, nbytes);
}

Bytes counting(size_t nbytes, int step) {
  Bytes bytes(nbytes);
  for (size_t i = 0; i < nbytes; ++i) bytes[i] = uint8_t(int(i) * step);
  return bytes;
}

void the_vectors_of_rfc_3720() {
  Bytes rising(32), falling(32);
  std::iota(rising.begin(), rising.end(), uint8_t{0});
  std::iota(falling.rbegin(), falling.rend(), uint8_t{0});
  const uint8_t scsi_read[48] = {0x01, 0xc0, 0,    0,    0,    0, 0, 0, 0,    0, 0, 0, 0,   0,
                                 0,    0,    0x14, 0,    0,    0, 0, 0, 0x04, 0, 0, 0, 0,   0x14,
                                 0,    0,    0,    0x18, 0x28, 0, 0, 0, 0,    0, 0, 0, 0x02};
  const struct {
    Bytes data;
    uint32_t expected;
  } vectors[] = {
      {Bytes(32, 0), 0x8a9136aau},
      {Bytes(32, 0xff), 0x62a8ab43u},
      {rising, 0x46dd794eu},
      {falling, 0x113fdb5cu},
      {Bytes(scsi_read, scsi_read + 48), 0xd9963a56u},
      {Bytes{'1', '2', '3', '4', '5', '6', '7', '8', '9'}, 0xe3069283u},
      {Bytes{}, 0u},
  };
  for (const auto& [data, expected] : vectors) {
    CHECK_EQUAL(argosy::crc32c(data.data(), data.size()), expected);
    CHECK_EQUAL(table_crc(data.data(), data.size()), expected);
  }
}

// The definition, written out literally.
uint32_t wide_by_definition(const uint8_t* data, size_t nbytes) {
  const size_t quarter = (nbytes + 3) / 4;
  uint8_t words[16];
  for (size_t i = 0; i < 4; ++i) {
    const size_t begin = std::min(i * quarter, nbytes), end = std::min((i + 1) * quarter, nbytes);
    const uint32_t crc = table_crc(data + begin, end - begin);
    for (size_t j = 0; j < 4; ++j) words[4 * i + j] = uint8_t(crc >> (8 * j));
  }
  return table_crc(words, 16);
}

void the_wide_checksum_is_its_definition_at_every_size_and_place() {
  const Bytes bytes = counting(1100, 7);
  for (size_t nbytes = 0; nbytes < 1000; nbytes += (nbytes < 150 ? 1 : 37)) {
    const size_t offset = nbytes % 9;
    CHECK_EQUAL(argosy::crc32c_wide(bytes.data() + offset, nbytes),
                wide_by_definition(bytes.data() + offset, nbytes));
  }
}

void the_instruction_equals_the_table() {
  if (!argosy::sse42::has_sse42()) return;
  const Bytes bytes = counting(4096, 13);
  for (size_t nbytes = 0; nbytes < 300; ++nbytes) {
    const uint8_t* data = bytes.data() + nbytes % 11;
    CHECK_EQUAL(argosy::sse42::update_crc32c(123u, data, nbytes),
                argosy::reference::update_crc32c(123u, data, nbytes));
    argosy::Quarters fast{
        {data, data + 300, data + 700, data + 1100}, {nbytes, nbytes, nbytes, nbytes / 2}, {1, 2, 3, 4}};
    argosy::Quarters plain = fast;
    argosy::sse42::update_quarters(fast);
    argosy::reference::update_quarters(plain);
    CHECK(std::equal(fast.crc, fast.crc + 4, plain.crc));
  }
}

void one_wrong_bit_is_found_wherever_it_is() {
  Bytes bytes = counting(257, 3);
  const uint32_t whole = argosy::crc32c_wide(bytes.data(), bytes.size());
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    bytes[bit / 8] ^= uint8_t(1 << (bit % 8));
    CHECK(argosy::crc32c_wide(bytes.data(), bytes.size()) != whole);
    bytes[bit / 8] ^= uint8_t(1 << (bit % 8));
  }
}

}  // namespace

int main() {
  the_vectors_of_rfc_3720();
  the_wide_checksum_is_its_definition_at_every_size_and_place();
  the_instruction_equals_the_table();
  one_wrong_bit_is_found_wherever_it_is();
  return argosy::testing::check_result();
}
