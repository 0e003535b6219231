#include "ops/latent_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/latent_args.h"
#include "kernels/matmul_args.h"
#include "ops/checked_size.h"

namespace argosy {

namespace {

constexpr int64_t kBlockRows = 32;   // rows per item of a product with one head's matrix
constexpr int64_t kTileTokens = 32;  // latent queries and results exist for this many tokens at a time
constexpr const char* kScratch = "latent attention scratch";

int64_t blocks_of(int64_t rows) { return round_up(rows, kBlockRows) / kBlockRows; }

// Columns of one sequence that go through the same vectors together.
struct Item {
  LatentColumn columns[kAmxColumns];
  float* out[kAmxColumns];
  int64_t num_columns;
  int64_t num_sections;  // sections that at least one column sees
  const int32_t* blocks;
  const int32_t* positions;  // nullptr: all
};

// The number of sections of an item that threads process in parallel. Their states, at most eight columns for
// each thread, lie in scratch until they are merged. `num_columns` is that of all items.
int64_t sections_at_once(int64_t num_columns, int num_threads) {
  return num_threads == 1 ? 1 : std::max<int64_t>(1, 8 * num_threads / num_columns);
}

// The most columns of an item: as many as a call takes, unless threads would have no work.
int64_t columns_per_item(int64_t num_columns, int64_t num_sections, int num_threads, int64_t most_columns) {
  const int64_t at_once = std::min(num_sections, sections_at_once(num_columns, num_threads));
  const int64_t per_thread = num_columns * at_once / num_threads / kMostColumns * kMostColumns;
  return std::clamp(per_thread, kMostColumns, most_columns);
}

int64_t columns_per_token(const LatentHeads& heads) {
  return round_up(heads.num_heads, kColumnHeads) / kColumnHeads;
}

// The numbers of positions and of sections that a token sees.
int64_t seen_by(const AttentionBatch& batch, const ChosenPositions& chosen, int64_t token) {
  return chosen.limits(batch, token) ? chosen.count : batch.until(token);
}
int64_t sections_of(const AttentionBatch& batch, const ChosenPositions& chosen, int64_t token) {
  return (seen_by(batch, chosen, token) - 1) / kSectionPositions + 1;
}

struct Scratch {
  Scratch(const LatentHeads& heads, int64_t tokens, int num_threads) {
    const int64_t rows = tokens * heads.num_heads;
    const int64_t state = latent_state_floats(heads.kv_rank) * 4;
    activations = layout.add(rows * activation_bytes(std::max(heads.nope_dim, heads.kv_rank)));
    query = layout.add(rows * heads.vector_dim() * 4);
    attended = layout.add(rows * heads.kv_rank * 4);
    vectors = layout.add(num_threads * most_latent_floats(heads.vector_dim(), heads.kv_rank) * 4);
    // Either totals and states of the next section for the columns of an item, for each thread; or totals for
    // the columns of all items, at most four for each thread, and the states of sections_at_once.
    states = layout.add(num_threads * std::max<int64_t>(12, 2 * most_latent_columns()) * state);
  }
  ScratchLayout layout;
  int64_t activations, query, attended, vectors, states;
};

// out[t][h] = matrix_h x[t][h], where matrix_h is `rows` rows of the matrix. Rows of x are x_row floats
// apart, and rows of out are out_row floats apart. `activations` receives the quantised x if the matrix is
// quantised.
void multiply_heads(Runtime& runtime, const MatrixView& matrix, int64_t num_heads, int64_t num_tokens,
                    const float* x, int64_t x_row, uint8_t* activations, float* out, int64_t out_row) {
  const KernelTable& table = runtime.kernels();
  const int64_t cols = matrix.cols, rows = matrix.rows / num_heads, blocks = blocks_of(rows);
  const bool quantized = is_quantized(matrix.format);
  const int64_t row_bytes = quantized ? activation_bytes(cols) : x_row * 4;
  if (quantized) {
    quantize_tokens(runtime, x, x_row, cols, num_tokens * num_heads, activations, ColumnOrder(matrix));
  }
  const uint8_t* from = quantized ? activations : reinterpret_cast<const uint8_t*>(x);
  runtime.parallel_for(
      num_heads * blocks, kBlockRows * cols * num_tokens,
      [&](int64_t begin, int64_t end, int worker) {
        while (begin < end) {
          const int64_t head = begin / blocks, first = begin % blocks * kBlockRows;
          const int64_t next = std::min(end, (head + 1) * blocks);
          table.matmul[int(matrix.format)]({
              .format = matrix.format,
              .weights = matrix.data,
              .cols = cols,
              .row_begin = head * rows + first,
              .row_end = head * rows + std::min(rows, first + (next - begin) * kBlockRows),
              .x = from + head * row_bytes,
              .x_stride = num_heads * row_bytes,
              .x_index = nullptr,
              .y = out + head * out_row + first,
              .y_stride = num_heads * out_row,
              .y_index = nullptr,
              .num_tokens = num_tokens,
              .next_weights = nullptr,
              .tuning = runtime.tuning(matrix.format),
              .scratch = runtime.product_scratch(worker),
          });
          begin = next;
        }
      },
      runtime.blocks_together(kBlockRows));
}

// Lists the columns of tokens [begin, end), up to `most_columns` of one sequence per item.
std::vector<Item> list_items(const LatentHeads& heads, const AttentionBatch& batch,
                             const ChosenPositions& chosen, int64_t begin, int64_t end, int64_t most_columns,
                             const float* query, float* attended) {
  const int64_t per_token = columns_per_token(heads);
  std::vector<Item> items;
  for (int64_t token = begin; token < end; ++token) {
    const int32_t* blocks = batch.block_table + batch.sequence[token] * batch.max_blocks;
    const int32_t* positions =
        chosen.limits(batch, token) ? chosen.positions + token * chosen.count : nullptr;
    for (int64_t c = 0; c < per_token; ++c) {
      const int64_t row = (token - begin) * heads.num_heads + c * kColumnHeads;
      if (items.empty() || items.back().num_columns == most_columns || items.back().blocks != blocks ||
          items.back().positions != positions) {
        items.push_back({});
        items.back().blocks = blocks;
        items.back().positions = positions;
      }
      Item& item = items.back();
      item.columns[item.num_columns] = {query + row * heads.vector_dim(),
                                        std::min(kColumnHeads, heads.num_heads - c * kColumnHeads),
                                        seen_by(batch, chosen, token) - 1, nullptr};
      item.out[item.num_columns] = attended + row * heads.kv_rank;
      ++item.num_columns;
      item.num_sections = std::max(item.num_sections, sections_of(batch, chosen, token));
    }
  }
  return items;
}

// Attention of items over the cached vectors. The sections of a column are merged in ascending order,
// whichever threads computed them.
class Sections {
 public:
  Sections(const KernelTable& table, const LatentLayer& kv, const LatentHeads& heads, float* vectors)
      : table_(table), kv_(kv), heads_(heads), vectors_(vectors) {}

  int64_t state_floats() const { return latent_state_floats(heads_.kv_rank); }

  // Writes the states of one section, one after another, to `states`.
  void attend(const Item& item, int64_t section, float* states, int worker) const {
    LatentColumn columns[kAmxColumns];
    int64_t count = 0;
    for (int64_t c = 0; c < item.num_columns; ++c) {
      if (!sees(item, c, section)) continue;
      columns[count] = item.columns[c];
      columns[count++].state = states + c * state_floats();
    }
    table_.latent_attention({
        .kv = kv_,
        .blocks = item.blocks,
        .positions = item.positions,
        .columns = columns,
        .num_columns = count,
        .begin = section * kSectionPositions,
        .value_dim = heads_.kv_rank,
        .scale = heads_.scale,
        .scratch = vectors_ + worker * table_.latent_floats(kv_.dim, heads_.kv_rank),
    });
  }

  void merge(const Item& item, int64_t section, const float* next, float* totals) const {
    for (int64_t c = 0; c < item.num_columns; ++c) {
      if (!sees(item, c, section)) continue;
      table_.latent_merge(next + c * state_floats(), heads_.kv_rank, item.columns[c].num_heads,
                          totals + c * state_floats());
    }
  }

  void finish(const Item& item, const float* totals) const {
    for (int64_t c = 0; c < item.num_columns; ++c) {
      table_.latent_finish(totals + c * state_floats(), heads_.kv_rank, item.columns[c].num_heads,
                           item.out[c]);
    }
  }

 private:
  static bool sees(const Item& item, int64_t column, int64_t section) {
    return item.columns[column].last >= section * kSectionPositions;
  }

  const KernelTable& table_;
  const LatentLayer& kv_;
  const LatentHeads& heads_;
  float* vectors_;
};

void attend(Runtime& runtime, const LatentLayer& kv, const LatentHeads& heads, const std::vector<Item>& items,
            int64_t most_columns, float* vectors, float* states) {
  const Sections sections(runtime.kernels(), kv, heads, vectors);
  const int64_t num_items = int64_t(items.size()), item_floats = most_columns * sections.state_floats();
  int64_t most_sections = 0, all_sections = 0;
  for (const Item& item : items) {
    most_sections = std::max(most_sections, item.num_sections);
    all_sections += item.num_sections;
  }
  const int64_t section_work = most_columns * kColumnHeads * kSectionPositions * (kv.dim + heads.kv_rank) / 8;
  const int64_t at_once =
      std::min(most_sections, sections_at_once(num_items * most_columns, runtime.num_threads()));
  if (at_once == 1) {
    // In a prefill the longest items come last: start with them, so that all threads finish together.
    runtime.parallel_for(num_items, section_work * all_sections / num_items,
                         [&](int64_t begin, int64_t end, int worker) {
                           float* totals = states + worker * 2 * item_floats;
                           for (int64_t i = begin; i < end; ++i) {
                             const Item& item = items[size_t(num_items - 1 - i)];
                             sections.attend(item, 0, totals, worker);
                             for (int64_t section = 1; section < item.num_sections; ++section) {
                               sections.attend(item, section, totals + item_floats, worker);
                               sections.merge(item, section, totals + item_floats, totals);
                             }
                             sections.finish(item, totals);
                           }
                         });
    return;
  }
  // Few items over many positions: threads share the sections too. The first section lands in the totals.
  float* totals = states;
  float* next = states + num_items * item_floats;
  for (int64_t first = 0; first < most_sections; first += at_once) {
    const auto state_of = [&](int64_t item, int64_t section) {
      return section == 0 ? totals + item * item_floats
                          : next + (item * at_once + section - first) * item_floats;
    };
    runtime.parallel_for(num_items * at_once, section_work, [&](int64_t begin, int64_t end, int worker) {
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items[size_t(i / at_once)];
        const int64_t section = first + i % at_once;
        if (section < item.num_sections)
          sections.attend(item, section, state_of(i / at_once, section), worker);
      }
    });
    runtime.parallel_for(num_items, at_once * item_floats, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items[size_t(i)];
        const int64_t after = std::min(first + at_once, item.num_sections);
        for (int64_t section = std::max<int64_t>(1, first); section < after; ++section)
          sections.merge(item, section, state_of(i, section), totals + i * item_floats);
        if (first + at_once >= most_sections) sections.finish(item, totals + i * item_floats);
      }
    });
  }
}

}  // namespace

void latent_norm(Runtime& runtime, float* vectors, const float* weight, float eps, int64_t num_tokens,
                 int64_t kv_rank, int64_t dim) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, kv_rank, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      float* vector = vectors + token * dim;
      table.rms_norm(vector, weight, kv_rank, eps, vector);
    }
  });
}

void latent_write(Runtime& runtime, const LatentLayer& kv, const float* vectors, const int64_t* slots,
                  int64_t num_tokens) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(num_tokens, kv.dim * 4, [&](int64_t begin, int64_t end, int) {
    table.latent_write({
        .kv = kv,
        .vectors = vectors + begin * kv.dim,
        .slots = slots + begin,
        .num_tokens = end - begin,
    });
  });
}

void latent_attention(Runtime& runtime, const LatentLayer& kv, const LatentHeads& heads,
                      const AttentionBatch& batch, const ChosenPositions& chosen, float* out) {
  if (batch.num_tokens == 0) return;
  const auto lock = runtime.lock();
  const int64_t num_heads = heads.num_heads, dim = heads.vector_dim();
  const Scratch places(heads, std::min(batch.num_tokens, kTileTokens), runtime.num_threads());
  uint8_t* scratch = runtime.scratch(places.layout.bytes());
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
  float *query = floats(places.query), *attended = floats(places.attended);
  uint8_t* activations = scratch + places.activations;
  for (int64_t begin = 0; begin < batch.num_tokens; begin += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, batch.num_tokens - begin);
    const float* q = batch.q + begin * num_heads * heads.query_dim();
    multiply_heads(runtime, heads.key_up, num_heads, tokens, q, heads.query_dim(), activations, query, dim);
    for (int64_t row = 0; row < tokens * num_heads; ++row) {
      std::memcpy(query + row * dim + heads.kv_rank, q + row * heads.query_dim() + heads.nope_dim,
                  size_t(heads.rope_dim) * 4);
    }
    int64_t num_sections = 0;
    for (int64_t token = begin; token < begin + tokens; ++token)
      num_sections = std::max(num_sections, sections_of(batch, chosen, token));
    const int64_t most_columns = columns_per_item(tokens * columns_per_token(heads), num_sections,
                                                  runtime.num_threads(), runtime.kernels().most_columns);
    attend(runtime, kv, heads,
           list_items(heads, batch, chosen, begin, begin + tokens, most_columns, query, attended),
           most_columns, floats(places.vectors), floats(places.states));
    multiply_heads(runtime, heads.value_up, num_heads, tokens, attended, heads.kv_rank, activations,
                   out + begin * num_heads * heads.value_dim, heads.value_dim);
  }
}

int64_t latent_scratch_bytes(const LatentHeads& heads, int64_t max_tokens, int num_threads) {
  // None of the five parts has more bytes than these products, each of which has a factor of eight to spare.
  const int64_t dims = checked_product(kScratch, {1, heads.nope_dim + heads.rope_dim + heads.kv_rank + 64});
  checked_product(kScratch, {8, 8, kTileTokens, heads.num_heads, dims});
  checked_product(kScratch, {8, 4096, num_threads, dims});
  return Scratch(heads, std::min(max_tokens, kTileTokens), num_threads).layout.bytes();
}

}  // namespace argosy
