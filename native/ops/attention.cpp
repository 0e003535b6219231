#include "ops/attention.h"

#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "ops/checked_size.h"

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
                       token - runs.back().begin < longest;
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
  return {nullptr, nullptr, block_tokens, shape.kv_heads, shape.head_dim, format};
}

int64_t layer_bytes(const KvShape& shape, int64_t num_blocks, int64_t block_tokens, KvFormat format) {
  if (shape.kind == KvShape::Kind::none) return 0;
  checked_product(kKvCache, {num_blocks, block_tokens, shape.kv_heads, shape.head_dim});
  // With room for elements, scales, values beside keys, and rounding up, so that nothing below overflows.
  checked_product(kKvCache,
                  {64, num_blocks, block_tokens + kKeyTile, shape.kv_heads, shape.head_dim + kKeyTile});
  const KvLayer layer = layer_of(shape, block_tokens, format);
  if (shape.kind == KvShape::Kind::keys_values) {
    return num_blocks * shape.kv_heads * (key_head_bytes(layer) + value_head_bytes(layer));
  }
  return num_blocks * block_tokens * latent_vector_bytes({nullptr, block_tokens, shape.head_dim, format});
}

}  // namespace

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
  return {arena_.data() + offsets_[size_t(index)], block_tokens_, layers_[size_t(index)].head_dim, format_};
}

std::vector<KvCache::Part> KvCache::parts(bool is_windowed) {
  std::vector<Part> parts;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const KvShape& shape = layers_[i];
    if (shape.is_windowed != is_windowed) continue;
    const int64_t layer = layer_bytes(shape, 1, block_tokens_, format_);
    if (shape.kind != KvShape::Kind::keys_values) {
      if (layer > 0) parts.push_back({offsets_[i], layer});
      continue;
    }
    const int64_t keys = shape.kv_heads * key_head_bytes(this->layer(int64_t(i)));
    parts.push_back({offsets_[i], keys});
    parts.push_back({offsets_[i] + counts_.of(shape) * keys, layer - keys});
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
  runtime.parallel_for(kv.kv_heads, num_tokens * kv.head_dim * 4, [&](int64_t begin, int64_t end, int) {
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

int64_t attention_scratch_bytes(int64_t head_dim, int num_threads) {
  return num_threads * attention_scratch_floats(head_dim) * 4;
}

void attention(Runtime& runtime, const KvLayer& kv, const AttentionBatch& batch, float* out) {
  if (batch.num_tokens == 0) return;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t scratch_floats = attention_scratch_floats(kv.head_dim);
  float* scratch =
      reinterpret_cast<float*>(runtime.scratch(attention_scratch_bytes(kv.head_dim, runtime.num_threads())));
  const int64_t heads_per_kv_head = batch.num_heads / kv.kv_heads;
  const std::vector<Run> runs = split_into_runs(batch, std::max<int64_t>(1, kMaxQueries / heads_per_kv_head));

  int64_t work = 0;
  for (int64_t t = 0; t < batch.num_tokens; ++t) {
    work += 2 * batch.num_heads * kv.head_dim * (batch.until(t) - batch.first(t));
  }
  const int64_t num_runs = int64_t(runs.size());
  const int64_t items = num_runs * kv.kv_heads;
  const int64_t row = batch.num_heads * kv.head_dim;
  // All runs of one KV head come before the next KV head, so that its keys stay in the cache. In a prefill
  // the longest runs come last: start with them, so that all threads finish together.
  runtime.parallel_for(items, work / items + 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t item = begin; item < end; ++item) {
      const Run& run = runs[runs.size() - 1 - size_t(item % num_runs)];
      table.attention({
          .kv = kv,
          .kv_head = item / num_runs,
          .q = batch.q + run.begin * row,
          .out = out + run.begin * row,
          .order = batch.order + run.begin,
          .sees_until = batch.sees_until != nullptr ? batch.sees_until + run.begin : nullptr,
          .num_tokens = run.end - run.begin,
          .num_heads = batch.num_heads,
          .blocks = batch.block_table + batch.sequence[run.begin] * batch.max_blocks,
          .scale = batch.scale,
          .window = batch.window,
          .scratch = scratch + worker * scratch_floats,
          .sinks = batch.sinks,
      });
    }
  });
}

}  // namespace argosy
