// drive_probe.h: how fast this drive delivers records, measured without the store.
#pragma once

#include <cstdint>
#include <string>

namespace argosy {

// Reads `num_records` records of `record_bytes` in shuffled order from one file. `num_readers` threads share
// the records and fill one slot after another of an arena of at most 256 MiB on huge pages, whose pages exist
// before the measurement. Returns bytes per second of wall time. Buffered reads start with a cold page cache.
// Every record is read once before any is read twice; holes of the file are not read.
//
// Throws std::system_error if the file cannot be opened or read, std::runtime_error if `direct` is requested
// and refused, std::invalid_argument if the file holds less than one record.
double drive_probe(const std::string& path, int64_t record_bytes, int64_t num_records, int num_readers,
                   bool direct);

}  // namespace argosy
