// bind/store.cpp: binds Arena, Store and their file systems: check, unlock the GIL, call.
#include "store/store.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "bind/bind.h"
#include "store/arena.h"
#include "store/crc32c.h"
#include "store/drive_probe.h"

namespace argosy {
namespace {

using namespace nb::literals;

using Done = std::tuple<int64_t, std::optional<std::string>, std::optional<std::string>>;

constexpr int64_t kMostPieces = int64_t{1} << 20, kMostPieceBytes = int64_t{1} << 50;  // no product overflows

// Python checks for ^C this often while it waits for the drive.
constexpr std::chrono::milliseconds kSignalInterval{100};

// Calls `body` and turns a failed system call into an OSError with `path`.
template <class Body>
auto with_os_errors(const std::string& path, Body&& body) {
  try {
    return body();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
    throw nb::python_error();
  }
}

using FaultName = Named<std::string,
                        "typing.Literal['eio', 'eintr', 'short', 'truncated', 'flip', 'delay', 'uncached', "
                        "'short_cached', 'no_cache']">;

Fault parse_fault(const std::string& kind) {
  if (kind == "eio") return Fault::io_error;
  if (kind == "eintr") return Fault::interrupted;
  if (kind == "short") return Fault::partial;
  if (kind == "truncated") return Fault::truncated;
  if (kind == "flip") return Fault::flipped_bit;
  if (kind == "delay") return Fault::delayed;
  if (kind == "uncached") return Fault::uncached;
  if (kind == "short_cached") return Fault::partial_cached;
  if (kind == "no_cache") return Fault::no_cache;
  throw std::invalid_argument(
      "unknown kind of fault '" + kind +
      "'; known: eio, eintr, short, truncated, flip, delay, uncached, short_cached, no_cache");
}

std::optional<std::string> error_kind(ReadError error) {
  switch (error) {
    case ReadError::io:
      return "io";
    case ReadError::checksum:
      return "checksum";
    case ReadError::short_file:
      return "short";
    case ReadError::not_finite:
      return "not finite";
    case ReadError::dropped:
      return "dropped";
    case ReadError::none:
      break;
  }
  return std::nullopt;
}

View<uint8_t> arena_view(Arena& arena) {
  using Holder = std::shared_ptr<const void>;
  uint8_t* data = arena.data();
  nb::capsule owner(new Holder(arena.hold()),
                    [](void* holder) noexcept { delete static_cast<Holder*>(holder); });
  return View<uint8_t>(data, {arena.size()}, owner);
}

// (file_id, offset, nbytes, dest_offset), optionally followed by (block_type, rows, cols) or (block_type,
// rows, cols, interleaved).
Piece parse_piece(nb::handle given) {
  const nb::tuple fields = nb::cast<nb::tuple>(given);
  if (fields.size() != 4 && fields.size() != 7 && fields.size() != 8) {
    throw std::invalid_argument("a piece has 4 fields, or 7 or 8 if it is transcoded; found " +
                                std::to_string(fields.size()));
  }
  Piece piece{nb::cast<int>(fields[0]), nb::cast<int64_t>(fields[1]), nb::cast<int64_t>(fields[2]),
              nb::cast<int64_t>(fields[3])};
  if (fields.size() > 4) {
    const auto name = nb::cast<std::string>(fields[4]);
    const std::optional<BlockType> type = block_type_named(name);
    if (!type) throw std::invalid_argument("unknown block type '" + name + "'");
    piece.transcode = Transcode{*type, nb::cast<int64_t>(fields[5]), nb::cast<int64_t>(fields[6]),
                                fields.size() > 7 ? nb::cast<int64_t>(fields[7]) : 1};
  }
  return piece;
}

using Pieces = nb::typed<nb::sequence, TypeName<"Piece">>;

Record parse_record(const Pieces& pieces, const std::optional<std::vector<uint32_t>>& checksums) {
  Record record;
  record.pieces.reserve(nb::len(pieces));
  for (nb::handle piece : pieces) record.pieces.push_back(parse_piece(piece));
  if (checksums && checksums->size() != record.pieces.size()) {
    throw std::invalid_argument("found " + std::to_string(record.pieces.size()) + " pieces and " +
                                std::to_string(checksums->size()) +
                                " checksums, expected one checksum per piece");
  }
  if (checksums) record.checksums = *checksums;
  return record;
}

using UrgencyName = Named<std::string, "Urgency">;

Urgency parse_urgency(const std::string& name) {
  if (name == "now") return Urgency::now;
  if (name == "soon") return Urgency::soon;
  if (name == "maybe") return Urgency::maybe;
  throw std::invalid_argument("unknown urgency '" + name + "'; known: now, soon, maybe");
}

std::vector<int64_t> fetch_many(Store& store, Arena& arena,
                                const std::vector<std::pair<const Record*, int64_t>>& records,
                                const UrgencyName& urgency) {
  std::vector<PlacedRecord> placed;
  placed.reserve(records.size());
  for (const auto& [record, base_offset] : records) {
    placed.push_back({require_item(item_name("records", placed.size()) + "[0]", record), base_offset});
  }
  const Urgency parsed = parse_urgency(urgency);
  nb::gil_scoped_release released;  // the caller's list keeps the records alive
  return store.fetch(arena, placed, parsed);
}

std::vector<Done> wait_any(Store& store, const std::vector<int64_t>& tickets, bool block) {
  std::vector<Completion> done;
  if (!block) done = store.wait_any(tickets, std::chrono::milliseconds(0));
  while (block && done.empty() && !tickets.empty()) {
    {
      nb::gil_scoped_release released;
      done = store.wait_any(tickets, kSignalInterval);
    }
    if (done.empty() && PyErr_CheckSignals() != 0) throw nb::python_error();
  }
  std::vector<Done> result;
  for (Completion& completion : done) {
    const bool failed = completion.error != ReadError::none;
    result.emplace_back(completion.ticket,
                        failed ? std::optional(std::move(completion.message)) : std::nullopt,
                        error_kind(completion.error));
  }
  return result;
}

uint32_t checksum_of(nb::typed<nb::handle, TypeName<"_Buffer">> buffer) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
  uint32_t checksum;
  {
    nb::gil_scoped_release released;  // the view keeps the bytes in place
    checksum = crc32c_wide(static_cast<const uint8_t*>(view.buf), size_t(view.len));
  }
  PyBuffer_Release(&view);
  return checksum;
}

}  // namespace

void bind_store(nb::module_& m) {
  nb::class_<Arena>(m, "Arena")
      .def(nb::init<size_t>(), "nbytes"_a)
      .def_prop_ro("nbytes", &Arena::size)
      .def("array", &arena_view)
      .def("populate",
           [](const Arena& arena) {
             const auto populate = arena.populating();  // must run before another thread can close the arena
             nb::gil_scoped_release released;
             populate();
           })
      .def("close", &Arena::close);

  nb::class_<FileSystem>(m, "FileSystem");
  nb::class_<RealFileSystem, FileSystem>(m, "RealFileSystem").def(nb::init<bool>(), "has_queue"_a = true);
  nb::class_<FaultyFileSystem, FileSystem>(m, "FaultyFileSystem")
      .def(
          "__init__",
          [](FaultyFileSystem* self, int64_t fail_read, const FaultName& kind, int64_t num_faults,
             double delay_seconds, std::shared_ptr<FileSystem> inner) {
            if (!inner) inner = std::make_shared<RealFileSystem>();
            new (self)
                FaultyFileSystem(std::move(inner), parse_fault(kind), fail_read, num_faults, delay_seconds);
          },
          "fail_read"_a, "kind"_a, "num_faults"_a = 1, "delay_seconds"_a = 0.05, "inner"_a = nb::none())
      .def_prop_ro("num_reads", &FaultyFileSystem::num_reads);

  nb::class_<Record>(m, "Record")
      .def(
          "__init__",
          [](Record* self, const Pieces& pieces, const std::optional<std::vector<uint32_t>>& checksums) {
            new (self) Record(parse_record(pieces, checksums));
          },
          "pieces"_a, "checksums"_a = nb::none())
      .def_prop_ro("pieces", [](const Record& record) {
        std::vector<std::tuple<int, int64_t, int64_t, int64_t>> found;
        for (const Piece& piece : record.pieces) {
          found.emplace_back(piece.file_id, piece.offset, piece.nbytes, piece.dest_offset);
        }
        return found;
      });

  m.def(
      "record_bytes",
      [](int64_t num_pieces, bool has_checksums) {
        require_range("num_pieces", num_pieces, 0, kMostPieces);
        return Record::bytes(num_pieces, has_checksums);
      },
      "num_pieces"_a, "has_checksums"_a);
  m.def(
      "request_bytes",
      [](const std::vector<int64_t>& piece_bytes) {
        require_range("number of pieces", int64_t(piece_bytes.size()), 0, kMostPieces);
        for (size_t i = 0; i < piece_bytes.size(); ++i)
          require_range(item_name("piece_bytes", i), piece_bytes[i], 0, kMostPieceBytes);
        return Store::request_bytes(piece_bytes);
      },
      "piece_bytes"_a);

  nb::class_<Store>(m, "Store")
      .def(
          "__init__",
          [](Store* self, int num_readers, std::shared_ptr<FileSystem> file_system) {
            if (!file_system) file_system = std::make_shared<RealFileSystem>();
            new (self) Store(num_readers, std::move(file_system));
          },
          "num_readers"_a, "file_system"_a = nb::none())
      .def(
          "open",
          [](Store& store, const std::string& path, bool direct) {
            return with_os_errors(path, [&] { return store.open(path, direct); });
          },
          "path"_a, "direct"_a = true)
      .def(
          "info",
          [](const Store& store, int file_id) {
            const FileInfo info = store.info(file_id);
            return std::tuple(info.path, info.size, info.alignment, info.is_direct, info.why_not_direct);
          },
          "file_id"_a)
      .def(
          "fetch",
          [](Store& store, Arena& arena, const Pieces& pieces,
             const std::optional<std::vector<uint32_t>>& checksums) {
            const Record record = parse_record(pieces, checksums);
            return store.fetch(arena, {PlacedRecord{record}})[0];
          },
          "arena"_a, "pieces"_a, "checksums"_a = nb::none())
      .def("fetch_many", &fetch_many, "arena"_a, "records"_a, "urgency"_a = "now")
      .def("hurry", &Store::hurry, "tickets"_a)
      .def("wait_any", &wait_any, "tickets"_a, "block"_a = true)
      .def("drop", &Store::drop, "tickets"_a)
      .def("cancel", &Store::cancel, "ticket"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("pending", &Store::pending)
      .def_prop_ro("staging_bytes", &Store::staging_bytes)
      .def_prop_ro("staging_held_bytes", &Store::staging_held_bytes)
      .def_prop_ro("is_asynchronous", &Store::is_asynchronous)
      .def("stats",
           [](const Store& store) -> nb::typed<nb::dict, nb::str, nb::float_> {
             const StoreStats stats = store.stats();
             nb::dict result;
             result["bytes_read"] = stats.bytes_read;
             result["reads"] = stats.reads;
             result["cached_bytes"] = stats.cached_bytes;
             result["read_seconds"] = stats.read_seconds;
             result["checksum_seconds"] = stats.checksum_seconds;
             result["transcode_seconds"] = stats.transcode_seconds;
             result["busy_seconds"] = stats.busy_seconds;
             return result;
           })
      .def("close", &Store::close, nb::call_guard<nb::gil_scoped_release>());

  m.attr("STAGING_BYTES") = Store::kStagingBytes;
  m.def("crc32c_wide", &checksum_of, "buffer"_a);
  m.def(
      "drive_probe",
      [](const std::string& path, int64_t record_bytes, int64_t num_records, int num_readers, bool direct) {
        return with_os_errors(path, [&] {
          nb::gil_scoped_release released;
          return drive_probe(path, record_bytes, num_records, num_readers, direct);
        });
      },
      "path"_a, "record_bytes"_a, "num_records"_a, "num_readers"_a, "direct"_a);
}

}  // namespace argosy
