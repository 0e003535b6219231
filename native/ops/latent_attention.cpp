#include "ops/latent_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/kernel_table.h"
#include "kernels/latent_args.h"
#include "kernels/low_rank_args.h"
#include "kernels/matmul_args.h"
#include "ops/checked_size.h"

namespace argosy {

namespace {

constexpr int64_t kBlockRows = 32;   // rows per item of a product with one head's matrix
constexpr int64_t kTileTokens = 32;  // latent queries and results exist for this many tokens at a time
constexpr const char* kScratch = "latent attention scratch";

int64_t blocks_of(int64_t rows) { return round_up(rows, kBlockRows) / kBlockRows; }

int64_t sections_of(int64_t entries) { return (entries + kSectionPositions - 1) / kSectionPositions; }

// Columns of one sequence that go through the same entries together.
struct Item {
  struct Part {
    const int32_t* blocks;
    SeenEntries seen;  // of the column that sees most
    int64_t counts[kAmxColumns];

    int64_t num_sections() const { return sections_of(seen.count); }
  };
  const float* q[kAmxColumns];
  int64_t num_heads[kAmxColumns];
  const float* sinks[kAmxColumns];
  float* out[kAmxColumns];
  int64_t num_columns;
  Part parts[kMostSources];  // the sections of one come after those of the one before

  int64_t num_sections() const {
    int64_t sum = 0;
    for (const Part& part : parts) sum += part.num_sections();
    return sum;
  }
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

int64_t columns_per_token(int64_t num_heads) { return round_up(num_heads, kColumnHeads) / kColumnHeads; }

// What attends to entries: LatentHeads after their matrices, or heads that read vectors as they are.
struct Reader {
  int64_t num_heads, dim, value_dim;
  float scale;
  const float* sinks;  // [num_heads]; nullptr: none
};

// Scratch of a Reader: a copy of vectors for each thread, and states.
void add_reader(ScratchLayout& layout, int64_t dim, int64_t value_dim, int num_threads, int64_t& vectors,
                int64_t& states) {
  vectors = layout.add(num_threads * most_latent_floats(dim, value_dim) * 4);
  // Either totals and states of the next section for the columns of an item, for each thread; or totals for
  // the columns of all items, at most four for each thread, and the states of sections_at_once.
  states = layout.add(num_threads * std::max<int64_t>(12, 2 * most_latent_columns()) *
                      latent_state_floats(value_dim) * 4);
}

struct Scratch {
  Scratch(const LatentHeads& heads, int64_t tokens, int num_threads) {
    const int64_t rows = tokens * heads.num_heads;
    activations = layout.add(rows * activation_bytes(std::max(heads.nope_dim, heads.kv_rank)));
    query = layout.add(rows * heads.vector_dim() * 4);
    attended = layout.add(rows * heads.kv_rank * 4);
    add_reader(layout, heads.vector_dim(), heads.kv_rank, num_threads, vectors, states);
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

// out[t][h] += the pair's product with x[t][h], for the tokens that have `which` pair: `down` has rows of its
// own for each head if it is `down_per_head`, and otherwise `up` has.
void add_head_pairs(Runtime& runtime, const LatentPairs* const* pairs, LowRank LatentPairs::* which,
                    bool down_per_head, int64_t num_heads, int64_t num_tokens, const float* x, int64_t x_row,
                    int64_t cols, float* out, int64_t out_row, int64_t rows) {
  std::vector<int64_t> tokens;
  int64_t most_rank = 0;
  for (int64_t token = 0; token < num_tokens; ++token) {
    if (pairs[token] == nullptr || (pairs[token]->*which).rank == 0) continue;
    tokens.push_back(token);
    most_rank = std::max(most_rank, (pairs[token]->*which).rank);
  }
  const KernelTable& table = runtime.kernels();
  runtime.parallel_for(int64_t(tokens.size()) * num_heads, most_rank * (cols + rows),
                       [&](int64_t begin, int64_t end, int worker) {
                         std::vector<float> inner(static_cast<size_t>(most_rank));
                         for (int64_t i = begin; i < end; ++i) {
                           const int64_t token = tokens[size_t(i / num_heads)], head = i % num_heads;
                           const LowRank& pair = pairs[token]->*which;
                           const int64_t bytes = matrix_bytes(pair.format, 1, 1);
                           table.matmul[int(pair.format)]({
                               .format = pair.format,
                               .weights = pair.down + (down_per_head ? head * pair.rank * cols * bytes : 0),
                               .cols = cols,
                               .row_begin = 0,
                               .row_end = pair.rank,
                               .x = reinterpret_cast<const uint8_t*>(x + (token * num_heads + head) * x_row),
                               .x_stride = x_row * 4,
                               .x_index = nullptr,
                               .y = inner.data(),
                               .y_stride = pair.rank,
                               .y_index = nullptr,
                               .num_tokens = 1,
                               .tuning = runtime.tuning(pair.format),
                               .scratch = runtime.product_scratch(worker),
                           });
                           for (int64_t r = 0; r < pair.rank; ++r) inner[size_t(r)] *= pair.scale;
                           table.add_low_rank({
                               .format = pair.format,
                               .up = pair.up + (down_per_head ? 0 : head * pair.rank * rows * bytes),
                               .up_cols = rows,
                               .rank = pair.rank,
                               .row_begin = 0,
                               .row_end = rows,
                               .t = inner.data(),
                               .t_stride = pair.rank,
                               .y = out + (token * num_heads + head) * out_row,
                               .y_stride = out_row,
                               .y_index = nullptr,
                               .num_tokens = 1,
                           });
                           if (pair.factors != nullptr && !down_per_head) {
                             multiply_by(pair.factors + head * rows, rows,
                                         out + (token * num_heads + head) * out_row);
                           }
                         }
                       });
}

// Whether a column of these entries may join the others of a part.
bool joins(const Item::Part& part, const int32_t* blocks, const SeenEntries& seen) {
  return part.blocks == blocks && part.seen.positions == seen.positions && part.seen.first == seen.first;
}

// Lists the columns of tokens [begin, end), up to `most_columns` of one sequence per item; q and out are
// those of token `begin`.
std::vector<Item> list_items(const Reader& reader, const std::vector<LatentSource>& sources,
                             const int32_t* sequence, int64_t begin, int64_t end, int64_t most_columns,
                             const float* q, float* out) {
  const int64_t per_token = columns_per_token(reader.num_heads);
  std::vector<Item> items;
  for (int64_t token = begin; token < end; ++token) {
    const auto blocks_of = [&](const LatentSource& source) {
      return source.block_table + sequence[token] * source.max_blocks;
    };
    for (int64_t c = 0; c < per_token; ++c) {
      const int64_t row = (token - begin) * reader.num_heads + c * kColumnHeads;
      bool joins_last = !items.empty() && items.back().num_columns < most_columns;
      for (size_t s = 0; joins_last && s < sources.size(); ++s)
        joins_last = joins(items.back().parts[s], blocks_of(sources[s]), sources[s].seen[size_t(token)]);
      if (!joins_last) items.push_back({});
      Item& item = items.back();
      for (size_t s = 0; s < sources.size(); ++s) {
        Item::Part& part = item.parts[s];
        const SeenEntries& seen = sources[s].seen[size_t(token)];
        const int64_t most = std::max(part.seen.count, seen.count);
        part.blocks = blocks_of(sources[s]);
        part.counts[item.num_columns] = seen.count;
        part.seen = {seen.positions, seen.first, most};
      }
      item.q[item.num_columns] = q + row * reader.dim;
      item.num_heads[item.num_columns] = std::min(kColumnHeads, reader.num_heads - c * kColumnHeads);
      item.sinks[item.num_columns] = reader.sinks != nullptr ? reader.sinks + c * kColumnHeads : nullptr;
      item.out[item.num_columns] = out + row * reader.value_dim;
      ++item.num_columns;
    }
  }
  return items;
}

// Attention of items over the cached vectors. The sections of a column are merged in ascending order,
// whichever threads computed them.
class Sections {
 public:
  Sections(const KernelTable& table, const std::vector<LatentSource>& sources, const Reader& reader,
           float* vectors)
      : table_(table), sources_(sources), reader_(reader), vectors_(vectors) {}

  int64_t state_floats() const { return latent_state_floats(reader_.value_dim); }

  // Writes the states of one section, one after another, to `states`.
  void attend(const Item& item, int64_t section, float* states, int worker) const {
    const Place place = find(item, section);
    const Item::Part& part = item.parts[place.source];
    LatentColumn columns[kAmxColumns];
    int64_t count = 0;
    for (int64_t c = 0; c < item.num_columns; ++c) {
      if (part.counts[c] <= place.begin) continue;
      columns[count++] = {item.q[c], item.num_heads[c], part.counts[c] - 1, states + c * state_floats()};
    }
    table_.latent_attention({
        .kv = sources_[place.source].kv,
        .blocks = part.blocks,
        .positions = part.seen.positions,
        .first = part.seen.first,
        .columns = columns,
        .num_columns = count,
        .begin = place.begin,
        .value_dim = reader_.value_dim,
        .scale = reader_.scale,
        .scratch = vectors_ + worker * table_.latent_floats(reader_.dim, reader_.value_dim),
    });
  }

  void merge(const Item& item, int64_t section, const float* next, float* totals) const {
    const Place place = find(item, section);
    for (int64_t c = 0; c < item.num_columns; ++c) {
      if (item.parts[place.source].counts[c] <= place.begin) continue;
      table_.latent_merge(next + c * state_floats(), reader_.value_dim, item.num_heads[c],
                          totals + c * state_floats());
    }
  }

  void finish(const Item& item, const float* totals) const {
    for (int64_t c = 0; c < item.num_columns; ++c) {
      table_.latent_finish(totals + c * state_floats(), reader_.value_dim, item.num_heads[c], item.sinks[c],
                           item.out[c]);
    }
  }

 private:
  struct Place {
    size_t source;
    int64_t begin;  // of the section among the source's entries
  };
  static Place find(const Item& item, int64_t section) {
    size_t source = 0;
    while (section >= item.parts[source].num_sections()) section -= item.parts[source++].num_sections();
    return {source, section * kSectionPositions};
  }

  const KernelTable& table_;
  const std::vector<LatentSource>& sources_;
  const Reader& reader_;
  float* vectors_;
};

void attend(Runtime& runtime, const std::vector<LatentSource>& sources, const Reader& reader,
            const std::vector<Item>& items, int64_t most_columns, float* vectors, float* states) {
  const Sections sections(runtime.kernels(), sources, reader, vectors);
  const int64_t num_items = int64_t(items.size()), item_floats = most_columns * sections.state_floats();
  int64_t most_sections = 0, all_sections = 0;
  for (const Item& item : items) {
    most_sections = std::max(most_sections, item.num_sections());
    all_sections += item.num_sections();
  }
  const int64_t section_work =
      most_columns * kColumnHeads * kSectionPositions * (reader.dim + reader.value_dim) / 8;
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
                             for (int64_t section = 1; section < item.num_sections(); ++section) {
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
        if (section < item.num_sections())
          sections.attend(item, section, state_of(i / at_once, section), worker);
      }
    });
    runtime.parallel_for(num_items, at_once * item_floats, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const Item& item = items[size_t(i)];
        const int64_t after = std::min(first + at_once, item.num_sections());
        for (int64_t section = std::max<int64_t>(1, first); section < after; ++section)
          sections.merge(item, section, state_of(i, section), totals + i * item_floats);
        if (first + at_once >= most_sections) sections.finish(item, totals + i * item_floats);
      }
    });
  }
}

// Attends to tokens [begin, end), as list_items.
void attend(Runtime& runtime, const std::vector<LatentSource>& sources, const Reader& reader,
            const int32_t* sequence, int64_t begin, int64_t end, const float* q, float* out, float* vectors,
            float* states) {
  int64_t num_sections = 0;
  for (int64_t token = begin; token < end; ++token) {
    int64_t sections = 0;
    for (const LatentSource& source : sources) sections += sections_of(source.seen[size_t(token)].count);
    num_sections = std::max(num_sections, sections);
  }
  const int64_t most_columns =
      columns_per_item((end - begin) * columns_per_token(reader.num_heads), num_sections,
                       runtime.num_threads(), runtime.kernels().most_columns);
  attend(runtime, sources, reader, list_items(reader, sources, sequence, begin, end, most_columns, q, out),
         most_columns, vectors, states);
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

void multiply_queries(Runtime& runtime, const LatentHeads& heads, const LatentPairs* const* pairs,
                      int64_t num_tokens, float* q) {
  runtime.parallel_for(num_tokens, heads.num_heads * heads.nope_dim, [&](int64_t begin, int64_t end, int) {
    for (int64_t token = begin; token < end; ++token) {
      if (pairs[token] == nullptr || pairs[token]->key.factors == nullptr) continue;
      for (int64_t head = 0; head < heads.num_heads; ++head)
        multiply_by(pairs[token]->key.factors + head * heads.nope_dim, heads.nope_dim,
                    q + (token * heads.num_heads + head) * heads.query_dim());
    }
  });
}

void latent_attention(Runtime& runtime, const LatentLayer& kv, const LatentHeads& heads,
                      const AttentionBatch& batch, const ChosenPositions& chosen, float* out,
                      const LatentPairs* const* pairs) {
  if (batch.num_tokens == 0) return;
  const auto lock = runtime.lock();
  const int64_t num_heads = heads.num_heads, dim = heads.vector_dim();
  const Scratch places(heads, std::min(batch.num_tokens, kTileTokens), runtime.num_threads());
  uint8_t* scratch = runtime.scratch(places.layout.bytes());
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
  float *query = floats(places.query), *attended = floats(places.attended);
  uint8_t* activations = scratch + places.activations;
  const Reader reader = {num_heads, dim, heads.kv_rank, heads.scale, heads.sinks};
  std::vector<LatentSource> sources = {{kv, batch.block_table, batch.max_blocks, {}}};
  for (int64_t token = 0; token < batch.num_tokens; ++token) {
    const bool is_limited = chosen.limits(batch, token);
    sources[0].seen.push_back(
        {is_limited ? chosen.positions + token * chosen.row() : nullptr, 0, chosen.seen_by(batch, token)});
  }
  for (int64_t begin = 0; begin < batch.num_tokens; begin += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, batch.num_tokens - begin);
    const float* q = batch.q + begin * num_heads * heads.query_dim();
    multiply_heads(runtime, heads.key_up, num_heads, tokens, q, heads.query_dim(), activations, query, dim);
    if (pairs != nullptr) {
      add_head_pairs(runtime, pairs + begin, &LatentPairs::key, true, num_heads, tokens, q, heads.query_dim(),
                     heads.nope_dim, query, dim, heads.kv_rank);
    }
    for (int64_t row = 0; row < tokens * num_heads; ++row) {
      std::memcpy(query + row * dim + heads.kv_rank, q + row * heads.query_dim() + heads.nope_dim,
                  size_t(heads.rope_dim) * 4);
    }
    attend(runtime, sources, reader, batch.sequence, begin, begin + tokens, query, attended,
           floats(places.vectors), floats(places.states));
    multiply_heads(runtime, heads.value_up, num_heads, tokens, attended, heads.kv_rank, activations,
                   out + begin * num_heads * heads.value_dim, heads.value_dim);
    if (pairs != nullptr) {
      add_head_pairs(runtime, pairs + begin, &LatentPairs::value, false, num_heads, tokens, attended,
                     heads.kv_rank, heads.kv_rank, out + begin * num_heads * heads.value_dim, heads.value_dim,
                     heads.value_dim);
    }
  }
}

int64_t latent_scratch_bytes(const LatentHeads& heads, int64_t max_tokens, int num_threads) {
  // None of the five parts has more bytes than these products, each of which has a factor of eight to spare.
  const int64_t dims = checked_product(kScratch, {1, heads.nope_dim + heads.rope_dim + heads.kv_rank + 64});
  checked_product(kScratch, {8, 8, kTileTokens, heads.num_heads, dims});
  checked_product(kScratch, {8, 4096, num_threads, dims});
  return Scratch(heads, std::min(max_tokens, kTileTokens), num_threads).layout.bytes();
}

void shared_attention(Runtime& runtime, const std::vector<LatentSource>& sources, const SharedHeads& heads,
                      const float* q, const int32_t* sequence, int64_t num_tokens, float* out) {
  const auto lock = runtime.lock();
  const Reader reader = {heads.num_heads, heads.dim, heads.dim, heads.scale, heads.sinks};
  ScratchLayout layout;
  int64_t vectors = 0, states = 0;
  add_reader(layout, heads.dim, heads.dim, runtime.num_threads(), vectors, states);
  uint8_t* scratch = runtime.scratch(layout.bytes());
  for (int64_t begin = 0; begin < num_tokens; begin += kTileTokens) {
    const int64_t at = begin * heads.num_heads * heads.dim;
    attend(runtime, sources, reader, sequence, begin, std::min(begin + kTileTokens, num_tokens), q + at,
           out + at, reinterpret_cast<float*>(scratch + vectors), reinterpret_cast<float*>(scratch + states));
  }
}

int64_t shared_scratch_bytes(int64_t dim, int num_threads) {
  checked_product(kScratch, {8, 4096, num_threads, 2 * dim + 64});
  ScratchLayout layout;
  int64_t vectors = 0, states = 0;
  add_reader(layout, dim, dim, num_threads, vectors, states);
  return layout.bytes();
}

void multiply_groups(Runtime& runtime, const MatrixView& matrix, int64_t num_groups, const float* x,
                     int64_t num_tokens, float* out) {
  const auto lock = runtime.lock();
  const int64_t rows = matrix.rows / num_groups;
  uint8_t* activations =
      runtime.scratch(group_scratch_bytes(num_groups, matrix.cols, std::min(num_tokens, kTileTokens)));
  for (int64_t begin = 0; begin < num_tokens; begin += kTileTokens) {
    multiply_heads(runtime, matrix, num_groups, std::min(kTileTokens, num_tokens - begin),
                   x + begin * num_groups * matrix.cols, matrix.cols, activations,
                   out + begin * num_groups * rows, rows);
  }
}

int64_t group_scratch_bytes(int64_t num_groups, int64_t cols, int64_t max_tokens) {
  checked_product(kScratch, {8, kTileTokens, num_groups, cols + 64});
  return std::min(max_tokens, kTileTokens) * num_groups * activation_bytes(cols);
}

}  // namespace argosy
