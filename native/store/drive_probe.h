// drive_probe.h: how fast this drive gives up records, with nothing of the store in the way.
#pragma once

#include <cstdint>
#include <string>

namespace argosy {

// Reads `num_records` records of `record_bytes` at shuffled places of a file, shared by `num_readers`
// threads, into one slot after another of an arena on huge pages, touched before, of 256 MiB at most; returns
// bytes per second of wall time. Buffered reads begin with a cold page cache. No record is read twice before
// all have been read once.
//
// Throws std::system_error where the file cannot be opened or read, std::runtime_error where `direct` is
// asked for and refused, std::invalid_argument where the file holds less than one record.
double drive_probe(const std::string& path, int64_t record_bytes, int64_t num_records, int num_readers,
                   bool direct);

}  // namespace argosy
