// linear_bf16.h: y = W x + b for bfloat16 weights and many tokens, with x rounded to bfloat16.
//
//   W  rows x cols, row-major at any alignment.    x  float32 rows.    b  float32 [rows] or nullptr.
//   y  float32 rows; what happens to them is Finish in encoder_args.h.
//
// Bound by multiply-adds (panel_bf16.h). Sums begin with the bias.
//
// The tokens of a panel stream from the second-level cache while kLinearRows rows of W, which stay there for
// the next panel, use them.
#pragma once

#include "kernels/elementwise.h"
#include "kernels/panel_bf16.h"

namespace argosy {
namespace {

static_assert(kLinearRows % kPanelTileRows == 0);

inline void round_to_panel(const PanelArgs& a) { round_tokens(a, broadcast(1.0f)); }

// Writes sums [rows][kPanelTokens] as rows of y: finish(sum, what y has there).
template <class F>
inline void write_sums(const LinearArgs& a, const float* sums, const F& finish) {
  for_each_token(sums, a.num_tokens, a.row_end - a.row_begin,
                 [&](int64_t token, int64_t row, int64_t n, Vec values) {
                   float* y = a.y + token * a.y_stride + row;
                   store(y, finish(values, [&] { return load(y, n); }), n);
                 });
}

void linear_panel(const LinearArgs& a) {
  alignas(64) float sums[kLinearRows * kPanelTokens];
  const int64_t stride = a.cols * 2;
  with_number<kPanelTileVecs>((a.num_tokens + kLanes - 1) / kLanes, [&]<int kVecs>(Number<kVecs>) {
    multiply_rows<kVecs>(
        {a.weights + a.row_begin * stride, stride, a.cols}, a.row_end - a.row_begin, a.panel,
        [&](int64_t row, int) { return a.bias != nullptr ? broadcast(a.bias[a.row_begin + row]) : zeros(); },
        sums);
  });
  switch (a.finish) {
    case Finish::store:
      return write_sums(a, sums, [](Vec sum, const auto&) { return sum; });
    case Finish::add:
      return write_sums(a, sums, [](Vec sum, const auto& y) { return add(y(), sum); });
    case Finish::multiply:
      return write_sums(a, sums, [](Vec sum, const auto& y) { return mul(y(), sum); });
    case Finish::gelu_erf:
      return write_sums(a, sums, [](Vec sum, const auto&) { return gelu_erf(sum); });
    case Finish::gelu_tanh:
      return write_sums(a, sums, [](Vec sum, const auto&) { return gelu_tanh(sum); });
    case Finish::gelu_quick:
      return write_sums(a, sums, [](Vec sum, const auto&) { return gelu_quick(sum); });
    case Finish::silu:
      return write_sums(a, sums, [](Vec sum, const auto&) { return silu(sum); });
  }
}

}  // namespace
}  // namespace argosy
