#include "ops/encoder.h"

#include <algorithm>

namespace argosy {

namespace {

constexpr int64_t kBlockRows = 32;     // two panels: one tile of rows
constexpr int64_t kBlockTokens = 192;  // their activations stay in the second-level cache

void add_bias(Rows<float> out, int64_t num_tokens, const float* bias, int64_t n) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    float* y = out.data + token * out.stride;
    for (int64_t i = 0; i < n; ++i) y[i] += bias[i];
  }
}

// Rounds x, then multiplies: at most kRoundedAtOnce tokens at a time, which bounds the scratch.
void linear_rounded(Runtime& runtime, const MatrixView& matrix, Rows<const float> x, int64_t num_tokens,
                    const float* bias, Rows<float> out) {
  constexpr int64_t kRoundedAtOnce = 16 * kPanelTokens;
  const KernelTable& table = runtime.kernels();
  const int64_t panel_size = token_panel_bytes(matrix.cols);
  const int64_t row_blocks = (matrix.rows + kLinearRows - 1) / kLinearRows;
  for (int64_t first = 0; first < num_tokens; first += kRoundedAtOnce) {
    const int64_t count = std::min(num_tokens - first, kRoundedAtOnce);
    const int64_t groups = (count + kRoundedTokens - 1) / kRoundedTokens;
    const int64_t num_panels = (count + kPanelTokens - 1) / kPanelTokens;
    uint8_t* panels = runtime.scratch(num_panels * panel_size);
    runtime.parallel_for(groups, kRoundedTokens * matrix.cols, [&](int64_t begin, int64_t end, int) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t token = group * kRoundedTokens;
        table.round_to_panel({
            .x = x.data + (first + token) * x.stride,
            .x_stride = x.stride,
            .num_tokens = std::min(count - token, kRoundedTokens),
            .cols = matrix.cols,
            .panel = panels + token / kPanelTokens * panel_size + token % kPanelTokens * 4,
        });
      }
    });
    const int64_t work = kLinearRows * matrix.cols * std::min(count, kPanelTokens);
    runtime.parallel_for(row_blocks * num_panels, work, [&](int64_t begin, int64_t end, int) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / num_panels * kLinearRows;
        const int64_t panel = item % num_panels;
        const int64_t token = panel * kPanelTokens;
        table.linear_panel({
            .weights = matrix.data,
            .cols = matrix.cols,
            .row_begin = row,
            .row_end = std::min(row + kLinearRows, matrix.rows),
            .panel = panels + panel * panel_size,
            .num_tokens = std::min(count - token, kPanelTokens),
            .bias = bias,
            .y = out.data + (first + token) * out.stride + row,
            .y_stride = out.stride,
        });
      }
    });
  }
}

}  // namespace

void linear(Runtime& runtime, const MatrixView& matrix, Rows<const float> x, int64_t num_tokens,
            const float* bias, bool exact, Rows<float> out) {
  if (num_tokens == 0) return;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  if (!exact && matrix.format == Format::bf16 && num_tokens >= kFewestRounded &&
      table.linear_panel != nullptr) {
    return linear_rounded(runtime, matrix, x, num_tokens, bias, out);
  }
  const int64_t cols = matrix.cols;
  const uint8_t* activations = reinterpret_cast<const uint8_t*>(x.data);
  int64_t x_stride = x.stride * 4;
  if (is_quantized(matrix.format)) {
    uint8_t* quants = runtime.scratch(matmul_scratch_bytes(cols, num_tokens));
    quantize_tokens(runtime, x.data, x.stride, cols, num_tokens, quants);
    activations = quants;
    x_stride = activation_bytes(cols);
  }
  const int64_t row_blocks = round_up(matrix.rows, kBlockRows) / kBlockRows;
  const int64_t token_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t work = kBlockRows * cols * std::min(num_tokens, kBlockTokens);
  runtime.parallel_for(row_blocks * token_blocks, work, [&](int64_t begin, int64_t end, int) {
    while (begin < end) {
      const int64_t token = begin / row_blocks * kBlockTokens;
      const int64_t block = begin % row_blocks;
      const int64_t num_blocks = std::min(end - begin, row_blocks - block);
      const int64_t row = block * kBlockRows;
      const int64_t row_end = std::min(row + num_blocks * kBlockRows, matrix.rows);
      const int64_t count = std::min(num_tokens - token, kBlockTokens);
      const Rows<float> y = {out.data + token * out.stride + row, out.stride};
      table.matmul[int(matrix.format)]({
          .weights = matrix.data,
          .cols = cols,
          .row_begin = row,
          .row_end = row_end,
          .x = activations + token * x_stride,
          .x_stride = x_stride,
          .x_index = nullptr,
          .y = y.data,
          .y_stride = y.stride,
          .y_index = nullptr,
          .num_tokens = count,
      });
      if (bias != nullptr) add_bias(y, count, bias + row, row_end - row);
      begin += num_blocks;
    }
  });
}

void layer_norm(Runtime& runtime, const float* x, const float* weight, const float* bias, float eps,
                int64_t rows, int64_t cols, float* out) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      table.layer_norm(x + row * cols, weight, bias, cols, eps, out + row * cols);
    }
  });
}

void gelu(Runtime& runtime, Gelu kind, int64_t rows, int64_t cols, float* x) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, 16 * cols, [&](int64_t begin, int64_t end, int) {
    table.gelu(kind, (end - begin) * cols, x + begin * cols);
  });
}

void silu(Runtime& runtime, int64_t rows, int64_t cols, float* x) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  runtime.parallel_for(rows, 16 * cols, [&](int64_t begin, int64_t end, int) {
    table.silu((end - begin) * cols, x + begin * cols);
  });
}

void attend(Runtime& runtime, const AttendBatch& batch, Rows<float> out) {
  if (batch.num_queries == 0 || batch.num_heads == 0) return;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t scratch_floats = round_up(attend_scratch_floats(batch.dim), 16);
  float* scratch = reinterpret_cast<float*>(runtime.scratch(runtime.num_threads() * scratch_floats * 4));
  const int64_t heads_per_kv_head = batch.num_heads / batch.num_kv_heads;
  const int64_t blocks = (batch.num_queries + kAttendQueries - 1) / kAttendQueries;
  const int64_t work = 2 * std::min(batch.num_queries, kAttendQueries) * batch.num_keys * batch.dim;
  // All queries of one head come before the next head, so that its keys stay in the cache.
  runtime.parallel_for(batch.num_heads * blocks, work, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks;
      const int64_t first = item % blocks * kAttendQueries;
      const int64_t kv_at = head / heads_per_kv_head * batch.dim;
      table.attend({
          .query = batch.query.data + first * batch.query.stride + head * batch.dim,
          .key = batch.key.data + kv_at,
          .value = batch.value.data + kv_at,
          .query_stride = batch.query.stride,
          .key_stride = batch.key.stride,
          .value_stride = batch.value.stride,
          .num_queries = std::min(batch.num_queries - first, kAttendQueries),
          .num_keys = batch.num_keys,
          .dim = batch.dim,
          .scale = batch.scale,
          .out = out.data + first * out.stride + head * batch.dim,
          .out_stride = out.stride,
          .scratch = scratch + worker * scratch_floats,
      });
    }
  });
}

}  // namespace argosy
