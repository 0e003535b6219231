// kernel_table.h: every kernel as a function pointer, one table per instruction set, chosen at run time.
//
//   kernel_table("avx2")  ->  the KernelTable of that instruction set; best_kernels(): of the fastest here
//
// A Runtime (ops/runtime.h) holds the table that its operations use, from its construction to its end.
//
// A kernel works on a range (rows of a matrix, tokens of a batch) and allocates nothing; native/ops
// distributes the ranges over threads. Promise: for one row and one token, the floating-point operations and
// their order do not depend on the range, the number of tokens in the call or the alignment of the weights.
// The order differs between instruction sets.
#pragma once

#include <string>
#include <vector>

#include "kernels/formats.h"
#include "kernels/transcode.h"

namespace argosy {

// How far ahead of what it reads a product prefetches quantised weights, in bytes: into the first-level
// cache, and into the second-level cache; 0 disables it.
struct AskAhead {
  const char* name;
  int64_t into_l1, into_l2;
};

[[maybe_unused]] static constexpr AskAhead kAskAheads[] = {{"off", 0, 0},
                                                           {"one_level", 6 << 10, 0},
                                                           {"one_level_far", 12 << 10, 0},
                                                           {"two_levels", 3 << 10, 16 << 10}};

// How products with the weights of one format run on this machine. It changes no result: a probe measures
// which is fastest (docs/decisions/0069).
struct Tuning {
  AskAhead ask_ahead = kAskAheads[0];  // with one token
  // With as many tokens as one tile takes. If it asks for nothing, the next panels are prefetched into the
  // second-level cache, as with more tokens.
  AskAhead few_ask_ahead = kAskAheads[0];
  // AVX-512: from this many tokens on, a tile takes two panels of 16 rows, and one panel with fewer.
  int64_t two_panels_from = 4;
  // From this many tokens on, a product runs on the tiles of AMX; 0: never. Without AMX, it has no effect.
  int64_t amx_from = 0;
};

// A tile of one panel takes at most eight tokens; with more, two panels share each activation.
[[maybe_unused]] static constexpr int64_t kFewestForTwoPanels = 2, kMostForOnePanel = 8;

// The memory of one product on tiles (matmul_amx.h), and where some products split their activations
// (matmul_float_amx.h).
[[maybe_unused]] static constexpr int64_t kAmxScratchBytes = int64_t{736} << 10;
[[maybe_unused]] static constexpr int64_t kSplitScratchBytes = int64_t{1088} << 10;
// Whether products with weights of this format can run on tiles. Those of q2_k and q3_k add up two dot
// products of a group as 16-bit integers, which tiles do not have.
static inline constexpr bool has_amx_product(Format format) {
  return is_quantized(format) && !quant_format(format).is_paired();
}
// In the instruction set `amx`, products with weights of these formats run on tiles always, and split their
// activations into two bfloat16 parts (matmul_float_amx.h).
static inline constexpr bool splits_activations(Format format) {
  return format == Format::bf16 || format == Format::f8;
}
// Tokens of a tile of split activations.
[[maybe_unused]] static constexpr int64_t kSplitTokens = 16;
// Bytes of split activations: for each sixteen tokens, for each 32 columns, a tile of high parts and one of
// low parts. A tile has [pairs of columns][16 tokens][2] bfloat16, with zeros for missing columns and tokens;
// if there is only one token in all, [pairs of columns][2].
static inline constexpr int64_t split_bytes(int64_t cols, int64_t num_tokens) {
  return round_up(cols, 32) * 4 * (num_tokens == 1 ? 1 : round_up(num_tokens, kSplitTokens));
}
// The most tokens of which a product keeps the split activations while it goes through its rows, at least 32
// if there are as many: they fit in the scratch, and in the second-level cache.
[[maybe_unused]] static constexpr int64_t kKeptSplitBytes = int64_t{1} << 20;
static inline constexpr int64_t most_split_tokens(int64_t cols) {
  constexpr int64_t kMost = 128, kTwoTiles = 2 * kSplitTokens;
  if (split_bytes(cols, kMost) <= kKeptSplitBytes) return kMost;
  const int64_t fit = kKeptSplitBytes / split_bytes(cols, kTwoTiles);
  return fit > 1 ? fit * kTwoTiles : kTwoTiles;
}
// At its beginning: the operations of all products since it was zeros. Other threads may read them.
struct ProductCounts {
  uint64_t in_tiles, all;
};

// y[t][r - row_begin] = sum over c of W[r][c] * x[t][c]
struct MatmulArgs {
  const uint8_t* weights;  // the whole matrix
  int64_t cols;
  int64_t row_begin, row_end;  // for panels, row_begin is a multiple of 16
  const uint8_t* x;  // token t begins at x + x_stride * (x_index ? x_index[t] : t); float32 [cols], or
  int64_t x_stride;  //   the output of quantize_activations if weights are in panels. x_stride in bytes
  const int32_t* x_index;
  float* y;          // token t begins at y + y_stride * (y_index ? y_index[t] : t)
  int64_t y_stride;  // in floats
  const int32_t* y_index;
  int64_t num_tokens;
  const uint8_t* next_weights = nullptr;  // the panels that the caller reads next: a prefetch hint
  Tuning tuning = {};
  // KernelTable::product_scratch_bytes of this thread, aligned to 64. nullptr: a product without tiles; those
  // that split activations need it.
  uint8_t* scratch = nullptr;
  // What KernelTable::split_activations wrote of all tokens, aligned to 64; nullptr: the product splits x.
  const uint8_t* split_x = nullptr;
  // The product before, with this scratch, had the same activations: x and x_index, with the same content.
  bool repeats_x = false;
};

// Columns [begin, end) of sixteen tokens, or of those that are left: the tokens from 16 * tile on.
struct SplitArgs {
  const float* x;            // of the first token
  int64_t x_stride;          // in floats
  int64_t num_tokens, cols;  // in all
  int64_t tile, begin, end;  // begin is a multiple of 32
  uint8_t* out;              // split_bytes(cols, num_tokens), aligned to 64
};

// The format of keys, values and latent vectors. In q8, 32 dimensions of one position (of one head) are
// signed bytes that share a float16 scale: an element is its byte times the scale. Scales belong to a
// position, so that writing one changes no other.
enum class KvFormat { f32, f16, q8 };

// Keys lie in tiles of sixteen positions.
[[maybe_unused]] static constexpr int64_t kKeyTile = 16;
// Dimensions that share a scale, and the bytes of that many in a tile of q8 keys.
[[maybe_unused]] static constexpr int64_t kKvGroup = 32;
[[maybe_unused]] static constexpr int64_t kKeyGroupBytes = kKeyTile * (2 + kKvGroup);

// The memory of one layer's keys and values. A block holds, for each KV head, tiles of sixteen positions:
//   keys    [head_dim][16]: one load brings one dimension of sixteen positions;
//           q8: for each 32 dimensions (the last group may have fewer) the scales [16], then the bytes
//           [32][16];
//   values  [16][head_dim padded to 16];
//           q8: then the scales [16][groups of 32 dimensions].
// Positions of a block are padded to 16.
struct KvLayer {
  uint8_t* keys;
  uint8_t* values;
  int64_t block_tokens, kv_heads, head_dim;
  KvFormat format;
};

static inline int64_t kv_element_bytes(KvFormat format) {
  return format == KvFormat::f32 ? 4 : format == KvFormat::f16 ? 2 : 1;
}
static inline int64_t kv_groups(int64_t dim) { return (dim + kKvGroup - 1) / kKvGroup; }
// Bytes of the scales of one position's `dim` elements.
static inline int64_t kv_scale_bytes(KvFormat format, int64_t dim) {
  return format == KvFormat::q8 ? 2 * kv_groups(dim) : 0;
}
static inline int64_t kv_padded_dim(const KvLayer& kv) { return round_up(kv.head_dim, 16); }
static inline int64_t key_tile_bytes(const KvLayer& kv) {
  return kKeyTile * (kv.head_dim * kv_element_bytes(kv.format) + kv_scale_bytes(kv.format, kv.head_dim));
}
static inline int64_t value_tile_bytes(const KvLayer& kv) {
  return kKeyTile *
         (kv_padded_dim(kv) * kv_element_bytes(kv.format) + kv_scale_bytes(kv.format, kv.head_dim));
}
static inline int64_t tiles_per_block(const KvLayer& kv) {
  return (kv.block_tokens + kKeyTile - 1) / kKeyTile;
}
// The lane of a position: its number in the tiles of the sequence's blocks, padding included.
static inline int64_t lane_of(const KvLayer& kv, int64_t position) {
  return position / kv.block_tokens * tiles_per_block(kv) * kKeyTile + position % kv.block_tokens;
}
// Bytes of one head in one block.
static inline int64_t key_head_bytes(const KvLayer& kv) { return tiles_per_block(kv) * key_tile_bytes(kv); }
static inline int64_t value_head_bytes(const KvLayer& kv) {
  return tiles_per_block(kv) * value_tile_bytes(kv);
}
static inline uint8_t* key_head(const KvLayer& kv, int64_t block, int64_t head) {
  return kv.keys + (block * kv.kv_heads + head) * key_head_bytes(kv);
}
static inline uint8_t* value_head(const KvLayer& kv, int64_t block, int64_t head) {
  return kv.values + (block * kv.kv_heads + head) * value_head_bytes(kv);
}

// The vectors of one layer with latent attention: [blocks][block_tokens][dim]. A q8 vector has its scales
// [groups of 32 dimensions] before its bytes.
struct LatentLayer {
  uint8_t* vectors;
  int64_t block_tokens, dim;
  KvFormat format;
};

static inline int64_t latent_vector_bytes(const LatentLayer& kv) {
  return kv_scale_bytes(kv.format, kv.dim) + kv.dim * kv_element_bytes(kv.format);
}

struct KvWriteArgs {
  KvLayer kv;
  const float* keys;     // [num_tokens][kv_heads][head_dim]
  const float* values;   // the same
  const int64_t* slots;  // block * block_tokens + offset
  int64_t num_tokens;
  int64_t kv_head;  // the one to write
};

struct LatentWriteArgs {
  LatentLayer kv;
  const float* vectors;  // [num_tokens][dim]
  const int64_t* slots;  // block * block_tokens + offset
  int64_t num_tokens;
};

// A call processes four tiles at a time, for up to this many (token, head) pairs at once.
[[maybe_unused]] static constexpr int64_t kStretchKeys = 64;
[[maybe_unused]] static constexpr int64_t kMaxQueries = 32;
// The same on tiles, where a call splits the keys for all of them.
[[maybe_unused]] static constexpr int64_t kAmxQueries = 128;
// Lanes of a section. Each section has a running maximum of its own, and the sections that a token sees are
// merged in ascending order, so threads can divide the sections of one token among themselves.
[[maybe_unused]] static constexpr int64_t kSectionKeys = 1024;

// Tokens of one sequence against one KV head.
struct AttentionArgs {
  KvLayer kv;
  int64_t kv_head;
  const float* q;             // [num_tokens][num_heads][head_dim]
  float* out;                 // the same
  const int32_t* order;       // [num_tokens], the index of a token in its sequence
  const int32_t* sees_until;  // [num_tokens], the end of the positions it sees; nullptr: its own is the last
  int64_t num_tokens, num_heads;
  const int32_t* blocks;  // the sequence's block table: position p lies in blocks[p / block_tokens]
  float scale;
  int64_t window;                // positions begin at order - window + 1; 0: at 0
  float* scratch;                // KernelTable::attention_floats(head_dim)
  const float* sinks = nullptr;  // [num_heads], a score that takes weight and adds no value; nullptr: none
  // At least 0: the call computes this section only. It writes the states of the queries that see the
  // section, and not `out`.
  int64_t section = -1;
  float* states = nullptr;  // [num_tokens][heads of the KV head][attention_state_floats(head_dim)]
};

// The activation of a feed-forward network, between its first two products and its last.
//   silu     silu(gate) * up, where silu(x) = x / (1 + e^-x)  (Shazeer, arXiv:2002.05202)
//   clamped  g * sigmoid(alpha * g) * (u + 1), where g is gate, at most `limit`, and u is up, from -limit to
//            limit  (gpt-oss)
//   gelu_tanh  gelu(gate) * up, where gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
//            (arXiv:1606.08415)
struct Activation {
  enum class Kind { silu, clamped, gelu_tanh };
  Kind kind = Kind::silu;
  float limit = 0, alpha = 0;
};

// out[t][i] = activation(gate[t][i] + gate_bias[i], up[t][i] + up_bias[i])
struct ActivateArgs {
  Activation activation;
  const float *gate, *up;            // [num_tokens][n], `stride` floats apart
  const float *gate_bias, *up_bias;  // [n]; nullptr: none
  int64_t stride;
  int64_t num_tokens, n;
  float* out;  // [num_tokens][n]; may be gate or up
  int64_t out_stride;
};

// The gates of num_heads value heads, in place. Those of token t begin at a + t * a_stride and
// b + t * b_stride.
struct DeltaGatesArgs {
  float *a, *b;
  int64_t a_stride, b_stride;
  const float *rate, *dt_bias;  // [num_heads]
  int64_t num_tokens, num_heads;
};

// Channels of a causal convolution, in place. `stride` separates the positions of `weights` and `window`.
struct DeltaConvArgs {
  float* x;  // token t's channels begin at x + t * x_stride
  int64_t x_stride;
  const float* weights;  // [width][channels]
  float* window;  // [width - 1][channels]: the inputs before the first token; on return, before the next
  int64_t stride, width, channels, num_tokens;
  float length, eps;  // if length > 0, the result is x / sqrt(sum of x^2 + eps) * length
};

// One value head. The q of token t begins `stride` floats after the q of token t - 1; k, v and z likewise.
struct DeltaRuleArgs {
  const float *q, *k, *v;
  int64_t stride;
  const float* z;
  int64_t z_stride;
  const float* decay;
  int64_t decay_stride;
  const float* beta;
  int64_t beta_stride;
  float* state;  // [key_dim][value_dim]
  float* out;
  int64_t out_stride;
  const float* norm;  // [value_dim]
  float eps;
  int64_t num_tokens, key_dim, value_dim;
};

enum class Score { softmax, sigmoid };
enum class GroupScore { max, top2 };

// How a token's experts follow from its logits (route.h).
struct RouteRule {
  int64_t k;                 // experts per token
  Score score;               // applied to all logits
  const float* choice_bias;  // [num_experts], added to the scores for the choice only; nullptr: none
  int64_t num_groups;        // groups have equal size and consecutive experts
  int64_t kept_groups;       // number of best groups kept; together they hold at least k experts
  GroupScore group_score;    // top2 needs groups of at least two experts
  bool renormalize;          // weights are divided by their sum plus renormalize_eps
  float renormalize_eps;
  float scale;                          // multiplies the weights, last
  const float* expert_scale = nullptr;  // [num_experts], also multiplies the weight of each; nullptr: none
};

struct RouteArgs {
  RouteRule rule;
  const float* logits;  // [num_experts]
  int64_t num_experts;
  int32_t* ids;    // [k]
  float* weights;  // [k]
  float* scratch;  // route_scratch_floats(num_experts)
};

// Latent attention: a column is sixteen heads of one token, which go through the vectors together. A call
// takes at most two columns, or on tiles sixteen, because it splits the vectors for all of them. Positions
// are processed in sections.
[[maybe_unused]] static constexpr int64_t kColumnHeads = 16;
[[maybe_unused]] static constexpr int64_t kMostColumns = 2, kAmxColumns = 16;
[[maybe_unused]] static constexpr int64_t kSectionPositions = 256;

struct LatentColumn {
  const float* q;     // [num_heads][dim]
  int64_t num_heads;  // at most kColumnHeads
  int64_t last;       // the last position that the token sees
  float* state;       // latent_state_floats(value_dim): values [value_dim][kColumnHeads], most, sum
};

// Columns of one sequence against the section of positions that starts at `begin`; every column sees it.
struct LatentAttentionArgs {
  LatentLayer kv;
  const int32_t* blocks;  // the sequence's block table: position p lies in blocks[p / block_tokens]
  const LatentColumn* columns;
  int64_t num_columns;
  int64_t begin;
  int64_t value_dim;  // the values are the first value_dim elements of a vector
  float scale;
  float* scratch;  // KernelTable::latent_floats(dim, value_dim)
};

enum class Gelu { erf, tanh, quick };

// How `linear` finishes a sum: y = sum, y = y + sum, y = y * sum, or y = activation(sum).
enum class Finish { store, add, multiply, gelu_erf, gelu_tanh, gelu_quick, silu };

// linear with bfloat16 activations: tokens in a panel, and most rows of the weights in a call.
[[maybe_unused]] static constexpr int64_t kPanelTokens = 64;
[[maybe_unused]] static constexpr int64_t kLinearRows = 48;
// Tokens that are rounded in one call.
[[maybe_unused]] static constexpr int64_t kRoundedTokens = 16;

// Bytes of a panel: [pairs of columns][kPanelTokens][2] bfloat16.
static inline constexpr int64_t token_panel_bytes(int64_t cols) { return (cols + 1) / 2 * kPanelTokens * 4; }

struct PanelArgs {
  const float* x;
  int64_t x_stride;
  int64_t num_tokens, cols;  // at most kRoundedTokens tokens
  uint8_t* panel;            // where the first of them lies in its panel
};

// y[t][r - row_begin] is made of bias[r] + sum over c of W[r][c] * x[t][c], for the tokens of a panel.
struct LinearArgs {
  const uint8_t* weights;  // the whole matrix
  int64_t cols;
  int64_t row_begin, row_end;  // at most kLinearRows
  const uint8_t* panel;
  int64_t num_tokens;
  const float* bias;  // one for each row; nullptr: none
  Finish finish;
  float* y;
  int64_t y_stride;
};

// attend: most queries in a call, and keys in a block.
[[maybe_unused]] static constexpr int64_t kAttendQueries = 64;
[[maybe_unused]] static constexpr int64_t kAttendKeys = 48;

// Queries of one head against all its keys. The row of query i begins at query + i * query_stride, and so on.
struct AttendArgs {
  const float *query, *key, *value;
  int64_t query_stride, key_stride, value_stride;
  int64_t num_queries, num_keys, dim;  // at least one key
  float scale;
  float* out;
  int64_t out_stride;
  float* scratch;  // attend_scratch_floats(dim)
};

// attend with everything rounded to bfloat16: keys in a block.
[[maybe_unused]] static constexpr int64_t kRoundedKeys = 96;

// Keys and values of one head, at most kRoundedKeys.
struct RoundKeysArgs {
  const float *key, *value;
  int64_t key_stride, value_stride;
  int64_t num_keys, dim;
  uint8_t* keys;    // [num_keys][dim] bfloat16
  uint8_t* values;  // [dim][kRoundedKeys] bfloat16
};

// Queries of one head against all its keys, as in AttendArgs.
struct AttendRoundedArgs {
  const float* query;
  int64_t query_stride, num_queries;
  const uint8_t *keys, *values;  // each block follows the one before
  int64_t num_keys, dim;
  float scale;
  float* out;
  int64_t out_stride;
  float* scratch;  // attend_rounded_scratch_floats(dim)
};

// The arguments of transcode(); panels are strips of strip_rows(type) rows.
struct TranscodeArgs {
  const uint8_t* rows_data;
  int64_t rows, cols;
  int64_t interleaved;
  int64_t panel_begin, panel_end;
  uint8_t* matrix;
};

struct KernelTable {
  const char* name;

  void (*matmul[kNumFormats])(const MatmulArgs& args);
  int64_t product_scratch_bytes;  // 0: no product uses scratch
  // x begins at column 32 * group_begin; `activations` is the token's whole row of `cols`.
  void (*quantize_activations)(const float* x, int64_t cols, int64_t group_begin, int64_t group_end,
                               uint8_t* activations);

  // For products whose format splits_activations(); nullptr: there are none.
  void (*split_activations)(const SplitArgs& args);

  // Converts weights in and out. Panels [panel_begin, panel_end) of q8 or q4; `out` is the whole matrix.
  void (*quantize_q8)(const float* weights, int64_t rows, int64_t cols, int64_t panel_begin,
                      int64_t panel_end, uint8_t* out);
  void (*quantize_q4)(const float* weights, int64_t rows, int64_t cols, int64_t panel_begin,
                      int64_t panel_end, uint8_t* out);
  bool (*transcode[kNumBlockTypes])(const TranscodeArgs& args);
  void (*dequantize_row)(Format format, const uint8_t* weights, int64_t cols, int64_t row, float* out);

  // out may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t cols, float eps, float* out);
  // x [num_heads][head_dim]; cosine and sine [num_pairs]. Dimension i rotates with dimension i + num_pairs,
  // or, if pairs are interleaved, dimension 2 i with 2 i + 1.
  void (*rope)(float* x, int64_t num_heads, int64_t head_dim, const float* cosine, const float* sine,
               int64_t num_pairs, bool is_interleaved);
  void (*route)(const RouteArgs& args);
  void (*activate)(const ActivateArgs& args);
  void (*combine)(const float* expert_out, const float* weights, int64_t k, int64_t hidden, float* out);
  void (*add_sigmoid_gated)(const float* x, float gate_logit, int64_t hidden, float* out);

  void (*mul_sigmoid)(const float* gate, int64_t n, float* x);  // x *= sigmoid(gate)
  void (*soft_cap)(float cap, int64_t n, float* x);             // x = cap * tanh(x / cap)

  // For encoders. out may be x; bias may be nullptr.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t cols, float eps,
                     float* out);
  void (*gelu)(Gelu kind, int64_t n, float* x);
  void (*silu)(int64_t n, float* x);
  void (*attend)(const AttendArgs& args);
  // All are nullptr if the CPU has no product of bfloat16.
  void (*round_to_panel)(const PanelArgs& args);
  void (*linear_panel)(const LinearArgs& args);
  void (*round_keys)(const RoundKeysArgs& args);
  void (*attend_rounded)(const AttendRoundedArgs& args);

  void (*kv_write)(const KvWriteArgs& args);
  void (*latent_write)(const LatentWriteArgs& args);
  void (*attention)(const AttentionArgs& args);
  int64_t most_queries;                           // (token, head) pairs that a call processes at once
  int64_t (*attention_floats)(int64_t head_dim);  // the scratch of a call
  // Merges the state of a query's next section into `state`.
  void (*attention_merge)(const float* next, int64_t head_dim, float* state);
  void (*attention_finish)(const float* state, int64_t head_dim, float* out);  // [head_dim]
  void (*delta_gates)(const DeltaGatesArgs& args);
  void (*delta_conv)(const DeltaConvArgs& args);
  void (*delta_rule)(const DeltaRuleArgs& args);

  void (*latent_attention)(const LatentAttentionArgs& args);
  int64_t most_columns;                                      // in a call
  int64_t (*latent_floats)(int64_t dim, int64_t value_dim);  // the scratch of a call
  // Merges the state of a column's next section into `state`.
  void (*latent_merge)(const float* next, int64_t value_dim, int64_t num_heads, float* state);
  void (*latent_finish)(const float* state, int64_t value_dim, int64_t num_heads, float* out);

  // For ops/machine_probe.h. Both return a number that depends on all their work.
  uint64_t (*read_memory)(const uint8_t* data, int64_t nbytes);  // aligned to 64; nbytes is a multiple of 512
  uint64_t (*multiply_int8)(int64_t rounds);                     // int8_products_per_round each
  int64_t int8_products_per_round;
};

// A copy of each query, its scores of a stretch, and its running weighted sums: of a section, and of all.
static inline constexpr int64_t attention_scratch_floats(int64_t head_dim) {
  return kMaxQueries * (kStretchKeys + 3 * round_up(head_dim, kKeyTile) + 2 * kKeyTile);
}
// Of one query: the weighted sum of values; then, in a cache line of their own, the largest score and the sum
// of weights.
static inline constexpr int64_t attention_state_floats(int64_t head_dim) {
  return round_up(head_dim, kKeyTile) + kKeyTile;
}

// Queries and running sums, the weights of a block, three numbers for each query, a block of keys and values.
static inline constexpr int64_t attend_scratch_floats(int64_t dim) {
  return kAttendQueries * (2 * dim + kAttendKeys + 3) + 2 * kAttendKeys * dim;
}

// Queries and running sums, the scores of a block, three numbers for each query.
static inline constexpr int64_t attend_rounded_scratch_floats(int64_t dim) {
  return kPanelTokens * ((dim + 1) / 2 + dim + kRoundedKeys + 3);
}

// For all experts their scores and their worth in the choice, and the worth of each group.
static inline constexpr int64_t route_scratch_floats(int64_t num_experts) { return 3 * num_experts; }

static inline constexpr int64_t latent_state_floats(int64_t value_dim) {
  return (value_dim + 2) * kColumnHeads;
}
// Distance between vectors in the scratch: an odd number of cache lines, so that vectors spread over the sets
// of a cache.
static inline constexpr int64_t latent_stride(int64_t dim) { return (round_up(dim, 16) / 16 | 1) * 16; }
// Vectors of a stretch as float32, and the queries and scores of the columns.
static inline constexpr int64_t latent_scratch_floats(int64_t dim) {
  return kStretchKeys * latent_stride(dim) + kMostColumns * kColumnHeads * (dim + kStretchKeys);
}

// "plain", "avx2", "amx", "avx512": the sets that this CPU and its operating system can run, the best one
// last. "amx" comes before "avx512" until it has been measured on a processor that has it.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that is not in instruction_sets().
const KernelTable& kernel_table(const std::string& name);
// The table of the last of instruction_sets().
const KernelTable& best_kernels();

// The largest KernelTable::attention_floats and most_queries of all instruction sets here.
int64_t most_attention_floats(int64_t head_dim);
int64_t most_attention_queries();
// The largest KernelTable::latent_floats and most_columns.
int64_t most_latent_floats(int64_t dim, int64_t value_dim);
int64_t most_latent_columns();

// "absent": the CPU has no AMX, or not what the kernels need of it; "refused": the system lets this process
// use no tiles; "usable".
const char* amx_state();

// For processes without measurements: the choice that lost least on the machines measured
// (docs/decisions/0069).
Tuning default_tuning();
// Throws std::invalid_argument for a name that is not in kAskAheads.
AskAhead ask_ahead_named(const std::string& name);

}  // namespace argosy
