#include "ops/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention_args.h"
#include "ops/checked_size.h"
#include "ops/kv_gather.h"

namespace argosy {

namespace {

// Consecutive tokens of one sequence, which go through its keys together.
struct Run {
  int64_t begin, end;
};

std::vector<Run> split_into_runs(const AttentionBatch& batch, int64_t longest) {
  std::vector<Run> runs;
  for (int64_t token = 0; token < batch.num_tokens; ++token) {
    const bool joins = !runs.empty() && batch.sequence[token] == batch.sequence[token - 1] &&
                       token - runs.back().begin < longest && !batch.chosen.limits(batch.order[token]) &&
                       !batch.chosen.limits(batch.order[token - 1]);
    if (joins) {
      runs.back().end = token + 1;
    } else {
      runs.push_back({token, token + 1});
    }
  }
  return runs;
}

constexpr const char* kKvCache = "a KV cache";

// The places of keys and values are not set.
KvLayer layer_of(const KvShape& shape, int64_t block_tokens, KvFormat format) {
  return {nullptr, nullptr, block_tokens, shape.kv_heads, shape.head_dim, shape.value_dim, format};
}

// Bytes of `dim` elements for each entry of a block.
int64_t latent_block_bytes(int64_t dim, int64_t block_entries, KvFormat format) {
  return block_entries * latent_vector_bytes({nullptr, block_entries, dim, format});
}

// The entries of a block. Where one stands for the positions of several blocks, each has room for it.
int64_t block_entries(const KvShape& shape, int64_t block_tokens) {
  const int64_t positions = shape.positions_per_entry;
  if (positions < 1 || (block_tokens % positions != 0 && positions % block_tokens != 0)) {
    throw std::invalid_argument("an entry stands for " + std::to_string(positions) +
                                " positions, expected a divisor or a multiple of the " +
                                std::to_string(block_tokens) + " positions of a block");
  }
  return std::max<int64_t>(1, block_tokens / positions);
}

int64_t layer_bytes(const KvShape& shape, int64_t num_blocks, int64_t block_tokens, KvFormat format) {
  int64_t sum = 0;
  for (const int64_t part : KvCache::layer_parts(shape, num_blocks, block_tokens, format)) sum += part;
  return sum;
}

}  // namespace

std::vector<int64_t> KvCache::layer_parts(const KvShape& shape, int64_t num_blocks, int64_t block_tokens,
                                          KvFormat format) {
  if (shape.kind == KvShape::Kind::none) return {};
  const int64_t smallest = shape.kind == KvShape::Kind::latent ? shape.head_dim : shape.value_dim;
  for (const int64_t dim : {shape.head_dim, smallest})
    checked_product(kKvCache, {num_blocks, block_tokens, shape.kv_heads, dim});
  // With room for elements, scales, values beside keys, and rounding up, so that nothing below overflows.
  const int64_t dim = std::max(shape.head_dim + shape.index_dim, shape.value_dim);
  checked_product(kKvCache, {64, num_blocks, block_tokens + kKeyTile, shape.kv_heads, dim + kKeyTile});
  std::vector<int64_t> parts;
  if (shape.kind == KvShape::Kind::latent) {
    parts = {num_blocks * latent_block_bytes(shape.head_dim, block_entries(shape, block_tokens), format)};
  } else {
    const KvLayer layer = layer_of(shape, block_tokens, format);
    const int64_t heads = num_blocks * shape.kv_heads;
    parts = {heads * key_head_bytes(layer), heads * value_head_bytes(layer)};
  }
  if (shape.index_dim > 0)
    parts.push_back(num_blocks * latent_block_bytes(shape.index_dim, block_tokens, format));
  return parts;
}

int64_t KvCache::bytes(const std::vector<KvShape>& layers, KvBlockCounts counts, int64_t block_tokens,
                       KvFormat format) {
  checked_product(kKvCache, {int64_t(layers.size()), counts.num_blocks, block_tokens});
  checked_product(kKvCache, {int64_t(layers.size()), counts.num_window_blocks, block_tokens});
  int64_t sum = 0;
  for (const KvShape& shape : layers) {
    const int64_t layer = layer_bytes(shape, counts.of(shape), block_tokens, format);
    if (layer > kMostBytes - sum) throw std::invalid_argument("a KV cache would take more than 2^62 bytes");
    sum += layer;
  }
  return sum;
}

KvCache::KvCache(std::vector<KvShape> layers, KvBlockCounts counts, int64_t block_tokens, KvFormat format)
    : layers_(std::move(layers)),
      counts_(counts),
      block_tokens_(block_tokens),
      format_(format),
      nbytes_(bytes(layers_, counts, block_tokens, format)),
      arena_(size_t(std::max<int64_t>(1, nbytes_))) {
  int64_t end = 0;
  for (const KvShape& shape : layers_) {
    offsets_.push_back(end);
    end += layer_bytes(shape, counts.of(shape), block_tokens, format);
  }
}

KvLayer KvCache::layer(int64_t index) {
  const KvShape& shape = layers_[size_t(index)];
  KvLayer layer = layer_of(shape, block_tokens_, format_);
  layer.keys = arena_.data() + offsets_[size_t(index)];
  layer.values = layer.keys + counts_.of(shape) * shape.kv_heads * key_head_bytes(layer);
  return layer;
}

LatentLayer KvCache::latent_layer(int64_t index) {
  const KvShape& shape = layers_[size_t(index)];
  return {arena_.data() + offsets_[size_t(index)], block_entries(shape, block_tokens_), shape.head_dim,
          format_, std::max<int64_t>(1, shape.positions_per_entry / block_tokens_)};
}

LatentLayer KvCache::index_layer(int64_t index) {
  const KvShape& shape = layers_[size_t(index)];
  const int64_t num_blocks = counts_.of(shape);
  const int64_t begin = offsets_[size_t(index)] + layer_bytes(shape, num_blocks, block_tokens_, format_) -
                        num_blocks * latent_block_bytes(shape.index_dim, block_tokens_, format_);
  return {arena_.data() + begin, block_tokens_, shape.index_dim, format_};
}

std::vector<KvCache::Part> KvCache::parts(bool is_windowed) {
  std::vector<Part> parts;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const KvShape& shape = layers_[i];
    if (shape.is_windowed != is_windowed) continue;
    int64_t begin = offsets_[i];
    for (const int64_t block_bytes : layer_parts(shape, 1, block_tokens_, format_)) {
      parts.push_back({begin, block_bytes});
      begin += counts_.of(shape) * block_bytes;
    }
  }
  return parts;
}

int64_t KvCache::block_bytes(bool is_windowed) const {
  int64_t sum = 0;
  for (const KvShape& shape : layers_) {
    if (shape.is_windowed == is_windowed) sum += layer_bytes(shape, 1, block_tokens_, format_);
  }
  return sum;
}

int64_t KvCache::held_bytes(int64_t num_blocks) {
  int64_t free_bytes = 0;
  for (const Part& part : parts(false)) {
    const int64_t begin = part.offset + num_blocks * part.block_bytes;
    free_bytes += int64_t(
        Arena::discarded_bytes(size_t(begin), size_t(part.offset + counts_.num_blocks * part.block_bytes)));
  }
  return nbytes_ - free_bytes;
}

void KvCache::release(int64_t num_blocks) {
  for (const Part& part : parts(false)) {
    const int64_t begin = part.offset + num_blocks * part.block_bytes;
    arena_.discard(size_t(begin), size_t(part.offset + counts_.num_blocks * part.block_bytes));
  }
}

void KvCache::copy_out(int64_t block, uint8_t* to) {
  for (const Part& part : parts(false)) {
    to = std::copy_n(arena_.data() + part.offset + block * part.block_bytes, part.block_bytes, to);
  }
}

void KvCache::copy_in(int64_t block, const uint8_t* from) {
  for (const Part& part : parts(false)) {
    std::copy_n(from, part.block_bytes, arena_.data() + part.offset + block * part.block_bytes);
    from += part.block_bytes;
  }
}

void KvCache::copy_block(int64_t from, int64_t to, bool is_windowed) {
  for (const Part& part : parts(is_windowed)) {
    const uint8_t* source = arena_.data() + part.offset + from * part.block_bytes;
    std::copy_n(source, part.block_bytes, arena_.data() + part.offset + to * part.block_bytes);
  }
}

void kv_write(Runtime& runtime, const KvLayer& kv, const float* keys, const float* values,
              const int64_t* slots, int64_t num_tokens) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(kv.kv_heads, num_tokens * (kv.head_dim + kv.value_dim) * 2,
                       [&](int64_t begin, int64_t end, int) {
                         for (int64_t head = begin; head < end; ++head) {
                           table.kv_write({
                               .kv = kv,
                               .keys = keys,
                               .values = values,
                               .slots = slots,
                               .num_tokens = num_tokens,
                               .kv_head = head,
                           });
                         }
                       });
}

namespace {

// Threads share the sections of long sequences if there are fewer pieces of work than this for each thread.
constexpr int64_t kFewItems = 2;

// What sections in progress take: a total for each query, and states of the sections that threads compute at
// once, at most two for each thread and one more for each item.
int64_t section_state_floats(int64_t value_dim, int num_threads) {
  return 3 * kFewItems * num_threads * most_attention_queries() * attention_state_floats(value_dim);
}

// Where the parts of the scratch begin, in bytes, and what one thread has of each.
struct ScratchPlaces {
  ScratchPlaces(const AttentionScratchSizes& sizes, int num_threads)
      : section_tiles(std::min(kSectionKeys, round_up(sizes.num_chosen, kKeyTile)) / kKeyTile),
        table_entries(sizes.num_chosen > 0 ? sizes.num_chosen + 1 : 0) {
    const int64_t sections = num_threads > 1 ? section_state_floats(sizes.value_dim, num_threads) : 0;
    tables = 4 * (num_threads * most_attention_floats(sizes.head_dim, sizes.value_dim) + sections);
    gathered = round_up(tables + 4 * num_threads * table_entries, 64);
    if (sizes.gathered_heads > 0) {
      gathered_bytes = argosy::gathered_bytes(sizes.head_dim, sizes.value_dim, section_tiles);
      state_bytes = 4 * 2 * sizes.gathered_heads * attention_state_floats(sizes.value_dim);
    }
    end = gathered + num_threads * (gathered_bytes + state_bytes);
  }
  int64_t section_tiles;  // of gathered keys
  int64_t table_entries;
  int64_t gathered_bytes = 0, state_bytes = 0;
  int64_t tables, gathered, end;
};

// A batch against the keys of one layer, by runs and KV heads.
class Attention {
 public:
  Attention(Runtime& runtime, const KvLayer& kv, const AttentionBatch& batch, float* out)
      : runtime_(runtime),
        kv_(kv),
        batch_(batch),
        out_(out),
        group_(batch.num_heads / kv.kv_heads),
        runs_(split_into_runs(batch, std::max<int64_t>(1, runtime.kernels().most_queries / group_))),
        num_items_(int64_t(runs_.size()) * kv.kv_heads),
        places_({kv.head_dim, kv.value_dim, batch.chosen.most_seen(), batch.chosen.is_joint ? group_ : 0},
                runtime.num_threads()),
        scratch_(reinterpret_cast<float*>(runtime.scratch(places_.end))) {}

  void run() {
    const int64_t num_threads = runtime_.num_threads();
    int64_t begin = INT64_MAX, end = 0;  // sections
    for (int64_t t = 0; t < batch_.num_tokens; ++t) {
      begin = std::min(begin, first_section(t));
      end = std::max(end, last_section(t) + 1);
    }
    const bool is_even = num_items_ % num_threads == 0;
    if (num_items_ < kFewItems * num_threads && !is_even && end - begin > 1 && group_ <= most_queries()) {
      share_sections(begin, end);
    } else {
      share_items();
    }
  }

 private:
  // All runs of one KV head come before the next KV head, so that its keys stay in the cache. In a prefill
  // the longest runs come last: start with them, so that all threads finish together.
  const Run& run_of(int64_t item) const {
    return runs_[runs_.size() - 1 - size_t(item % int64_t(runs_.size()))];
  }

  // section: the only one that is computed; -1: all. Tokens whose positions are gathered need one.
  AttentionArgs args_of(int64_t item, int worker, int64_t section = -1) const {
    const Run& run = run_of(item);
    AttentionArgs args = {
        .kv = kv_,
        .kv_head = item / int64_t(runs_.size()),
        .q = batch_.q + run.begin * batch_.num_heads * kv_.head_dim,
        .out = out_ + run.begin * batch_.num_heads * kv_.value_dim,
        .order = batch_.order + run.begin,
        .sees_until = batch_.sees_until != nullptr ? batch_.sees_until + run.begin : nullptr,
        .num_tokens = run.end - run.begin,
        .num_heads = batch_.num_heads,
        .blocks = batch_.block_table + batch_.sequence[run.begin] * batch_.max_blocks,
        .scale = batch_.scale,
        .window = batch_.window,
        .scratch = scratch_ + worker * attention_floats(),
        .sinks = batch_.sinks,
        .section = section,
    };
    if (!is_limited(item)) return args;
    if (batch_.chosen.is_joint) {
      gather(args, run.begin, worker);
    } else {
      choose_blocks(args, run.begin, worker);
    }
    return args;
  }

  // Whether the tokens of the item, then a single one, see only chosen blocks.
  bool is_limited(int64_t item) const { return batch_.chosen.limits(batch_.order[run_of(item).begin]); }

  // Gives the call a block table of chosen blocks only, among which the token's own is the last.
  void choose_blocks(AttentionArgs& args, int64_t token, int worker) const {
    const ChosenBlocks& chosen = batch_.chosen;
    const int64_t per_block = chosen.size / kv_.block_tokens, last = batch_.order[token] / kv_.block_tokens;
    const int32_t* blocks = chosen.blocks + (token * kv_.kv_heads + args.kv_head) * chosen.count;
    int32_t* table = set_table(args, token, worker);
    for (int64_t i = 0; i < chosen.count * per_block; ++i)
      table[i] = args.blocks[std::min(blocks[i / per_block] * per_block + i % per_block, last)];
    args.blocks = table;
  }

  // Gives the call the positions of one section that the token sees, copied side by side, as the only KV
  // head.
  void gather(AttentionArgs& args, int64_t token, int worker) const {
    const ChosenBlocks& chosen = batch_.chosen;
    const int64_t whole = chosen.count * chosen.size, seen = until(token), tiles = places_.section_tiles;
    const int64_t begin = args.section * kSectionKeys, end = std::min(begin + kSectionKeys, seen);
    const int64_t unfinished = int64_t(batch_.order[token]) + 1 - (seen - whole);
    const int32_t* blocks = chosen.blocks + token * chosen.count;
    const KvLayer to = gathered_layer(kv_, tiles, gathered(worker));
    for (int64_t lane = begin; lane < end;) {
      const bool is_whole = lane < whole;
      const int64_t within = is_whole ? lane % chosen.size : lane - whole;
      const int64_t first = is_whole ? blocks[lane / chosen.size] * chosen.size : unfinished;
      const int64_t count = std::min((is_whole ? chosen.size : seen - whole) - within, end - lane);
      gather_positions(kv_, args.blocks, args.kv_head, first + within, count, to, lane - begin);
      lane += count;
    }
    int32_t* table = set_table(args, token, worker);
    for (int64_t i = 0; i * kKeyTile < seen; ++i) table[i] = int32_t(i % tiles);
    args.blocks = table;
    args.kv = to;
    args.q += args.kv_head * group_ * kv_.head_dim;
    args.out += args.kv_head * group_ * kv_.value_dim;
    if (args.sinks != nullptr) args.sinks += args.kv_head * group_;
    args.num_heads = group_;
    args.kv_head = 0;
  }

  // Returns the worker's block table, and gives the call the number of the token's own position in it.
  int32_t* set_table(AttentionArgs& args, int64_t token, int worker) const {
    int32_t* order = reinterpret_cast<int32_t*>(memory() + places_.tables) + worker * places_.table_entries;
    *order = int32_t(until(token) - 1);
    args.order = order;
    return order + 1;
  }

  uint8_t* memory() const { return reinterpret_cast<uint8_t*>(scratch_); }
  uint8_t* gathered(int worker) const {
    return memory() + places_.gathered + worker * (places_.gathered_bytes + places_.state_bytes);
  }

  // The end of the positions that a token sees, counted among chosen ones if it is limited.
  int64_t until(int64_t token) const {
    return batch_.chosen.blocks != nullptr ? batch_.chosen.seen_by(batch_.order[token]) : batch_.until(token);
  }

  int64_t most_queries() const { return runtime_.kernels().most_queries; }
  int64_t attention_floats() const {
    return runtime_.kernels().attention_floats(kv_.head_dim, kv_.value_dim);
  }

  int64_t first_section(int64_t token) const { return lane_of(kv_, batch_.first(token)) / kSectionKeys; }
  int64_t last_section(int64_t token) const {
    const bool is_gathered = batch_.chosen.is_joint && batch_.chosen.limits(batch_.order[token]);
    return (is_gathered ? until(token) - 1 : lane_of(kv_, until(token) - 1)) / kSectionKeys;
  }

  // One section after another: their keys take turns in the worker's memory.
  void attend_gathered(int64_t item, int worker) const {
    const KernelTable& table = runtime_.kernels();
    const int64_t token = run_of(item).begin, head = item / int64_t(runs_.size()) * group_;
    const int64_t state_floats = attention_state_floats(kv_.value_dim);
    float* total = reinterpret_cast<float*>(gathered(worker) + places_.gathered_bytes);
    float* next = total + group_ * state_floats;
    for (int64_t section = 0; section <= last_section(token); ++section) {
      AttentionArgs args = args_of(item, worker, section);
      args.states = section == 0 ? total : next;
      table.attention(args);
      for (int64_t i = 0; section > 0 && i < group_; ++i)
        table.attention_merge(next + i * state_floats, kv_.value_dim, total + i * state_floats);
    }
    for (int64_t i = 0; i < group_; ++i) {
      table.attention_finish(total + i * state_floats, kv_.value_dim,
                             out_ + (token * batch_.num_heads + head + i) * kv_.value_dim);
    }
  }

  void share_items() {
    const KernelTable& table = runtime_.kernels();
    int64_t work = 0;
    for (int64_t t = 0; t < batch_.num_tokens; ++t) {
      work += batch_.num_heads * (kv_.head_dim + kv_.value_dim) * (until(t) - batch_.first(t));
    }
    runtime_.parallel_for(num_items_, work / num_items_ + 1, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t item = begin; item < end; ++item) {
        if (batch_.chosen.is_joint && is_limited(item)) {
          attend_gathered(item, worker);
        } else {
          table.attention(args_of(item, worker));
        }
      }
    });
  }

  // Few items over many positions: threads share the sections, too, some at once.
  void share_sections(int64_t begin, int64_t end) {
    const KernelTable& table = runtime_.kernels();
    const int64_t num_threads = runtime_.num_threads(), state_floats = attention_state_floats(kv_.value_dim);
    const int64_t at_once = std::min(end - begin, (kFewItems * num_threads + num_items_ - 1) / num_items_);
    const int64_t item_floats = most_queries() * state_floats;
    float* totals = scratch_ + num_threads * attention_floats();
    float* next = totals + num_items_ * item_floats;
    const int64_t work = kSectionKeys * group_ * (kv_.head_dim + kv_.value_dim);
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t after = std::min(first + at_once, end);
      runtime_.parallel_for(num_items_ * at_once, work, [&](int64_t from, int64_t to, int worker) {
        for (int64_t i = from; i < to; ++i) {
          const int64_t section = first + i % at_once;
          if (section >= after) continue;
          AttentionArgs args = args_of(i / at_once, worker, section);
          args.states = next + i * item_floats;
          table.attention(args);
        }
      });
      for (int64_t item = 0; item < num_items_; ++item) {
        const Run& run = run_of(item);
        for (int64_t q = 0; q < (run.end - run.begin) * group_; ++q) {
          const int64_t token = run.begin + q / group_;
          float* total = totals + item * item_floats + q * state_floats;
          for (int64_t section = first; section < after; ++section) {
            const float* state = next + (item * at_once + section - first) * item_floats + q * state_floats;
            if (section == first_section(token)) {
              std::copy_n(state, state_floats, total);
            } else if (first_section(token) < section && section <= last_section(token)) {
              table.attention_merge(state, kv_.value_dim, total);
            }
          }
          if (after == end) {
            const int64_t head = item / int64_t(runs_.size()) * group_ + q % group_;
            table.attention_finish(total, kv_.value_dim,
                                   out_ + (token * batch_.num_heads + head) * kv_.value_dim);
          }
        }
      }
    }
  }

  Runtime& runtime_;
  const KvLayer& kv_;
  const AttentionBatch& batch_;
  float* out_;
  int64_t group_;  // heads that share a KV head
  std::vector<Run> runs_;
  int64_t num_items_;
  ScratchPlaces places_;
  float* scratch_;
};

}  // namespace

int64_t attention_scratch_bytes(const AttentionScratchSizes& sizes, int num_threads) {
  return ScratchPlaces(sizes, num_threads).end;
}

void attention(Runtime& runtime, const KvLayer& kv, const AttentionBatch& batch, float* out) {
  if (batch.num_tokens == 0) return;
  const auto lock = runtime.lock();
  Attention(runtime, kv, batch, out).run();
}

}  // namespace argosy
