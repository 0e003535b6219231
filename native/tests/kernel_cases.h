// kernel_cases.h: shared helpers of the kernel tests: random numbers, weights at an odd address, tables.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/coded_block.h"
#include "kernels/half.h"
#include "kernels/kernel_table.h"
#include "kernels/matmul_args.h"
#include "ops/attention.h"
#include "ops/matmul.h"
#include "tests/check.h"

namespace argosy::testing {

// Grouped formats: each number of bits, each kind, each size of a group and each type of scales.
inline const Format kInt4 = grouped_format(0, 128, true), kInt8 = grouped_format(1, 32, false),
                    kUint2 = grouped_format(2, 64, false), kUint3 = grouped_format(3, 128, false),
                    kUint4 = grouped_format(4, 64, true), kUint8 = grouped_format(5, 128, true),
                    kAffine2 = grouped_format(6, 128, true), kAffine3 = grouped_format(7, 32, false),
                    kAffine4 = grouped_format(8, 64, false), kAffine5 = grouped_format(9, 64, true),
                    kAffine6 = grouped_format(10, 128, false), kAffine8 = grouped_format(11, 64, false);
inline const Format kFormats[] = {Format::f32,     Format::f16,
                                  Format::bf16,    Format::f8,
                                  Format::f8_row,  Format::f8_32,
                                  Format::mxfp8,   Format::int8_row,
                                  Format::bnb4,    Format::bnb4_double,
                                  Format::q8,      Format::q4,
                                  Format::q4_1,    Format::q5_0,
                                  Format::q5_1,    Format::q4_k,
                                  Format::q5_k,    Format::q6_k,
                                  Format::q2_k,    Format::q3_k,
                                  Format::iq4_nl,  Format::iq4_xs,
                                  Format::mxfp4,   Format::nvfp4,
                                  Format::int4,    Format::tq2_0,
                                  Format::q2_0,    Format::iq2_xxs,
                                  Format::iq2_xs,  Format::iq2_s,
                                  Format::iq3_xxs, Format::iq3_s,
                                  Format::iq1_s,   Format::iq1_m,
                                  Format::tq1_0,   Format::q1_0,
                                  Format::iq2_k,   Format::iq3_k,
                                  Format::iq4_k,   Format::iq5_k,
                                  Format::iq6_k,   Format::iq2_ks,
                                  Format::iq3_ks,  Format::iq4_ks,
                                  Format::iq5_ks,  Format::iq2_kl,
                                  kInt4,           kInt8,
                                  kUint2,          kUint3,
                                  kUint4,          kUint8,
                                  kAffine2,        kAffine3,
                                  kAffine4,        kAffine5,
                                  kAffine6,        kAffine8};
inline const Format kF8Formats[] = {Format::f8, Format::f8_row, Format::f8_32, Format::mxfp8};
// Block types that hold a whole matrix.
inline const BlockType kBlockTypes[] = {
    BlockType::q8_0,   BlockType::q4_0,   BlockType::q4_1,    BlockType::q5_0,   BlockType::q5_1,
    BlockType::q4_k,   BlockType::q5_k,   BlockType::q6_k,    BlockType::q2_k,   BlockType::q3_k,
    BlockType::iq4_nl, BlockType::iq4_xs, BlockType::mxfp4,   BlockType::nvfp4,  BlockType::iq2_xxs,
    BlockType::iq2_xs, BlockType::iq2_s,  BlockType::iq3_xxs, BlockType::iq3_s,  BlockType::iq1_s,
    BlockType::iq1_m,  BlockType::tq1_0,  BlockType::tq2_0,   BlockType::q1_0,   BlockType::q2_0,
    BlockType::iq2_k,  BlockType::iq3_k,  BlockType::iq4_k,   BlockType::iq5_k,  BlockType::iq6_k,
    BlockType::iq2_ks, BlockType::iq3_ks, BlockType::iq4_ks,  BlockType::iq5_ks, BlockType::iq2_kl};

// Sizes around the vectors (8, 16), the panel (16) and the group (32).
inline const int64_t kSizes[] = {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 70};

inline std::vector<float> normal(int64_t n, unsigned seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = distribution(generator);
  return values;
}

inline bool has_set(const std::string& name) {
  const std::vector<std::string> here = instruction_sets();
  return std::find(here.begin(), here.end(), name) != here.end();
}

// Of the instruction sets that this processor has; says once which ones it lacks.
inline std::vector<const KernelTable*> all_tables() {
  static const bool has_told = [] {
    for (const char* set : {"avx2", "avx512", "amx"}) {
      if (!has_set(set)) printf("not checked here: %s\n", set);
    }
    return true;
  }();
  (void)has_told;
  std::vector<const KernelTable*> tables;
  for (const std::string& name : instruction_sets()) tables.push_back(&kernel_table(name));
  return tables;
}
inline const KernelTable& plain() { return kernel_table("plain"); }

// Formats that float32 weights can be quantised to; the others only come from files.
inline bool is_quantized_here(Format format) { return format <= Format::q4 && !is_f8(format); }

// The columns that a matrix of this format can have: `cols` or, for GGUF's blocks, rounded up to a whole
// block.
inline int64_t cols_of(Format format, int64_t cols) {
  if (is_bnb4(format)) return round_up(cols, kBnb4Block);
  if (is_quantized_here(format) || is_f8(format)) return cols;
  return round_up(cols, is_grouped(format) ? kGroupSize : quant_format(format).block_cols);
}

inline BlockType block_type_of(Format format) {
  for (const BlockType type : kBlockTypes) {
    if (slot_format(type) == format) return type;
  }
  return {};
}

// The two tensors of an FP8 matrix, and the number of its scales.
inline BlockType codes_of(Format format) {
  return format == Format::f8       ? BlockType::f8_codes
         : format == Format::f8_row ? BlockType::f8_row_codes
         : format == Format::f8_32  ? BlockType::f8_32_codes
                                    : BlockType::mxfp8_codes;
}
inline BlockType scales_of(Format format) {
  return format == Format::f8       ? BlockType::f8_scales
         : format == Format::f8_row ? BlockType::f8_row_scales
         : format == Format::f8_32  ? BlockType::f8_32_scales
                                    : BlockType::mxfp8_scales;
}
inline int64_t num_f8_scales(Format format, int64_t rows, int64_t cols) {
  return source_bytes(scales_of(format), rows, cols) / block_bytes(scales_of(format));
}

// The offset of a block's scale in its bytes; a float16 min follows two bytes later.
inline int64_t scale_at(BlockType type) {
  switch (type) {
    case BlockType::q6_k:
      return 208;
    case BlockType::q2_k:
      return 80;
    case BlockType::q3_k:
      return 108;
    case BlockType::tq1_0:
      return 52;
    case BlockType::tq2_0:
      return 64;
    default:
      return 0;
  }
}

inline void put_half(uint8_t* to, float value) {
  const uint16_t half = f16_from_float(value);
  std::memcpy(to, &half, 2);
}

// In a block of iq1_m, the scale is the highest four bits of each of the last four words of 16 bits.
inline void put_iq1_m_scale(uint8_t* block, float value) {
  const uint16_t half = f16_from_float(value);
  for (int i = 0; i < 4; ++i)
    block[49 + 2 * i] = uint8_t((block[49 + 2 * i] & 15) | (half >> 4 * i & 15) << 4);
}

// Random quants and sub-scales, with scales and mins that give weights of order one.
inline std::vector<uint8_t> random_blocks(BlockType type, int64_t rows, int64_t cols, unsigned seed) {
  std::mt19937 generator(seed);
  const QuantFormat quant = quant_format(slot_format(type));
  std::vector<uint8_t> bytes(size_t(rows * block_row_bytes(type, cols)));
  for (uint8_t& byte : bytes) byte = uint8_t(generator());
  if (is_quants(type) || may_be_refused(type)) return bytes;
  const Format format = slot_format(type);
  const float largest = keeps_blocks(format) ? (format <= Format::q1_0 ? 1.0f : 2048.0f)
                        : quant.is_coded()
                            ? 512.0f
                            : float(quant.table != nullptr ? quant.zero : 1 << (quant.bits - 1)) *
                                  (quant.sub_scale_cols > 0 ? 32.0f : 1.0f);
  std::normal_distribution<float> distribution(0.0f, 1.0f);
  if (const int64_t of_row = row_scale_bytes(type); of_row > 0) {
    for (size_t at = 0; at < bytes.size(); at += size_t(block_row_bytes(type, cols))) {
      const float scale = distribution(generator) / largest;
      if (of_row == 4) {
        std::memcpy(&bytes[at], &scale, 4);
      } else {
        put_half(&bytes[at], scale);
      }
    }
    return bytes;
  }
  for (size_t at = size_t(scale_at(type)); at < bytes.size(); at += size_t(block_bytes(type))) {
    const float scale = distribution(generator) / largest;
    if (type == BlockType::mxfp4 || type == BlockType::mxfp4_scales) {
      bytes[at] = uint8_t(122 + bytes[at] % 6);
    } else if (type == BlockType::nvfp4) {
      for (size_t i = at; i < at + 4; ++i) bytes[i] = uint8_t(0x18 + bytes[i] % 16);  // 1/16 to 1/4
    } else if (type == BlockType::int4_scales) {
      const uint16_t bits = bf16_from_float(scale);
      std::memcpy(&bytes[at], &bits, 2);
    } else if (type == BlockType::iq1_m) {
      put_iq1_m_scale(&bytes[at], scale);
    } else {
      put_half(&bytes[at], scale);
    }
    if (quant.has_min) put_half(&bytes[at + 2], distribution(generator) / largest);
  }
  return bytes;
}

inline std::vector<uint8_t> random_part(Format format, GroupedPart part, int64_t rows, int64_t cols,
                                        unsigned seed) {
  std::mt19937 generator(seed + unsigned(part));
  std::vector<uint8_t> bytes(size_t(part_bytes(format, part, rows, cols)));
  for (uint8_t& byte : bytes) byte = uint8_t(generator());
  if (part == GroupedPart::g_idx || part == GroupedPart::channel_g_idx) {
    for (int64_t col = 0; col < cols; ++col) {
      const auto group = int32_t(part == GroupedPart::g_idx ? col / quant_format(format).block_cols : 0);
      std::memcpy(&bytes[size_t(4 * col)], &group, 4);
    }
    return bytes;
  }
  const bool is_bias = part == GroupedPart::biases;
  const bool is_scale = part == GroupedPart::scales || part == GroupedPart::channel_scales ||
                        part == GroupedPart::scales_by_group;
  if (!is_bias && !is_scale) {
    // Zeros to which one is added have no code with all bits set. The codes of three bits are all 2.
    const bool adds_one = part == GroupedPart::gptq_zeros || part == GroupedPart::gptq_channel_zeros;
    const int bits = grouped_kind(format).bits;
    constexpr uint8_t kTwos[3] = {0x92, 0x24, 0x49};
    for (size_t i = 0; adds_one && i < bytes.size(); ++i) {
      bytes[i] = bits == 3 ? kTwos[i % 3] : uint8_t(bytes[i] & (bits == 2 ? 0x55 : 0x77));
    }
    return bytes;
  }
  const float largest = float(1 << grouped_kind(format).bits);
  std::normal_distribution<float> distribution(0.0f, 1.0f);
  for (size_t at = 0; at < bytes.size(); at += 2) {
    const float value = distribution(generator) / (is_scale ? largest : 1.0f);
    const uint16_t bits = quant_format(format).is_bf16 ? bf16_from_float(value) : f16_from_float(value);
    std::memcpy(&bytes[at], &bits, 2);
  }
  return bytes;
}

inline std::string bnb_state(int64_t rows, int64_t cols) {
  return "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [" +
         std::to_string(rows) + ", " + std::to_string(cols) +
         "], \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 6.25e-02}";
}

// The tensors of a matrix of bitsandbytes.
inline std::vector<BlockType> bnb_parts(Format format, int64_t rows, int64_t cols) {
  const auto length = int64_t(bnb_state(rows, cols).size());
  if (format == Format::int8_row)
    return {BlockType::int8_row_codes, BlockType::int8_row_largest, BlockType::int8_row_order};
  if (format == Format::bnb4)
    return {BlockType::bnb4_codes, BlockType::bnb4_scales, BlockType::bnb4_map,
            sized(BlockType::bnb4_state, 1, length)};
  return {BlockType::bnb4_double_nested_map, BlockType::bnb4_double_factors,
          BlockType::bnb4_double_absmax,     BlockType::bnb4_double_codes,
          BlockType::bnb4_double_map,        sized(BlockType::bnb4_double_state, 1, length)};
}

inline std::vector<uint8_t> random_bnb_part(BlockType type, int64_t rows, int64_t cols, unsigned seed) {
  std::mt19937 generator(seed + unsigned(kind_of(type)));
  if (is_text(type)) {
    std::string text = bnb_state(rows, cols);
    text.resize(size_t(source_bytes(type, rows, cols)));  // a matrix of nothing has none
    return {text.begin(), text.end()};
  }
  std::vector<uint8_t> bytes(size_t(source_bytes(type, rows, cols)));
  for (uint8_t& byte : bytes) byte = uint8_t(generator());
  std::vector<float> values;
  if (type == BlockType::int8_row_order) bytes.assign(bytes.size(), 0);
  if (type == BlockType::int8_row_largest || type == BlockType::bnb4_scales ||
      type == BlockType::bnb4_double_factors)
    values = normal(int64_t(bytes.size() / 4), seed);
  if (type == BlockType::bnb4_map || type == BlockType::bnb4_double_map) {
    for (int i = 0; i < 16; ++i) values.push_back(float(i * i - 100) / 125.0f);
  }
  if (type == BlockType::bnb4_double_nested_map) {
    // create_dynamic_map of bitsandbytes.
    for (int i = 0; i < 7; ++i) {
      for (int step = 0; step < 1 << i; ++step) {
        const double middle = 0.1 + 0.9 * (step + 0.5) / (1 << i);
        values.push_back(float(std::pow(10.0, i - 6) * middle));
        values.push_back(-values.back());
      }
    }
    values.push_back(0.0f);
    values.push_back(1.0f);
    std::sort(values.begin(), values.end());
  }
  if (!values.empty() && !bytes.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

// Exactly the bytes of a matrix, `misalign` bytes after an aligned address, so that a sanitizer detects reads
// beyond it.
struct Weights {
  Weights(Format format, int64_t rows, int64_t cols, int64_t misalign)
      : bytes(new uint8_t[size_t(matrix_bytes(format, rows, cols) + misalign)]),
        view{format, bytes.get() + misalign, rows, cols} {}

  Weights(Format format, const std::vector<float>& values, int64_t rows, int64_t cols, int64_t misalign = 0)
      : Weights(format, rows, cols, misalign) {
    quantize(nullptr, format, values.data(), rows, cols, bytes.get() + misalign);
  }

  Weights(BlockType type, const std::vector<uint8_t>& blocks, int64_t rows, int64_t cols,
          int64_t misalign = 0)
      : Weights(slot_format(type), rows, cols, misalign) {
    CHECK(bring(type, blocks));
  }

  bool bring(BlockType type, const std::vector<uint8_t>& blocks) {
    CHECK_EQUAL(int64_t(blocks.size()), source_bytes(type, view.rows, view.cols));
    return transcode(type, blocks.data(), view.rows, view.cols, 1, 0, num_strips(type, view.rows, view.cols),
                     const_cast<uint8_t*>(view.data));
  }

  // Both tensors of an FP8 matrix, whatever value a code has. Scales of mxfp8 are bytes.
  template <class Scale>
  Weights(Format format, const std::vector<uint8_t>& codes, const std::vector<Scale>& scales, int64_t rows,
          int64_t cols, int64_t misalign = 0)
      : Weights(format, rows, cols, misalign) {
    const auto* bits = reinterpret_cast<const uint8_t*>(scales.data());
    bring(codes_of(format), codes);
    CHECK(bring(scales_of(format), {bits, bits + scales.size() * sizeof(Scale)}));
  }

  // cols must be cols_of(format, ...).
  static Weights random(Format format, int64_t rows, int64_t cols, unsigned seed, int64_t misalign = 0) {
    if (is_quantized_here(format)) return Weights(format, normal(rows * cols, seed), rows, cols, misalign);
    if (format == Format::int4) {
      Weights parts(format, rows, cols, misalign);
      for (const BlockType type : {BlockType::int4_scales, BlockType::int4_quants}) {
        CHECK(parts.bring(type, random_blocks(type, rows, cols, seed)));
      }
      return parts;
    }
    if (is_grouped(format)) return random_grouped(format, rows, cols, seed, misalign);
    if (is_f8(format) && !has_e4m3_codes(format)) return random_bnb(format, rows, cols, seed, misalign);
    if (is_f8(format)) return random_f8(format, rows, cols, seed, misalign);
    const BlockType type = block_type_of(format);
    return Weights(type, random_blocks(type, rows, cols, seed), rows, cols, misalign);
  }

  // Random codes, and zeros or biases, with scales that give weights of order one.
  static Weights random_grouped(Format format, int64_t rows, int64_t cols, unsigned seed, int64_t misalign) {
    Weights parts(format, rows, cols, misalign);
    for (const GroupedPart part :
         {GroupedPart::codes, GroupedPart::scales, GroupedPart::zeros, GroupedPart::biases}) {
      if (has_part(format, part))
        CHECK(parts.bring(grouped_type(format, part), random_part(format, part, rows, cols, seed)));
    }
    return parts;
  }

  // Every code except NaN, with scales that give weights of order one.
  static Weights random_f8(Format format, int64_t rows, int64_t cols, unsigned seed, int64_t misalign) {
    std::mt19937 generator(seed);
    std::vector<uint8_t> codes(size_t(rows * cols));
    for (uint8_t& code : codes) code = uint8_t(generator() % 0x7F + generator() % 2 * 0x80);
    const int64_t scales = num_f8_scales(format, rows, cols);
    if (format != Format::mxfp8) {
      return Weights(format, codes, normal(scales, seed + 1, 0.01f), rows, cols, misalign);
    }
    std::vector<uint8_t> powers(static_cast<size_t>(scales));
    for (uint8_t& power : powers) power = uint8_t(110 + generator() % 10);
    return Weights(format, codes, powers, rows, cols, misalign);
  }

  // The tensors of bitsandbytes, for weights of order one.
  static Weights random_bnb(Format format, int64_t rows, int64_t cols, unsigned seed, int64_t misalign) {
    Weights parts(format, rows, cols, misalign);
    for (const BlockType type : bnb_parts(format, rows, cols)) {
      CHECK(parts.bring(type, random_bnb_part(type, rows, cols, seed)));
    }
    return parts;
  }

  std::unique_ptr<uint8_t[]> bytes;
  MatrixView view;
};

// The activations that a format needs, and the distance between their rows.
struct Inputs {
  Inputs(const KernelTable& table, Format format, const std::vector<float>& x, int64_t cols,
         int64_t num_tokens) {
    stride = is_quantized(format) ? activation_bytes(cols) : cols * 4;
    bytes.resize(size_t(stride * num_tokens));
    for (int64_t t = 0; t < num_tokens; ++t) {
      if (is_quantized(format)) {
        table.quantize_activations(x.data() + t * cols, cols, 0, num_groups(cols), bytes.data() + t * stride);
      } else if (cols > 0) {
        std::memcpy(bytes.data() + t * stride, x.data() + t * cols, size_t(cols) * 4);
      }
    }
  }
  std::vector<uint8_t> bytes;
  int64_t stride;
};

// Memory for one product at a time, in whatever state the one before left it.
inline uint8_t* product_scratch() {
  alignas(64) static uint8_t memory[kSplitScratchBytes];
  return memory;
}

inline MatmulArgs matmul_args(const MatrixView& w, const Inputs& x, int64_t num_tokens, float* y) {
  MatmulArgs args = {};
  args.format = w.format;
  args.weights = w.data;
  args.cols = w.cols;
  args.row_end = w.rows;
  args.x = x.bytes.data();
  args.x_stride = x.stride;
  args.y = y;
  args.y_stride = w.rows;
  args.num_tokens = num_tokens;
  args.scratch = product_scratch();
  return args;
}

inline std::vector<float> multiply(const KernelTable& table, const MatrixView& w, const std::vector<float>& x,
                                   int64_t num_tokens) {
  std::vector<float> y(size_t(w.rows * num_tokens), NAN);
  const Inputs inputs(table, w.format, x, w.cols, num_tokens);
  table.matmul[int(w.format)](matmul_args(w, inputs, num_tokens, y.data()));
  return y;
}

// The outputs of tokens [begin, end) of one sequence. The query of token `begin` is the first row of q.
inline std::vector<float> attend_tokens(Runtime& runtime, KvCache& cache, const std::vector<int32_t>& blocks,
                                        const float* q, int64_t num_heads, int64_t begin, int64_t end,
                                        Window window, const float* sinks) {
  const int64_t count = end - begin, row = num_heads * cache.layer(0).value_dim;
  const std::vector<int32_t> sequence(size_t(count), 0);
  std::vector<int32_t> order;
  for (int64_t p = begin; p < end; ++p) order.push_back(int32_t(p));
  std::vector<float> out(size_t(count * row), NAN);
  const AttentionBatch batch = {
      .q = q,
      .num_tokens = count,
      .num_heads = num_heads,
      .block_table = blocks.data(),
      .max_blocks = int64_t(blocks.size()),
      .sequence = sequence.data(),
      .order = order.data(),
      .sees_until = nullptr,
      .scale = 0.3f,
      .window = window,
      .sinks = sinks,
  };
  attention(runtime, cache.layer(0), batch, out.data());
  return out;
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline bool near(const std::vector<float>& a, const std::vector<float>& b, double tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(double(a[i]) - double(b[i])) <= tolerance * (1.0 + std::fabs(double(b[i])))))
      return false;
  }
  return a.size() == b.size();
}

// Queries of one head of an encoder, and its keys and values, with gaps between the rows.
struct Heads {
  static constexpr int64_t kQueryStride = 300, kKeyStride = 250, kValueStride = 275;

  Heads(int64_t count, int64_t keys, int64_t head_dim)
      : num_queries(count),
        num_keys(keys),
        dim(head_dim),
        query(normal(count * kQueryStride, 1)),
        key(normal(keys * kKeyStride, 2)),
        value(normal(keys * kValueStride, 3)) {}

  int64_t num_queries, num_keys, dim;
  std::vector<float> query, key, value;
};

}  // namespace argosy::testing
