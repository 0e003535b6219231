// crc32c.h: the checksum of a record, fast enough to check on every read.
//
// CRC32C uses the Castagnoli polynomial, reflected 0x82f63b78 (RFC 3720, appendix B.4 has test vectors). In
// one CRC, each step waits for the previous step. The wide checksum runs four chains in parallel:
//
//   quarter = ceil(n / 4); c[i] = crc32c(bytes [i * quarter, min((i + 1) * quarter, n)))  for i = 0..3
//   crc32c_wide = crc32c(c[0], c[1], c[2], c[3] as little-endian 32-bit words)
#pragma once

#include <cstddef>
#include <cstdint>

namespace argosy {

uint32_t crc32c(const uint8_t* data, size_t nbytes);
uint32_t crc32c_wide(const uint8_t* data, size_t nbytes);

// The four chains of the wide checksum. Each holds its CRC so far, before the final inversion.
struct Quarters {
  const uint8_t* data[4];
  size_t nbytes[4];  // the first quarter is the longest
  uint32_t crc[4];
};

namespace reference {  // one byte at a time from a table; defines the result
uint32_t update_crc32c(uint32_t crc, const uint8_t* data, size_t nbytes);
void update_quarters(Quarters& quarters);
}  // namespace reference

namespace sse42 {  // the CRC32 instruction; call only if has_sse42()
bool has_sse42();
uint32_t update_crc32c(uint32_t crc, const uint8_t* data, size_t nbytes);
void update_quarters(Quarters& quarters);
}  // namespace sse42

}  // namespace argosy
