#include "ops/attention.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace argosy {

namespace {

// Consecutive tokens of one sequence: they go through its keys together.
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

int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (factor < 1)
      throw std::invalid_argument("a KV cache of size " + std::to_string(factor) + ", expected 1 or more");
    if (product > (int64_t{1} << 62) / factor)
      throw std::invalid_argument("a KV cache of more than 2^62 bytes");
    product *= factor;
  }
  return product;
}

}  // namespace

int64_t KvCache::bytes(int64_t num_layers, int64_t num_blocks, int64_t block_tokens, int64_t kv_heads,
                       int64_t head_dim, bool is_f16) {
  // Each factor first, so that rounding up cannot overflow.
  checked_product({num_layers, num_blocks, block_tokens, kv_heads, head_dim});
  const int64_t per_head =
      checked_product({round_up(block_tokens, kKeyTile), head_dim + round_up(head_dim, kKeyTile)});
  return checked_product({num_layers, num_blocks, kv_heads, per_head, is_f16 ? 2 : 4});
}

KvCache::KvCache(int64_t num_layers, int64_t num_blocks, int64_t block_tokens, int64_t kv_heads,
                 int64_t head_dim, bool is_f16)
    : num_layers_(num_layers),
      num_blocks_(num_blocks),
      shape_{nullptr, nullptr, block_tokens, kv_heads, head_dim, is_f16},
      arena_(size_t(bytes(num_layers, num_blocks, block_tokens, kv_heads, head_dim, is_f16))) {}

KvLayer KvCache::layer(int64_t index) {
  const int64_t keys = num_blocks_ * shape_.kv_heads * key_head_bytes(shape_);
  const int64_t values = num_blocks_ * shape_.kv_heads * value_head_bytes(shape_);
  KvLayer layer = shape_;
  layer.keys = arena_.data() + index * (keys + values);
  layer.values = layer.keys + keys;
  return layer;
}

void kv_write(Runtime& runtime, const KvLayer& kv, const float* keys, const float* values,
              const int64_t* slots, int64_t num_tokens) {
  const KernelTable& table = kernels();
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

void attention(Runtime& runtime, const KvLayer& kv, const AttentionBatch& batch, float* out) {
  if (batch.num_tokens == 0) return;
  const KernelTable& table = kernels();
  const auto lock = runtime.lock();
  const int64_t scratch_floats = attention_scratch_floats(kv.head_dim);
  float* scratch = reinterpret_cast<float*>(runtime.scratch(runtime.num_threads() * scratch_floats * 4));
  const int64_t heads_per_kv_head = batch.num_heads / kv.kv_heads;
  const std::vector<Run> runs = split_into_runs(batch, std::max<int64_t>(1, kMaxQueries / heads_per_kv_head));

  int64_t work = 0;
  for (int64_t t = 0; t < batch.num_tokens; ++t) {
    const int64_t seen = batch.position[t] + 1;
    work += 2 * batch.num_heads * kv.head_dim * (batch.window > 0 ? std::min(seen, batch.window) : seen);
  }
  const int64_t num_runs = int64_t(runs.size());
  const int64_t items = num_runs * kv.kv_heads;
  const int64_t row = batch.num_heads * kv.head_dim;
  // One KV head after the other, so that its keys stay in the cache. The longest runs come last in a prefill:
  // begin with them, so that all threads end together.
  runtime.parallel_for(items, work / items + 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t item = begin; item < end; ++item) {
      const Run& run = runs[runs.size() - 1 - size_t(item % num_runs)];
      table.attention({
          .kv = kv,
          .kv_head = item / num_runs,
          .q = batch.q + run.begin * row,
          .out = out + run.begin * row,
          .positions = batch.position + run.begin,
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
