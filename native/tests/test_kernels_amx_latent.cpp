// Latent attention on the tiles of AMX meets float64, and a token has the same bits wherever it is computed.
// On a processor without AMX, there is nothing to check; `make test-emulated` runs this file on an emulated
// one.

#include <algorithm>
#include <optional>

#include "kernels/latent_args.h"
#include "ops/latent_attention.h"
#include "tests/kernel_cases.h"

namespace argosy::testing {
namespace {

#if defined(__x86_64__)

// A sequence's latent vectors. Every place after its end, and every other block, holds NaN.
struct Latents {
  Latents(int64_t length, int64_t dim, int64_t block, KvFormat format, unsigned seed)
      : num_blocks(length / block + 3), kv({KvShape::latent(dim)}, {num_blocks, 1}, block, format) {
    for (int64_t i = 0; i < num_blocks; ++i) blocks.push_back(int32_t(num_blocks - 1 - i));
    std::swap(blocks[0], blocks[size_t(num_blocks / 2)]);
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < num_blocks * block; ++i) slots.push_back(i);
    write(slots, std::vector<float>(size_t(num_blocks * block * dim), NAN));
    put(0, normal(length * dim, seed));
  }

  // Writes vectors from a position on.
  void put(int64_t position, const std::vector<float>& vectors) {
    std::vector<int64_t> slots;
    for (size_t i = 0; i < vectors.size() / size_t(layer().dim); ++i, ++position) {
      slots.push_back(slot_of(position));
    }
    write(slots, vectors);
  }

  LatentLayer layer() { return kv.latent_layer(0); }

  // The vector that the cache holds.
  std::vector<double> vector(int64_t position) {
    const LatentLayer kv_layer = layer();
    const uint8_t* from = kv_layer.vectors + slot_of(position) * latent_vector_bytes(kv_layer);
    const uint8_t* elements = from + kv_scale_bytes(kv_layer.format, kv_layer.dim);
    const auto half = [](const uint8_t* at) { return double(float_from_f16(read_unaligned<uint16_t>(at))); };
    std::vector<double> found;
    for (int64_t d = 0; d < kv_layer.dim; ++d) {
      found.push_back(kv_layer.format == KvFormat::f32 ? double(read_unaligned<float>(elements + 4 * d))
                      : kv_layer.format == KvFormat::f16
                          ? half(elements + 2 * d)
                          : half(from + d / 32 * 2) * double(int8_t(elements[d])));
    }
    return found;
  }

  int64_t num_blocks;
  std::vector<int32_t> blocks;
  KvCache kv;

 private:
  int64_t slot_of(int64_t position) {
    const int64_t block = layer().block_tokens;
    return blocks[size_t(position / block)] * block + position % block;
  }
  void write(const std::vector<int64_t>& slots, const std::vector<float>& vectors) {
    Runtime runtime(1);
    latent_write(runtime, layer(), vectors.data(), slots.data(), int64_t(slots.size()));
  }
};

const KernelTable& tiles() { return kernel_table("amx"); }

// Floats between two borders that nobody may change, `shift` floats after an aligned address.
struct Guarded {
  Guarded(int64_t floats, int64_t shift)
      : memory(size_t(floats + shift + 2 * kBorder + 16), kGuard), size(floats) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data() + kBorder);
    begin = kBorder + int64_t((64 - address % 64) % 64 / 4) + shift;
    std::fill_n(memory.begin() + begin, size, NAN);
  }
  float* data() { return memory.data() + begin; }
  bool is_whole() const {
    for (int64_t i = 0; i < int64_t(memory.size()); ++i) {
      if ((i < begin || i >= begin + size) && memory[size_t(i)] != kGuard) return false;
    }
    return true;
  }
  static constexpr float kGuard = 12345.0f;
  static constexpr int64_t kBorder = 48;
  std::vector<float> memory;
  int64_t begin, size;
};

// The queries of the i-th column are the i-th of `q`.
struct Columns {
  Columns(int64_t count, int64_t dimensions, unsigned seed)
      : dim(dimensions), q(normal(count * kColumnHeads * dim, seed)) {}
  struct Column {
    int64_t number, num_heads, last;
  };

  // The states of some columns from one call: values of the heads, most, sum.
  std::vector<std::vector<float>> attend(Latents& latents, const std::vector<Column>& columns, int64_t begin,
                                         int64_t value_dim, int64_t shift = 0) const {
    Guarded scratch(tiles().latent_floats(dim, value_dim), shift);
    std::vector<Guarded> states;
    for (size_t i = 0; i < columns.size(); ++i) states.emplace_back(latent_state_floats(value_dim), shift);
    std::vector<LatentColumn> list;
    // Queries lie exactly as far as they are needed, so that a sanitizer detects reads beyond them.
    std::vector<std::vector<float>> queries;
    for (size_t i = 0; i < columns.size(); ++i) {
      const auto from = q.begin() + columns[i].number * kColumnHeads * dim;
      queries.emplace_back(from, from + columns[i].num_heads * dim);
      list.push_back({queries[i].data(), columns[i].num_heads, columns[i].last, states[i].data()});
    }
    LatentAttentionArgs args = {};
    args.kv = latents.layer();
    args.blocks = latents.blocks.data();
    args.columns = list.data();
    args.num_columns = int64_t(list.size());
    args.begin = begin;
    args.value_dim = value_dim;
    args.scale = scale();
    args.scratch = scratch.data();
    tiles().latent_attention(args);
    CHECK(scratch.is_whole());
    std::vector<std::vector<float>> found;
    for (size_t i = 0; i < columns.size(); ++i) {
      CHECK(states[i].is_whole());
      found.push_back({});
      for (int64_t row = 0; row < value_dim + 2; ++row) {  // lanes without a head may hold anything
        const float* from = states[i].data() + row * kColumnHeads;
        found.back().insert(found.back().end(), from, from + columns[i].num_heads);
      }
    }
    return found;
  }

  // The values of a state divided by their sum, and the logarithm of the sum of exponentials, from float64.
  std::vector<double> expected(Latents& latents, const Column& column, int64_t begin,
                               int64_t value_dim) const {
    const int64_t end = std::min(column.last + 1, begin + kSectionPositions), heads = column.num_heads;
    std::vector<double> values(size_t((value_dim + 1) * heads), 0.0), sums(size_t(heads), 0.0);
    for (int64_t p = begin; p < end; ++p) {
      const std::vector<double> vector = latents.vector(p);
      for (int64_t head = 0; head < heads; ++head) {
        const float* row = q.data() + (column.number * kColumnHeads + head) * dim;
        double score = 0;
        for (int64_t d = 0; d < dim; ++d) score += double(row[d]) * vector[size_t(d)];
        const double weight = std::exp(score * double(scale()));
        sums[size_t(head)] += weight;
        for (int64_t d = 0; d < value_dim; ++d)
          values[size_t(d * heads + head)] += weight * vector[size_t(d)];
      }
    }
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t d = 0; d < value_dim; ++d) values[size_t(d * heads + head)] /= sums[size_t(head)];
      values[size_t(value_dim * heads + head)] = std::log(sums[size_t(head)]);
    }
    return values;
  }

  float scale() const { return 1.0f / std::sqrt(float(dim)); }

  int64_t dim;
  std::vector<float> q;
};

// What float64 is compared with.
std::vector<float> normalised(const std::vector<float>& state, int64_t heads, int64_t value_dim) {
  std::vector<float> found(state.begin(), state.begin() + (value_dim + 1) * heads);
  for (int64_t head = 0; head < heads; ++head) {
    const float most = state[size_t(value_dim * heads + head)],
                sum = state[size_t((value_dim + 1) * heads + head)];
    for (int64_t d = 0; d < value_dim; ++d) found[size_t(d * heads + head)] /= sum;
    found[size_t(value_dim * heads + head)] = most + std::log(sum);
  }
  return found;
}

double relative_error(const std::vector<float>& found, const std::vector<double>& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    error += std::pow(double(found[i]) - expected[i], 2);
    size += std::pow(expected[i], 2);
  }
  return std::sqrt(error / size);
}

constexpr KvFormat kFormatsOfVectors[] = {KvFormat::f32, KvFormat::f16, KvFormat::q8};

// The shapes of small models, and the one of DeepSeek and Kimi.
void states_meet_float64() {
  const int64_t shapes[][3] = {// heads, dimensions, dimensions of values
                               {1, 1, 1},    {3, 7, 7},      {16, 16, 16},  {7, 19, 13},
                               {16, 40, 32}, {2, 33, 17},    {16, 48, 33},  {5, 70, 64},
                               {9, 97, 80},  {16, 224, 208}, {16, 576, 512}};
  double largest = 0;
  for (const KvFormat format : kFormatsOfVectors) {
    int number = 0;
    for (const auto& [heads, dim, value_dim] : shapes) {
      Latents latents(kSectionPositions + 60, dim, number % 2 == 0 ? 21 : 32, format, 5);
      const Columns columns(2, dim, 7);
      const int64_t begin = number++ % 3 == 1 ? kSectionPositions : 0;
      const std::vector<Columns::Column> list = {{0, heads, begin + 59}, {1, heads, begin + 31}};
      const auto states = columns.attend(latents, list, begin, value_dim);
      for (size_t i = 0; i < list.size(); ++i) {
        const std::vector<double> expected = columns.expected(latents, list[i], begin, value_dim);
        const double error = relative_error(normalised(states[i], heads, value_dim), expected);
        largest = std::max(largest, error);
        CHECK(error < 2e-5);
      }
    }
  }
  printf("latent attention on tiles: relative error at most %.1e\n", largest);
}

// A column alone, and among others that see more or less; in calls of every size, at any place of the list
// and with scratch and states anywhere.
void a_column_has_the_same_bits_in_every_call() {
  const int64_t dim = 50, value_dim = 35;
  const int64_t lasts[] = {0,   1,   14,  15,  16,  30,  31,  32,  33,  63, 64,
                           100, 127, 128, 200, 223, 224, 254, 255, 256, 270};
  for (const KvFormat format : kFormatsOfVectors) {
    Latents latents(2 * kSectionPositions, dim, 24, format, 5);
    const int64_t count = std::size(lasts);
    const Columns columns(count, dim, 8);
    for (const int64_t begin : {int64_t{0}, kSectionPositions}) {
      std::vector<Columns::Column> all;
      std::vector<std::vector<float>> alone;
      for (int64_t i = 0; i < count; ++i) {
        all.push_back({i, i % 3 == 0 ? 16 : 1 + i % 16, begin + lasts[i]});
        alone.push_back(columns.attend(latents, {all.back()}, begin, value_dim)[0]);
        const std::vector<double> expected = columns.expected(latents, all.back(), begin, value_dim);
        CHECK(relative_error(normalised(alone.back(), all.back().num_heads, value_dim), expected) < 2e-5);
      }
      for (const int64_t size : {int64_t{2}, int64_t{3}, int64_t{7}, tiles().most_columns}) {
        for (int64_t from = 0; from < count; from += size) {
          std::vector<Columns::Column> some;
          for (int64_t i = 0; i < size; ++i) some.push_back(all[size_t((from + i * 8) % count)]);
          const auto together = columns.attend(latents, some, begin, value_dim, from % 16);
          for (size_t i = 0; i < some.size(); ++i)
            CHECK(same_bits(together[i], alone[size_t(some[i].number)]));
        }
      }
    }
  }
}

// A head of a column has the same bits whichever heads are beside it.
void heads_may_be_divided_in_any_way() {
  const int64_t dim = 40, value_dim = 32, last = 77;
  Latents latents(100, dim, 16, KvFormat::f16, 5);
  const Columns columns(1, dim, 9);
  const std::vector<float> whole = columns.attend(latents, {{0, 16, last}}, 0, value_dim)[0];
  for (const int64_t heads : {1, 5, 15}) {
    const std::vector<float> part = columns.attend(latents, {{0, heads, last}}, 0, value_dim)[0];
    for (int64_t row = 0; row < value_dim + 2; ++row) {
      for (int64_t head = 0; head < heads; ++head) {
        CHECK_EQUAL(part[size_t(row * heads + head)], whole[size_t(row * 16 + head)]);
      }
    }
  }
}

// Infinities and NaN in vectors that another column of the call sees.
void what_a_column_does_not_see_does_not_matter() {
  const int64_t dim = 50, value_dim = 35;
  const float specials[] = {NAN, INFINITY, -INFINITY, 3.4e38f};
  for (const KvFormat format : kFormatsOfVectors) {
    for (const float special : specials) {
      if (format == KvFormat::q8 && std::isnan(special)) continue;  // rounds to some number or other
      for (const int64_t place : {0, 34, 35, 49}) {  // in values, in keys only, and at the ends of both
        Latents latents(100, dim, 24, format, 5);
        const Columns columns(4, dim, 10);
        const std::vector<Columns::Column> list = {{0, 16, 40}, {1, 9, 69}, {2, 16, 70}, {3, 16, 99}};
        const auto before = columns.attend(latents, list, 0, value_dim);
        std::vector<float> vector = normal(dim, 11);
        vector[size_t(place)] = special;
        latents.put(70, vector);
        const auto after = columns.attend(latents, list, 0, value_dim);
        CHECK(same_bits(after[0], before[0]));
        CHECK(same_bits(after[1], before[1]));
        for (const size_t i : {size_t{2}, size_t{3}}) {
          for (int64_t d = 0; d < value_dim; ++d) CHECK(std::isnan(after[i][size_t(d * 16)]));
        }
      }
    }
  }
}

// Sequences with latent attention, and their outputs by the operation of native/ops.
struct Model {
  Model(int64_t heads, int64_t nope, int64_t rope, int64_t rank, int64_t value, KvFormat format,
        const std::vector<int64_t>& lengths)
      : key_up(Weights::random(Format::f32, heads * rank, nope, 3)),
        value_up(Weights::random(Format::bf16, heads * value, rank, 4)),
        shape{key_up.view, value_up.view, heads, nope,
              rope,        rank,          value, 1.0f / std::sqrt(float(rank + rope))} {
    // One cache holds both: the blocks of a sequence follow those of the one before.
    int64_t num_blocks = 0;
    for (const int64_t length : lengths) max_blocks = std::max(max_blocks, length / kBlock + 1);
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t i = 0; i < max_blocks; ++i) table.push_back(int32_t(num_blocks + max_blocks - 1 - i));
      num_blocks += max_blocks;
    }
    kv.emplace(std::vector<KvShape>{KvShape::latent(shape.vector_dim())}, KvBlockCounts{num_blocks, 1},
               kBlock, format);
    Runtime runtime(1);
    for (size_t s = 0; s < lengths.size(); ++s) {
      std::vector<int64_t> slots;
      for (int64_t p = 0; p < lengths[s]; ++p) {
        slots.push_back(table[s * size_t(max_blocks) + size_t(p / kBlock)] * kBlock + p % kBlock);
      }
      const std::vector<float> vectors = normal(lengths[s] * shape.vector_dim(), 20 + unsigned(s));
      latent_write(runtime, kv->latent_layer(0), vectors.data(), slots.data(), lengths[s]);
    }
  }

  struct Token {
    int32_t sequence, position, until;
  };

  // With `chosen`, the tokens see only these positions: for each of them as many as the last argument says.
  std::vector<float> attend(Runtime& runtime, const std::vector<Token>& tokens,
                            std::vector<int32_t> chosen = {}, int64_t num_chosen = 0) {
    const int64_t count = int64_t(tokens.size()), row = shape.num_heads * shape.query_dim();
    std::vector<float> q;
    std::vector<int32_t> sequence, order, until;
    for (const Token& token : tokens) {
      const std::vector<float> own = normal(row, unsigned(1000 * token.sequence + token.position));
      q.insert(q.end(), own.begin(), own.end());
      sequence.push_back(token.sequence);
      order.push_back(token.position);
      until.push_back(token.until);
    }
    std::vector<float> out(size_t(count * out_row()), NAN);
    const AttentionBatch batch = {
        .q = q.data(),
        .num_tokens = count,
        .num_heads = shape.num_heads,
        .block_table = table.data(),
        .max_blocks = max_blocks,
        .sequence = sequence.data(),
        .order = order.data(),
        .sees_until = until.data(),
        .scale = shape.scale,
        .window = {},
        .sinks = nullptr,
    };
    const ChosenPositions limit = {chosen.data(), num_chosen};
    latent_attention(runtime, kv->latent_layer(0), shape, batch, chosen.empty() ? ChosenPositions() : limit,
                     out.data());
    return out;
  }

  int64_t out_row() const { return shape.num_heads * shape.value_dim; }

  static constexpr int64_t kBlock = 48;
  Weights key_up, value_up;
  LatentHeads shape;
  int64_t max_blocks = 0;
  std::vector<int32_t> table;
  std::optional<KvCache> kv;
};

// In decode, in chunks and in batches of sequences, on any number of threads. With 130 heads, a token has
// more than half of the columns of a call.
void a_token_has_the_same_bits_in_every_batch_on_any_threads() {
  const int64_t shapes[][5] = {// heads, nope, rope, rank, value
                               {1, 3, 2, 5, 4},
                               {20, 5, 6, 33, 7},
                               {130, 2, 4, 20, 3}};
  int number = 0;
  for (const auto& [heads, nope, rope, rank, value] : shapes) {
    Model model(heads, nope, rope, rank, value, kFormatsOfVectors[number++ % 3], {530, 290});
    std::vector<Model::Token> tokens;
    const auto add = [&](int32_t sequence, int32_t position) {
      tokens.push_back({sequence, position, position + 1});
    };
    for (const int32_t position : {0, 31, 255, 256, 289}) add(0, position);
    tokens.push_back({0, 250, 270});  // it sees later positions
    for (const int32_t position : {3, 270}) add(1, position);
    for (const int32_t position : {511, 512, 529}) {
      if (heads < 100) add(0, position);
    }
    for (int32_t position = 240; position < 280 && heads == 1; ++position) add(1, position);

    const int64_t count = int64_t(tokens.size());
    Runtime alone(1, std::nullopt, tiles()), reference(1, std::nullopt, plain());
    std::vector<float> expected;
    for (int64_t i = 0; i < count; ++i) {
      const std::vector<float> one = model.attend(alone, {tokens[size_t(i)]});
      if (i < 8) CHECK(near(one, model.attend(reference, {tokens[size_t(i)]}), 3e-4));
      expected.insert(expected.end(), one.begin(), one.end());
    }
    const int64_t runs[][2] = {{1, count}, {2, 1}, {3, 4}, {3, count}, {7, 1}};  // threads, tokens at once
    for (const auto& [threads, size] : runs) {
      Runtime runtime(int(threads), std::nullopt, tiles());
      std::vector<float> found;
      for (int64_t begin = 0; begin < count; begin += size) {
        const auto from = tokens.begin() + begin, to = tokens.begin() + std::min(begin + size, count);
        const std::vector<float> piece = model.attend(runtime, std::vector<Model::Token>(from, to));
        found.insert(found.end(), piece.begin(), piece.end());
      }
      CHECK(same_bits(found, expected));
      const int64_t scratch = latent_scratch_bytes(model.shape, size, int(threads));
      CHECK_EQUAL(runtime.scratch_bytes(), Runtime::scratch_size(scratch));
    }
  }
}

// Of a few hundred positions, as an indexer chooses them: one in two, and a stretch left out.
void chosen_positions_have_the_bits_of_a_sequence_of_only_these() {
  constexpr int64_t kLength = 610, kChosen = 290;
  for (const auto& [heads, format] : {std::pair<int64_t, KvFormat>{1, KvFormat::f32}, {20, KvFormat::q8}}) {
    Model all(heads, 5, 6, 33, 7, format, {kLength}), few(heads, 5, 6, 33, 7, format, {kChosen});
    std::vector<int32_t> chosen;
    for (int32_t p = 0; int64_t(chosen.size()) < kChosen; p += p < 200 || p >= 440 ? 1 : 2)
      if (p < 300 || p >= 420) chosen.push_back(p);
    CHECK(chosen.back() < kLength && chosen.back() > kLength - 150);
    const int64_t dim = all.shape.vector_dim();
    const std::vector<float> vectors = normal(kLength * dim, 20);
    std::vector<float> kept;
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < kChosen; ++i) {
      const auto from = vectors.begin() + chosen[size_t(i)] * dim;
      kept.insert(kept.end(), from, from + dim);
      slots.push_back(few.table[size_t(i / Model::kBlock)] * Model::kBlock + i % Model::kBlock);
    }
    for (const int threads : {1, 3}) {
      Runtime runtime(threads, std::nullopt, tiles());
      latent_write(runtime, few.kv->latent_layer(0), kept.data(), slots.data(), kChosen);
      // The token before sees fewer positions than are chosen, so all of them.
      const std::vector<Model::Token> tokens = {{0, 100, 101}, {0, kLength - 1, kLength}};
      std::vector<int32_t> both(size_t(kChosen), -1);
      both.insert(both.end(), chosen.begin(), chosen.end());
      std::vector<float> expected = all.attend(runtime, {tokens[0]});
      const std::vector<float> second = few.attend(runtime, {{0, kLength - 1, kChosen}});
      expected.insert(expected.end(), second.begin(), second.end());
      CHECK(same_bits(all.attend(runtime, tokens, both, kChosen), expected));
      CHECK(!same_bits(all.attend(runtime, {tokens[1]}), second));
    }
  }
}

#endif

}  // namespace
}  // namespace argosy::testing

int main() {
#if defined(__x86_64__)
  using namespace argosy::testing;
  if (std::string(argosy::amx_state()) != "usable") return skip("AMX");
  states_meet_float64();
  a_column_has_the_same_bits_in_every_call();
  heads_may_be_divided_in_any_way();
  what_a_column_does_not_see_does_not_matter();
  a_token_has_the_same_bits_in_every_batch_on_any_threads();
  chosen_positions_have_the_bits_of_a_sequence_of_only_these();
  return check_result();
#else
  return argosy::testing::skip("AMX");
#endif
}
