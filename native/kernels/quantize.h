// quantize.h: quantises float32 weights to q8 and q4 panels, and converts rows of any format back to float32.
//
//   q8  scale = largest magnitude in the group / 127 to 120, rounded to float16; q = weight / scale, rounded
//       to nearest. The divisor with the least squared error wins: weights that were quantised before lie
//       on a grid, and a scale that matches the grid halves the error.
//   q4  the float16 scale, from a list of candidates, with the least squared error over the group.
//
// A group with an infinity or a NaN gets a NaN scale, so that the damage stays visible. There is one version,
// written in vectors of four with a fixed order of sums: every machine packs the same bytes.
#pragma once

#include <cmath>

#include "kernels/formats.h"
#include "kernels/half.h"
#include "kernels/matmul_args.h"
#include "kernels/matmul_f8.h"
#include "kernels/weight_scale.h"

namespace argosy {
namespace {

using Floats = float __attribute__((vector_size(16)));
constexpr int kGroupParts = int(kGroupSize) / 4;

// One group of one row, with zeros beyond the last column of the matrix.
struct WeightGroup {
  Floats part[kGroupParts];
  float absmax;     // NaN if any weight is not finite
  float outermost;  // the weight with the largest magnitude
};

inline WeightGroup load_group(const float* weights, int64_t n) {
  float values[kGroupSize] = {};
  std::memcpy(values, weights, size_t(n) * sizeof(float));
  WeightGroup group;
  std::memcpy(group.part, values, sizeof values);
  uint32_t most = 0;
  for (int i = 0; i < kGroupSize; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(values[i]) & 0x7FFFFFFFu;
    most = magnitude > most ? magnitude : most;
  }
  group.absmax = bit_cast<float>(most >= 0x7F800000u ? 0x7FC00000u : most);
  group.outermost = group.absmax;
  for (int i = 0; i < kGroupSize; ++i) {
    if (values[i] == -group.absmax) group.outermost = -group.absmax;
  }
  return group;
}

// Rounds to nearest (even on a tie), clamped to [low, high]; |x| must be below 2^22.
inline Floats round_within(Floats x, float low, float high) {
  const Floats rounder = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
  const Floats lowest = {low, low, low, low};
  const Floats highest = {high, high, high, high};
  Floats whole = (x + rounder) - rounder;
  whole = whole < lowest ? lowest : whole;
  return whole > highest ? highest : whole;
}

inline void round_group(const WeightGroup& group, float inverse, float low, float high, int8_t* quants) {
  for (int i = 0; i < kGroupParts; ++i) {
    const Floats whole = round_within(group.part[i] * inverse, low, high);
    for (int lane = 0; lane < 4; ++lane) quants[4 * i + lane] = int8_t(whole[lane]);
  }
}

inline float scale_q8(const WeightGroup& group) {
  float best_scale = 0.0f;
  float best_error = INFINITY;
  for (float steps = 127.0f; steps >= 120.0f; steps -= 1.0f) {
    const float scale = float_from_f16(f16_from_float(group.absmax / steps));
    const float inverse = 1.0f / scale;
    if (!(inverse < 1e30f) || inverse == 0.0f) return scale;  // outside float16's range
    Floats squares = {};
    for (int i = 0; i < kGroupParts; ++i) {
      const Floats rest = group.part[i] - round_within(group.part[i] * inverse, -127.0f, 127.0f) * scale;
      squares += rest * rest;
    }
    const float error = (squares[0] + squares[2]) + (squares[1] + squares[3]);
    if (error < best_error) {
      best_error = error;
      best_scale = scale;
    }
  }
  return best_scale;
}

// The candidates of a q4 scale: how many steps of the scale the outermost weight is from zero. A negative
// number gives that weight a negative quant; there is one more negative quant than positive ones.
constexpr float kStepsQ4[] = {-8.0f, -7.75f, -7.5f, -7.25f, -7.0f, -8.25f, -8.5f, -8.75f,
                              -9.0f, 7.0f,   6.75f, 6.5f,   7.25f, 7.5f,   7.75f, 8.0f};

inline float scale_q4(const WeightGroup& group) {
  float best_scale = 0.0f;
  float best_error = 0.0f;  // minus the sum of squared weights, which is the same for all candidates
  for (const float steps : kStepsQ4) {
    const float inverse = steps / group.outermost;
    Floats products = {};
    Floats squares = {};
    for (int i = 0; i < kGroupParts; ++i) {
      const Floats q = round_within(group.part[i] * inverse, -8.0f, 7.0f);
      products += group.part[i] * q;
      squares += q * q;
    }
    const float product = (products[0] + products[2]) + (products[1] + products[3]);
    const float square = (squares[0] + squares[2]) + (squares[1] + squares[3]);
    // The best scale for these quants, rounded to float16 as stored.
    const float scale = float_from_f16(f16_from_float(product / square));
    const float error = scale * (scale * square - 2.0f * product);
    if (error < best_error) {
      best_error = error;
      best_scale = scale;
    }
  }
  return best_scale;
}

// Writes the scale and the quants of one group; zeros if the group is zero or too small for float16.
template <Format kFormat>
float quantize_group(const WeightGroup& group, int8_t* quants) {
  std::memset(quants, 0, kGroupSize);
  if (!(group.absmax >= 1e-30f)) return group.absmax != group.absmax ? group.absmax : 0.0f;
  const float scale = kFormat == Format::q8 ? scale_q8(group) : scale_q4(group);
  const float inverse = 1.0f / scale;
  if (!(inverse < 1e30f && inverse > -1e30f) || inverse == 0.0f) return scale;
  if (kFormat == Format::q8) {
    round_group(group, inverse, -127.0f, 127.0f, quants);
  } else {
    round_group(group, inverse, -8.0f, 7.0f, quants);
  }
  return scale;
}

template <Format kFormat>
void quantize_panels(const float* weights, int64_t rows, int64_t cols, int64_t panel_begin, int64_t panel_end,
                     uint8_t* out) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  const int64_t groups = num_groups(cols);
  for (int64_t index = panel_begin; index < panel_end; ++index) {
    uint8_t* panel = out + index * panel_bytes(kFormat, cols);
    std::memset(panel, 0, size_t(panel_bytes(kFormat, cols)));
    for (int64_t g = 0; g < groups; ++g)
      std::memset(panel + kQuant.quants_at(g), kFormat == Format::q8 ? 0x80 : 0x88,
                  size_t(kQuant.group_bytes()));
    for (int64_t r = 0; r < kPanelRows && index * kPanelRows + r < rows; ++r) {
      const float* row = weights + (index * kPanelRows + r) * cols;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t n = cols - g * kGroupSize < kGroupSize ? cols - g * kGroupSize : kGroupSize;
        const WeightGroup group = load_group(row + g * kGroupSize, n);
        int8_t q[kGroupSize];
        const uint16_t scale = f16_from_float(quantize_group<kFormat>(group, q));
        std::memcpy(panel + kQuant.scales_at(g) + r * 2, &scale, 2);
        uint8_t* quants = panel + kQuant.quants_at(g) + r * 4;
        uint8_t bytes[kGroupSize];
        if constexpr (kFormat == Format::q8) {
          for (int i = 0; i < 32; ++i) bytes[i] = uint8_t(q[i] + 128);
          for (int64_t chunk = 0; chunk < 8; ++chunk) {
            std::memcpy(quants + chunk * kChunkBytes, bytes + 4 * chunk, 4);
          }
        } else {
          for (int i = 0; i < 16; ++i) bytes[i] = uint8_t((q[i] + 8) | (q[i + 16] + 8) << 4);
          for (int64_t chunk = 0; chunk < 4; ++chunk) {
            std::memcpy(quants + chunk * kChunkBytes, bytes + 4 * chunk, 4);
          }
        }
      }
    }
  }
}

template <Format kFormat>
void dequantize_coded_row(const uint8_t* panel, int64_t row, int64_t cols, float* out) {
  constexpr QuantFormat kQuant = quant_format(kFormat);
  const float row_scale = kQuant.has_row_scale ? read_unaligned<float>(panel + 4 * row) : 1.0f;
  for (int64_t group = 0; group < num_groups(cols); ++group) {
    int8_t q[kGroupSize];
    CodedRow<kFormat>::quants(panel, row, group, q);
    float scale[2];
    for (int part = 0; part < kQuant.parts(); ++part)
      scale[part] = CodedRow<kFormat>::scale(panel, row, group, part);
    for (int64_t i = 0; i < kGroupSize && group * kGroupSize + i < cols; ++i) {
      const int64_t part = kQuant.parts() == 2 ? i / 16 : 0;
      out[group * kGroupSize + i] = scale[part] * float(q[i]) * row_scale;
    }
  }
}

inline void dequantize_panel_row(Format format, const uint8_t* weights, int64_t cols, int64_t row,
                                 float* out) {
  const uint8_t* panel = weights + row / kPanelRows * panel_bytes(format, cols);
  if (is_coded(format)) {
    return with_number<kNumFormats - 1, int(Format::q8)>(int(format), [&]<int kFormat>(Number<kFormat>) {
      if constexpr (is_coded(Format(kFormat)))
        dequantize_coded_row<Format(kFormat)>(panel, row % kPanelRows, cols, out);
    });
  }
  const QuantFormat quant = quant_format(format);
  const float row_scale = quant.has_row_scale ? read_unaligned<float>(panel + row % kPanelRows * 4) : 1.0f;
  constexpr int64_t kSameScale = 16;  // no scale is of fewer columns
  for (int64_t begin = 0; begin < cols; begin += kSameScale) {
    const auto [scale, min] = weight_scale_at(format, panel, row % kPanelRows, begin);
    const int64_t end = cols - begin < kSameScale ? cols : begin + kSameScale;
    for (int64_t col = begin; col < end; ++col) {
      const float value = scale * float(quant_at(quant, panel, row % kPanelRows, col));
      out[col] = quant.has_min ? value + min : value * row_scale;
    }
  }
}

void dequantize_row(Format format, const uint8_t* weights, int64_t cols, int64_t row, float* out) {
  if (is_quantized(format)) return dequantize_panel_row(format, weights, cols, row, out);
  if (is_f8(format)) {
    for (int64_t i = 0; i < cols; ++i) out[i] = f8_weight_at(format, weights, cols, row, i);
    return;
  }
  const uint8_t* values = weights + row * cols * weight_bytes(format);
  if (format == Format::f32) {
    std::memcpy(out, values, size_t(cols) * 4);
  } else if (format == Format::f16) {
    for (int64_t i = 0; i < cols; ++i) out[i] = float_from_f16(read_unaligned<uint16_t>(values + 2 * i));
  } else {
    for (int64_t i = 0; i < cols; ++i) out[i] = float_from_bf16(read_unaligned<uint16_t>(values + 2 * i));
  }
}

}  // namespace
}  // namespace argosy
