// formats.h: the memory layout of weight matrices.
//
//   f32, f16, bf16   row-major [rows, cols], no padding, any alignment.
//   f8 f8_row        FP8 E4M3 codes, row-major, in stretches of rows. A stretch stores its scales, padded
//   with f8_32 mxfp8      zeros to 64 bytes, then its codes. The last stretch holds the remaining rows:
//
//            rows of a stretch   scales                        of
//     f8     128                 float32 [ceil(cols / 128)]    128 rows and 128 columns
//     f8_row 16                  float32 [16]                  a row
//     f8_32  16                  float32 [16][ceil(cols / 32)] a row and 32 columns
//     mxfp8  16                  e8m0 [16][ceil(cols / 32)]    a row and 32 columns: 2^(byte - 127)
//
//   int8_row bnb4         the same with other codes, which become float32 weights as well. int8_row: int8,
//   and bnb4_double           the scales of f8_row. bnb4 (bitsandbytes' nf4 and fp4): codes of four bits, the
//                         even column in the high half of a byte, rows padded to 64 columns. A stretch of 16
//                         rows begins with the value of each code, float32 [16], and has float32
//                         [16][ceil(cols / 64)]. bnb4_double: a byte in place of each of these, by what
//                         bitsandbytes calls double quantisation (double_scale).
//
//   the others       quantised: weight = scale * q, or scale * q + min. A code of `bits` bits stands for q:
//                    the code minus `zero`, or an entry of a table of 16. Rows are padded to 16, columns to
//                    a block.
//
//            bits  q            scale                          min
//     q8       8   - 128        f16 of 32 columns              -
//     q4       4   - 8          f16 of 32                      -
//     q4_1     4   - 0          f16 of 32                      f16 of 32
//     q5_0     5   - 16         f16 of 32                      -
//     q5_1     5   - 0          f16 of 32                      f16 of 32
//     q4_k     4   - 0          f16 of 256 * u8 of 32          f16 of 256 * u8 of 32
//     q5_k     5   - 0          f16 of 256 * u8 of 32          f16 of 256 * u8 of 32
//     q6_k     6   - 32         f16 of 256 * int8 of 16        -
//     q2_k     2   - 0          f16 of 256 * 4 bits of 16      f16 of 256 * 4 bits of 16
//     q3_k     3   - 4          f16 of 256 * int8 of 16        -
//     iq4_nl   4   table iq4    f16 of 32                      -
//     iq4_xs   4   table iq4    f16 of 256 * int8 of 32        -
//     mxfp4    4   table e2m1   bf16 of 32                     -
//     nvfp4    4   table e2m1   f32 of a row * e4m3 of 16      -
//     int4     4   - 8          bf16 of 32                     -
//     tq2_0    2   - 1          f16 of 256                     -
//     q2_0     2   - 1          f16 of 64                      -
//
//   coded        iq2_xxs to iq2_kl: indices into grids, trits or signs, in the bits of the file's blocks
//                (coded.h). Products decode them to a wide format: 8 bits with float32 scales, in scratch.
//
//     wide                8   - 128   f32 of 32
//     wide_halves         8   - 128   f32 of 16
//     wide_medium         8   - 64    f32 of 32   codes from 1 to 127: vpmaddubsw takes them as they are
//     wide_medium_halves  8   - 64    f32 of 16
//     wide_small          8   - 16    f32 of 32   codes from 1 to 31: 16 bits hold the sum of eight products
//     wide_small_halves   8   - 16    f32 of 16
//
// The grouped formats have a name of three parts, such as uint4_128_f16: kind and bits, columns of a group of
// weights that share a scale (32, 64 or 128), and the type of the scale (f16, bf16). weight = scale * code +
// min, and the kind says what the min is:
//
//     int      4, 8 bits              - scale * 2^(bits - 1); nothing is stored
//     uint     2, 3, 4, 8             - scale * zero; a byte for each scale
//     affine   2, 3, 4, 5, 6, 8       a bias, of the type of the scale
//
// They hold what compressed-tensors, GPTQ and AWQ store (int, uint) and what MLX stores (affine). Products
// read the size of the group and the kind at run time, so there is one kernel for each number of bits.
//
// int and uint also exist with act-order (uint4_128_f16_act_order): any columns of the file may share a
// group, so panels hold them in another order, which follows the panels: int32 [cols], padded to 64 bytes.
// Column i of the panels is column order[i] of the matrix. If every column is in its place, order[0] is -1.
// Products take the activations in this order (ops/matmul.h).
//
// The formats from q4_1 to mxfp4 hold what GGUF's blocks of the same name hold, bit for bit, except for the
// sign of a min that GGUF subtracts (kernels/transcode.h). mxfp4 follows the OCP Microscaling Formats (MX)
// Specification v1.0: the table holds its values doubled, so a scale is half of the scale in the file, stored
// as a bfloat16, which has every power of two from 2^-133 to 2^127. nvfp4 has the same table; its panels
// begin with the scales of the rows, float32 [16], and its blocks of 64 columns have only sub-scales. int4 is
// the format that compressed-tensors packs.
//
// A quantised matrix is a list of panels of 16 rows. A block is the columns that share a 16-bit scale: 32, 64
// or 256 of them, or a group of a grouped format. A panel holds its blocks one after another and is padded to
// 64 bytes. A block holds its scales, then the quants of its groups. The scales of a block are 16-bit floats
// [16 rows], then, if the format has them, its mins float16 [16] (affine: of the type of the scales; uint:
// zeros u8 [16]), its sub-scales [group or half group][16] and its sub-mins [group][16]. q2_k and q3_k store
// sub-scales as [group][16][half group] instead, so that both sub-scales of a row are multiplied at once;
// those of q2_k share a byte with their sub-mins, which are the high half. So a product reads a matrix from
// its first byte to its last (docs/decisions/0019-read-panels-sequentially.md). The quants of a group of 32
// columns are:
//
//   8 bits   chunk c = 0..7: 64 bytes; byte 4 r + j = q of row r, column 4 c + j.
//   3, 5     first 64 bytes; bit c of byte 4 r + j = the highest bit of q of column 4 c + j;
//   6 bits   first 2 times 64 bytes for the two highest bits, as 2 bits have them.
//   4 to 6   then chunk c = 0..3: 64 bytes; byte 4 r + j = the lower 4 bits of q of column 4 c + j in the low
//            half, and of column 4 (c + 4) + j in the high half;
//   2, 3     then 2 times 64 bytes: bits 2 c and 2 c + 1 of byte 4 r + j = the two lowest bits of q of column
//            4 c + j in the first 64 bytes, of column 4 (c + 4) + j in the second (c = 0..3).
//
// A block of a wide format has its float32 scales [half group][16] in front.
//
// So 64 bytes are four columns of sixteen rows: one vpdpbusd multiplies them with four broadcast activations.
#pragma once

#include <cstdint>

namespace argosy {

enum class Format : uint8_t {
  f32,
  f16,
  bf16,
  f8,
  f8_row,
  f8_32,
  mxfp8,
  int8_row,
  bnb4,
  bnb4_double,
  q8,
  q4,
  q4_1,
  q5_0,
  q5_1,
  q4_k,
  q5_k,
  q6_k,
  q2_k,
  q3_k,
  iq4_nl,
  iq4_xs,
  mxfp4,
  nvfp4,
  int4,
  tq2_0,
  q2_0,
  iq2_xxs,
  iq2_xs,
  iq2_s,
  iq3_xxs,
  iq3_s,
  iq1_s,
  iq1_m,
  tq1_0,
  q1_0,
  iq2_k,
  iq3_k,
  iq4_k,
  iq5_k,
  iq6_k,
  iq2_ks,
  iq3_ks,
  iq4_ks,
  iq5_ks,
  iq2_kl,
  first_grouped,  // of kNumGrouped formats
  // Only in scratch: what coded formats are decoded to.
  wide = first_grouped + 108,
  wide_halves,
  wide_medium,
  wide_medium_halves,
  wide_small,
  wide_small_halves
};

// What the min of a grouped format is: -scale * 2^(bits - 1), -scale * a stored zero, or stored.
enum class GroupedMin : uint8_t { not_grouped, of_constant_zero, of_zeros, stored };

struct GroupedKind {
  const char* name;
  int bits;
  GroupedMin min;
};
[[maybe_unused]] static constexpr GroupedKind kGroupedKinds[] = {
    {"int4", 4, GroupedMin::of_constant_zero}, {"int8", 8, GroupedMin::of_constant_zero},
    {"uint2", 2, GroupedMin::of_zeros},        {"uint3", 3, GroupedMin::of_zeros},
    {"uint4", 4, GroupedMin::of_zeros},        {"uint8", 8, GroupedMin::of_zeros},
    {"affine2", 2, GroupedMin::stored},        {"affine3", 3, GroupedMin::stored},
    {"affine4", 4, GroupedMin::stored},        {"affine5", 5, GroupedMin::stored},
    {"affine6", 6, GroupedMin::stored},        {"affine8", 8, GroupedMin::stored},
};
[[maybe_unused]] static constexpr int kNumGroupedKinds = int(sizeof(kGroupedKinds) / sizeof(GroupedKind));
// Formats of a kind: in groups of 32, 64 and 128 columns, with scales in float16 and in bfloat16 for each.
[[maybe_unused]] static constexpr int kFormatsOfKind = 6;
// After them follow the formats of the first kinds with act-order.
[[maybe_unused]] static constexpr int kNumKindsInActOrder = 6;
[[maybe_unused]] static constexpr int kNumInPlace = kNumGroupedKinds * kFormatsOfKind;
[[maybe_unused]] static constexpr int kNumGrouped = kNumInPlace + kNumKindsInActOrder * kFormatsOfKind;

// Everything here has internal linkage: several instruction sets compile this header, and the linker must not
// keep one copy for all of them.
[[maybe_unused]] static constexpr int kFirstGrouped = int(Format::first_grouped);
[[maybe_unused]] static constexpr int kNumFormats = int(Format::wide);
static_assert(kNumFormats == kFirstGrouped + kNumGrouped);
[[maybe_unused]] static constexpr int64_t kGroupSize = 32;
[[maybe_unused]] static constexpr int64_t kPanelRows = 16;
// Bytes of a cache line. Panels begin at multiples of it, and kernels are fastest if their matrix also does.
[[maybe_unused]] static constexpr int64_t kMatrixAlignment = 64;
// Four columns of a panel (4 bits: two times four).
[[maybe_unused]] static constexpr int64_t kChunkBytes = 64;
[[maybe_unused]] static constexpr int64_t kLongestBlock = 256;

static inline constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// The values of a table's sixteen codes, plus its zero, as bytes for instructions that want unsigned
// operands.
[[maybe_unused]] static constexpr uint8_t kE2m1Bytes[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                                            16, 15, 14, 13, 12, 10, 8,  4};
[[maybe_unused]] static constexpr uint8_t kIq4Bytes[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                           129, 141, 153, 166, 181, 197, 217, 241};

enum class SubScales : uint8_t { none, bytes, signed_bytes, signed_pairs, nibble_pairs, e4m3 };

namespace {  // gives the functions internal linkage, too: member functions of a class shared by all files are
             // shared

// One row of the table at the top. Always inlined: in a loop over groups, all of it is constants, and GCC
// would leave some calls.
struct QuantFormat {
  int bits;
  int zero;  // 0, or a power of two
  int64_t block_cols;
  int64_t sub_scale_cols = 0;  // 0: a block has no sub-scales
  bool has_min = false;
  SubScales sub_scales = SubScales::none;
  bool is_bf16 = false;            // whether the scales are bfloat16
  const uint8_t* table = nullptr;  // 16 bytes; null: a code is its own byte
  bool has_float_scales = false;   // wide formats: scales are float32
  // Coded formats: what a panel is decoded to, the bytes of a block before its groups, and those of a group.
  Format wide = Format::f32;
  int64_t front_bytes = 0, coded_group_bytes = 0;
  bool has_row_scale = false;  // a panel begins with a float32 for each row, which multiplies its sum
  GroupedMin grouped_min = GroupedMin::not_grouped;

  [[gnu::always_inline]] constexpr bool is_coded() const { return wide != Format::f32; }
  [[gnu::always_inline]] constexpr int64_t row_scale_bytes() const {
    return has_row_scale ? kPanelRows * 4 : 0;
  }
  [[gnu::always_inline]] constexpr int64_t group_bytes() const {
    return is_coded() ? coded_group_bytes : kChunkBytes * bits;
  }
  [[gnu::always_inline]] constexpr int64_t block_groups() const { return block_cols / kGroupSize; }
  [[gnu::always_inline]] constexpr int block_shift() const {
    return __builtin_ctzll(uint64_t(block_groups()));
  }
  [[gnu::always_inline]] constexpr bool is_grouped() const { return grouped_min != GroupedMin::not_grouped; }
  // Bytes of the mins of a block, or of what they are computed from.
  [[gnu::always_inline]] constexpr int64_t min_bytes() const {
    if (!has_min || grouped_min == GroupedMin::of_constant_zero) return 0;
    return kPanelRows * (grouped_min == GroupedMin::of_zeros ? 1 : 2);
  }
  // The number of parts of a group that have their own scale.
  [[gnu::always_inline]] constexpr int parts() const { return sub_scale_cols == 16 ? 2 : 1; }
  // The bits stored together, after the planes of the higher bits; and their offset in a group.
  [[gnu::always_inline]] constexpr int low_bits() const { return bits == 8 ? 8 : bits < 4 ? 2 : 4; }
  [[gnu::always_inline]] constexpr int64_t low_at() const { return kChunkBytes * (bits - low_bits()); }
  [[gnu::always_inline]] constexpr int zero_shift() const { return __builtin_ctz(unsigned(zero)); }
  // The largest byte that stands for a weight.
  [[gnu::always_inline]] constexpr int largest_byte() const {
    if (has_float_scales) return 2 * zero - 1;
    if (table == nullptr) return (1 << bits) - 1;
    int largest = 0;
    for (int i = 0; i < 16; ++i) largest = table[i] > largest ? table[i] : largest;
    return largest;
  }
  // Whether the sub-scales of both half groups of a row lie side by side.
  [[gnu::always_inline]] constexpr bool is_paired() const {
    return sub_scales == SubScales::signed_pairs || sub_scales == SubScales::nibble_pairs;
  }
  // Offset in the scales of a block.
  [[gnu::always_inline]] constexpr int64_t sub_scales_at() const {
    if (sub_scales == SubScales::e4m3) return 0;  // the row scale is the block's
    return kPanelRows * 2 + min_bytes();
  }
  [[gnu::always_inline]] constexpr int64_t sub_mins_at() const {
    return sub_scales_at() + (sub_scale_cols > 0 ? block_cols / sub_scale_cols * kPanelRows : 0);
  }
  [[gnu::always_inline]] constexpr int64_t block_scale_bytes() const {
    if (is_coded()) return front_bytes;
    if (has_float_scales) return kPanelRows * 4 * parts();
    return sub_mins_at() + (sub_scales == SubScales::bytes ? block_groups() * kPanelRows : 0);
  }
  [[gnu::always_inline]] constexpr int64_t block_bytes() const {
    return block_scale_bytes() + block_groups() * group_bytes();
  }
  // Offsets in a panel: the scales of the block that contains a group, and the quants of the group.
  [[gnu::always_inline]] constexpr int64_t scales_at(int64_t group) const {
    return row_scale_bytes() + (group >> block_shift()) * block_bytes();
  }
  [[gnu::always_inline]] constexpr int64_t quants_at(int64_t group) const {
    return scales_at(group) + block_scale_bytes() + (group & (block_groups() - 1)) * group_bytes();
  }
};

}  // namespace

static inline constexpr bool is_quantized(Format format) { return format >= Format::q8; }
[[gnu::always_inline]] static inline constexpr bool is_grouped(Format format) {
  return int(format) >= kFirstGrouped && int(format) < kNumFormats;
}

// Whether the columns of a matrix may be in another order, which follows its panels.
[[gnu::always_inline]] static inline constexpr bool has_act_order(Format format) {
  return int(format) >= kFirstGrouped + kNumInPlace && int(format) < kNumFormats;
}

// For grouped formats only: their kind, and the format of a kind and a group size.
[[gnu::always_inline]] static inline constexpr GroupedKind grouped_kind(Format format) {
  return kGroupedKinds[(int(format) - kFirstGrouped - (has_act_order(format) ? kNumInPlace : 0)) /
                       kFormatsOfKind];
}
static inline constexpr Format grouped_format(int kind, int64_t group_cols, bool is_bf16) {
  return Format(kFirstGrouped + kind * kFormatsOfKind + __builtin_ctzll(uint64_t(group_cols / 32)) * 2 +
                is_bf16);
}

// The format whose kernel multiplies weights of this format: the same for all grouped formats of as many
// bits.
[[gnu::always_inline]] static inline constexpr Format kernel_format(Format format) {
  if (!is_grouped(format)) return format;
  int kind = 0;
  while (kGroupedKinds[kind].bits != grouped_kind(format).bits ||
         kGroupedKinds[kind].min != GroupedMin::stored)
    ++kind;
  return grouped_format(kind, 64, false);
}

// The format that is measured in place of this format: one of as many bits with the same arithmetic.
static inline constexpr Format measured_as(Format format) {
  constexpr Format kOfBits[9] = {{},           {},           Format::q2_k, Format::q3_k, Format::q4_1,
                                 Format::q5_1, Format::q6_k, {},           Format::q8};
  return is_grouped(format) ? kOfBits[grouped_kind(format).bits] : format;
}

// Whether products take both bytes of an activation (docs/decisions/0006-sixteen-bit-activations-for-q8.md).
[[gnu::always_inline]] static inline constexpr bool takes_both_bytes(Format format) {
  return format == Format::q8 || (is_grouped(format) && grouped_kind(format).bits == 8);
}

// A row of the table for a coded format.
static inline constexpr QuantFormat coded_format(Format wide, int64_t block_cols, int64_t sub_scale_cols,
                                                 int64_t front_bytes, int64_t group_bytes = 0,
                                                 bool has_row_scale = false) {
  return {.bits = 8,
          .zero = 128,
          .block_cols = block_cols,
          .sub_scale_cols = sub_scale_cols,
          .wide = wide,
          .front_bytes = front_bytes,
          .coded_group_bytes = group_bytes,
          .has_row_scale = has_row_scale};
}

// For quantised formats only.
[[gnu::always_inline]] static inline constexpr QuantFormat quant_format(Format format) {
  if (is_grouped(format)) {
    const GroupedKind kind = grouped_kind(format);
    const int variant = (int(format) - kFirstGrouped) % kFormatsOfKind;
    return {.bits = kind.bits,
            .zero = 0,
            .block_cols = int64_t{32} << variant / 2,
            .has_min = true,
            .is_bf16 = variant % 2 == 1,
            .grouped_min = kind.min};
  }
  switch (format) {
    case Format::q8:
      return {8, 128, 32};
    case Format::q4_1:
      return {4, 0, 32, 0, true};
    case Format::q5_0:
      return {5, 16, 32};
    case Format::q5_1:
      return {5, 0, 32, 0, true};
    case Format::q4_k:
      return {4, 0, 256, 32, true, SubScales::bytes};
    case Format::q5_k:
      return {5, 0, 256, 32, true, SubScales::bytes};
    case Format::q6_k:
      return {6, 32, 256, 16, false, SubScales::signed_bytes};
    case Format::q2_k:
      return {2, 0, 256, 16, true, SubScales::nibble_pairs};
    case Format::q3_k:
      return {3, 4, 256, 16, false, SubScales::signed_pairs};
    case Format::iq4_nl:
      return {4, 128, 32, 0, false, SubScales::none, false, kIq4Bytes};
    case Format::iq4_xs:
      return {4, 128, 256, 32, false, SubScales::signed_bytes, false, kIq4Bytes};
    case Format::mxfp4:
      return {4, 16, 32, 0, false, SubScales::none, true, kE2m1Bytes};
    case Format::nvfp4:
      return {.bits = 4,
              .zero = 16,
              .block_cols = 64,
              .sub_scale_cols = 16,
              .sub_scales = SubScales::e4m3,
              .table = kE2m1Bytes,
              .has_row_scale = true};
    case Format::int4:
      return {4, 8, 32, 0, false, SubScales::none, true};
    case Format::tq2_0:
      return {2, 1, 256};
    case Format::q2_0:
      return {2, 1, 64};
    case Format::iq2_xxs:
      return coded_format(Format::wide_medium, 256, 0, 32, 128);
    case Format::iq2_xs:
      return coded_format(Format::wide_medium_halves, 256, 16, 32 + 128, 128);
    case Format::iq2_s:
      return coded_format(Format::wide_medium_halves, 256, 16, 32 + 128 + 8 * 16, 128);
    case Format::iq3_xxs:
      return coded_format(Format::wide_medium, 256, 0, 32, 192);
    case Format::iq3_s:
      return coded_format(Format::wide_small, 256, 0, 32 + 64 + 8 * 16, 192);
    case Format::iq1_s:
      return coded_format(Format::wide_small, 256, 0, 32 + 64 + 8 * 24, 64);
    case Format::iq1_m:
      return coded_format(Format::wide_small_halves, 256, 16, 128 + 8 * 32, 64);
    case Format::tq1_0:
      return coded_format(Format::wide_small, 256, 0, 16 * 54);
    case Format::q1_0:
      return coded_format(Format::wide_small, 128, 0, 16 * 18);
    case Format::iq2_k:
      return coded_format(Format::wide_halves, 256, 16, 16 * 76);
    case Format::iq3_k:
      return coded_format(Format::wide_halves, 256, 16, 16 * 110);
    case Format::iq4_k:
      return coded_format(Format::wide_halves, 256, 16, 16 * 144);
    case Format::iq5_k:
      return coded_format(Format::wide_halves, 256, 16, 16 * 176);
    case Format::iq6_k:
      return coded_format(Format::wide_halves, 256, 16, 16 * 212);
    case Format::iq2_ks:
      return coded_format(Format::wide, 256, 0, 16 * 70, 0, true);
    case Format::iq3_ks:
      return coded_format(Format::wide, 256, 0, 16 * 102, 0, true);
    case Format::iq4_ks:
      return coded_format(Format::wide, 256, 0, 16 * 136, 0, true);
    case Format::iq5_ks:
      return coded_format(Format::wide, 256, 0, 16 * 168, 0, true);
    case Format::iq2_kl:
      return coded_format(Format::wide, 256, 0, 16 * 86, 0, true);
    case Format::wide:
      return {.bits = 8, .zero = 128, .block_cols = 32, .has_float_scales = true};
    case Format::wide_halves:
      return {.bits = 8, .zero = 128, .block_cols = 32, .sub_scale_cols = 16, .has_float_scales = true};
    case Format::wide_medium:
      return {.bits = 8, .zero = 64, .block_cols = 32, .has_float_scales = true};
    case Format::wide_medium_halves:
      return {.bits = 8, .zero = 64, .block_cols = 32, .sub_scale_cols = 16, .has_float_scales = true};
    case Format::wide_small:
      return {.bits = 8, .zero = 16, .block_cols = 32, .has_float_scales = true};
    case Format::wide_small_halves:
      return {.bits = 8, .zero = 16, .block_cols = 32, .sub_scale_cols = 16, .has_float_scales = true};
    default:
      return {4, 8, 32};
  }
}

static inline constexpr bool is_coded(Format format) {
  return is_quantized(format) && quant_format(format).is_coded();
}

[[gnu::always_inline]] static inline constexpr int64_t num_groups(int64_t cols) {
  return round_up(cols, kGroupSize) / kGroupSize;
}

static inline constexpr int64_t num_blocks(Format format, int64_t cols) {
  return round_up(cols, quant_format(format).block_cols) / quant_format(format).block_cols;
}

// Whether the format is one of the rows of codes with scales that float activations multiply.
static inline constexpr bool is_f8(Format format) {
  return format >= Format::f8 && format <= Format::bnb4_double;
}
static inline constexpr bool is_bnb4(Format format) {
  return format == Format::bnb4 || format == Format::bnb4_double;
}
// Whether the codes are E4M3.
static inline constexpr bool has_e4m3_codes(Format format) {
  return format >= Format::f8 && format <= Format::mxfp8;
}

// f8: rows and columns of a block of weights that share a scale.
[[maybe_unused]] static constexpr int64_t kF8Block = 128;

namespace {

// bnb4: columns that share a scale, which follow each other through the whole matrix; bnb4_double: scales
// that share a factor, likewise.
[[maybe_unused]] static constexpr int64_t kBnb4Block = 64, kDoubleBlock = 256;

// One row of the table of FP8 formats.
struct F8Format {
  int64_t stretch_rows;            // a multiple of kPanelRows
  int64_t scale_rows, scale_cols;  // of a block; no columns: all
  int64_t scale_bytes;
  int64_t table_bytes = 0;  // the values of codes of four bits, before the scales of a stretch
  bool is_double = false;

  // The factors that the scales of a row may have.
  constexpr int64_t num_factors(int64_t cols) const {
    return (num_scales(cols) + kDoubleBlock - 1) / kDoubleBlock + 1;
  }
  constexpr int64_t row_code_bytes(int64_t cols) const {
    return table_bytes > 0 ? round_up(cols, kBnb4Block) / 2 : cols;
  }
  // The scales of a row, and their bytes.
  constexpr int64_t num_scales(int64_t cols) const {
    if (scale_cols == 0) return cols > 0 ? 1 : 0;
    return round_up(cols, scale_cols) / scale_cols;
  }
  constexpr int64_t row_bytes(int64_t cols) const {
    if (is_double) return double_scales_at(cols) + round_up(num_scales(cols), 4);
    return num_scales(cols) * scale_bytes;
  }
  // A row of bnb4_double begins with the offset of the matrix (float32) and the number of earlier scales that
  // share the row's first factor (uint32). Its factors (float32) and its scales (bytes) follow.
  constexpr int64_t double_scales_at(int64_t cols) const { return 8 + 4 * num_factors(cols); }
};

}  // namespace

static inline constexpr F8Format f8_format(Format format) {
  switch (format) {
    case Format::f8_row:
      return {kPanelRows, 1, 0, 4};
    case Format::f8_32:
      return {kPanelRows, 1, 32, 4};
    case Format::mxfp8:
      return {kPanelRows, 1, 32, 1};
    case Format::int8_row:
      return {kPanelRows, 1, 0, 4};
    case Format::bnb4:
      return {kPanelRows, 1, kBnb4Block, 4, 64};
    case Format::bnb4_double:
      return {kPanelRows, 1, kBnb4Block, 1, 64, true};
    default:
      return {kF8Block, kF8Block, kF8Block, 4};
  }
}

// Bytes of the scales of a stretch.
static inline constexpr int64_t f8_scales_bytes(Format format, int64_t cols) {
  const F8Format f8 = f8_format(format);
  return round_up(f8.table_bytes + f8.stretch_rows / f8.scale_rows * f8.row_bytes(cols), kMatrixAlignment);
}
// Where the stretch of a row begins, where the scales of the row begin, and where its codes begin.
static inline constexpr int64_t f8_stretch_at(Format format, int64_t row, int64_t cols) {
  const F8Format f8 = f8_format(format);
  return row / f8.stretch_rows * (f8_scales_bytes(format, cols) + f8.stretch_rows * f8.row_code_bytes(cols));
}
static inline constexpr int64_t f8_scales_at(Format format, int64_t row, int64_t cols) {
  const F8Format f8 = f8_format(format);
  return f8_stretch_at(format, row, cols) + f8.table_bytes +
         row % f8.stretch_rows / f8.scale_rows * f8.row_bytes(cols);
}
static inline constexpr int64_t f8_row_at(Format format, int64_t row, int64_t cols) {
  const F8Format f8 = f8_format(format);
  return f8_stretch_at(format, row, cols) + f8_scales_bytes(format, cols) +
         row % f8.stretch_rows * f8.row_code_bytes(cols);
}

// For f32, f16 and bf16 only.
static inline constexpr int64_t weight_bytes(Format format) { return format == Format::f32 ? 4 : 2; }

static inline constexpr int64_t panel_bytes(Format format, int64_t cols) {
  const QuantFormat quant = quant_format(format);
  return round_up(quant.row_scale_bytes() + num_blocks(format, cols) * quant.block_bytes(), kMatrixAlignment);
}

// Bytes of all panels, and so the offset of the order of the columns.
static inline constexpr int64_t panels_bytes(Format format, int64_t rows, int64_t cols) {
  return round_up(rows, kPanelRows) / kPanelRows * panel_bytes(format, cols);
}
static inline constexpr int64_t order_bytes(Format format, int64_t cols) {
  return has_act_order(format) ? round_up(cols * 4, kMatrixAlignment) : 0;
}

static inline constexpr int64_t matrix_bytes(Format format, int64_t rows, int64_t cols) {
  if (is_quantized(format)) return panels_bytes(format, rows, cols) + order_bytes(format, cols);
  if (is_f8(format)) {
    const F8Format f8 = f8_format(format);
    return round_up(rows, f8.stretch_rows) / f8.stretch_rows * f8_scales_bytes(format, cols) +
           rows * f8.row_code_bytes(cols);
  }
  return rows * cols * weight_bytes(format);
}

// q of row 0 to 15 of a panel. Not for coded formats: see CodedRow in coded.h.
static inline int32_t quant_at(const QuantFormat& q, const uint8_t* panel, int64_t row, int64_t col) {
  const uint8_t* group = panel + q.quants_at(col / kGroupSize) + row * 4 + col % 4;
  const int64_t chunk = col % kGroupSize / 4;
  if (q.bits == 8) return group[chunk * kChunkBytes] - q.zero;
  const auto pair_of = [&](const uint8_t* planes) {
    return planes[chunk / 4 * kChunkBytes] >> chunk % 4 * 2 & 3;
  };
  const uint8_t* low = group + q.low_at();
  int32_t code = q.bits < 4 ? pair_of(low) : low[chunk % 4 * kChunkBytes] >> (chunk < 4 ? 0 : 4) & 0xF;
  if (q.bits % 2 == 1) code += (group[0] >> chunk & 1) << q.low_bits();
  if (q.bits == 6) code += pair_of(group) << q.low_bits();
  return (q.table != nullptr ? q.table[code] : code) - q.zero;
}
static inline int32_t quant_at(Format format, const uint8_t* panel, int64_t row, int64_t col) {
  return quant_at(quant_format(format), panel, row, col);
}

// One token's activations, quantised for products with quantised weights; 64-byte aligned, in this order:
//
//   int8  [groups * 32]   high: with low, x / (scale / 256) rounded to nearest even = 256 * high + low
//   int8  [groups * 32]   low
//   int16 [groups * 32]   256 * high + low: for q8 kernels that multiply 16 bits at once
//   float [groups]        scale = largest magnitude in the group / 127, for high alone (most formats)
//   float [groups]        scale / 256, for both bytes (takes_both_bytes: q8 and grouped formats of 8 bits)
//   int32 [groups]        -(sum of 256 * high + low): multiplied by the zero of the q8 quants, it removes
//                         that zero from a dot product; times the scale, it multiplies a min
//   int32 [groups]        -(sum of high): the same for the other formats with a zero
//   int32 [2 * groups]    -(sum of high) per half group: for q6_k
//   int16 [2 * groups]    the same: for formats whose sub-scales are stored in pairs
//   float [groups]        scale * sum of high: multiplies a min
//
// For q4 weights, whose own rounding error is sixteen times that of q8, 8 bits per activation are plenty. For
// q8 weights they are not: the error of the activations would be three times that of the weights
// (docs/decisions/0006-sixteen-bit-activations-for-q8.md).
static inline constexpr int64_t activation_low_at(int64_t cols) { return num_groups(cols) * kGroupSize; }
static inline constexpr int64_t activation_whole_at(int64_t cols) {
  return num_groups(cols) * 2 * kGroupSize;
}
[[gnu::always_inline]] static inline constexpr int64_t activation_scales_at(Format format, int64_t cols) {
  return num_groups(cols) * (4 * kGroupSize + (takes_both_bytes(format) ? 4 : 0));
}
[[gnu::always_inline]] static inline constexpr int64_t activation_negated_sums_at(Format format,
                                                                                  int64_t cols) {
  const QuantFormat quant = quant_format(format);
  const int64_t behind = takes_both_bytes(format) ? 8 : quant.parts() == 1 ? 12 : quant.is_paired() ? 24 : 16;
  return num_groups(cols) * (4 * kGroupSize + behind);
}
[[gnu::always_inline]] static inline constexpr int64_t activation_sums_at(int64_t cols) {
  return num_groups(cols) * (4 * kGroupSize + 28);
}
// An odd number of cache lines, so that the same column of many tokens is spread over the sets of the cache.
static inline constexpr int64_t activation_bytes(int64_t cols) {
  return round_up(num_groups(cols) * (4 * kGroupSize + 32), 2 * kMatrixAlignment) + kMatrixAlignment;
}

}  // namespace argosy
