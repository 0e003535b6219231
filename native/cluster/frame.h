// frame.h: the frames of a connection between a coordinator and a worker.
//
//   coordinator                                      worker
//     ask {experts, tokens}, rows ... rows   ---->     run the experts on the rows
//                                            <----     answer {experts, their outputs} ... answer, or refusal
//
// A frame is a header and `payload_bytes` more, all little-endian. Both ends know the limits of the model
// before the first frame, and compare every length with them before they use it. Nothing in a frame decides
// how much memory the other end allocates.
//
//   type      from         count_a          count_b   count_c      payload
//   ask       coordinator  experts          rows      assignments  Entry[experts], uint32 token[assignments]
//   rows      coordinator  0                rows      first row    float32 [rows][hidden]
//   cancel    coordinator  0                0         0
//   guess     coordinator  ranks            0         is sweep     uint32 size[ranks], uint32 expert[...]
//   ping      coordinator  0                0         0
//   answer    worker       experts          rows      0            Entry[experts], float32 [rows][hidden]
//   refusal   worker       0                0         code         text
//   pong      worker       0                0         0            status
//
// Rows and assignments of an ask have their own numbers: rows are those tokens that chose one of its experts,
// in order; assignments are listed expert by expert, experts ascending, and for each the row of its token. An
// answer has the outputs of whole experts, in that order. A worker may answer a request in several frames.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace argosy {

static_assert(std::endian::native == std::endian::little, "frames are copied as they are");

// Why a request or a connection failed.
enum class LinkFailure {
  ended,     // closed or reset
  refused,   // the worker refused a request; the connection lives
  protocol,  // the other end broke the protocol
  silent,    // it owed a frame for too long
  full,      // it has too many requests without an answer; this one was not sent
};

class LinkError : public std::runtime_error {
 public:
  LinkError(LinkFailure failure, const std::string& message)
      : std::runtime_error(message), failure_(failure) {}
  LinkFailure failure() const { return failure_; }

 private:
  LinkFailure failure_;
};

enum class FrameType : uint8_t { ask = 1, rows, cancel, guess, ping, answer, refusal, pong };

struct FrameHeader {
  static constexpr uint32_t kMagic = 0x46475241;  // "ARGF"
  static constexpr uint8_t kVersion = 1;

  uint32_t magic = kMagic;
  uint8_t version = kVersion;
  FrameType type = FrameType::ping;
  uint16_t layer = 0;
  uint32_t request = 0;  // its id: of a ping and its pong, too
  uint32_t count_a = 0, count_b = 0, count_c = 0;
  uint64_t payload_bytes = 0;
};
static_assert(sizeof(FrameHeader) == 32 && std::is_trivially_copyable_v<FrameHeader>);

// An expert of an ask or of an answer, and how many assignments it has there.
struct Entry {
  static constexpr uint32_t kScan = 1u << 31;  // in an ask: only prompt tokens chose it

  uint32_t expert;
  uint32_t count;
};
static_assert(sizeof(Entry) == 8);

constexpr int64_t kMostRowsOfFrame = 256;    // a cancelled request still sends the rest of its frame
constexpr int64_t kMostTextBytes = 4096;     // in a refusal or a status
constexpr int32_t kRefusedAsCancelled = -1;  // the code of a refusal that follows a cancel

// The limits that both ends agreed on before the first frame.
struct LinkLimits {
  int64_t hidden;
  std::vector<int32_t> num_experts;  // by layer; 0: no routed experts
  int64_t most_rows;                 // per request
  int64_t most_assignments;          // per request

  int64_t row_bytes() const { return hidden * int64_t(sizeof(float)); }
  int64_t most_experts() const {
    int32_t most = 0;
    for (const int32_t count : num_experts) most = count > most ? count : most;
    return most;
  }
  // Throws std::invalid_argument for sizes that are not positive, or whose products could overflow.
  void check() const;
  int64_t experts_of(int64_t layer) const {
    return layer >= 0 && layer < int64_t(num_experts.size()) ? num_experts[size_t(layer)] : 0;
  }
};

// Bytes that were received and not used yet.
class InputBuffer {
 public:
  explicit InputBuffer(size_t capacity) : bytes_(capacity) {}

  const uint8_t* data() const { return bytes_.data() + begin_; }
  size_t size() const { return end_ - begin_; }
  size_t capacity() const { return bytes_.size(); }

  void consume(size_t nbytes) {
    begin_ += nbytes;
    if (begin_ == end_) begin_ = end_ = 0;
  }
  // Moves what is here to the front; returns where further bytes go. The room is what is left of capacity().
  uint8_t* room() {
    if (begin_ > 0) {
      memmove(bytes_.data(), data(), size());
      end_ -= std::exchange(begin_, 0);
    }
    return bytes_.data() + end_;
  }
  size_t room_bytes() const { return bytes_.size() - size(); }
  void landed(size_t nbytes) { end_ += nbytes; }

 private:
  std::vector<uint8_t> bytes_;
  size_t begin_ = 0, end_ = 0;
};

// The header at the front. Throws LinkError unless it has the magic and the version. `from` names the other
// end in the message.
inline FrameHeader read_header(const InputBuffer& input, const char* from) {
  FrameHeader header;
  memcpy(&header, input.data(), sizeof(header));
  if (header.magic != FrameHeader::kMagic) {
    throw LinkError(LinkFailure::protocol, std::string(from) + " sent something that is not a frame");
  }
  if (header.version != FrameHeader::kVersion) {
    throw LinkError(LinkFailure::protocol, std::string(from) + " sent a frame of version " +
                                               std::to_string(header.version) + ", expected " +
                                               std::to_string(FrameHeader::kVersion));
  }
  return header;
}

template <class T>
void append(std::vector<uint8_t>& bytes, const T* items, size_t count) {
  const auto* from = reinterpret_cast<const uint8_t*>(items);
  bytes.insert(bytes.end(), from, from + count * sizeof(T));
}

template <class T>
T read_item(const uint8_t* items, int64_t index) {
  T item;
  memcpy(&item, items + index * int64_t(sizeof(T)), sizeof(T));
  return item;
}

}  // namespace argosy
