#include "ops/encoder.h"

#include <algorithm>

#include "kernels/encoder_args.h"
#include "kernels/matmul_args.h"

namespace argosy {

namespace {

constexpr int64_t kBlockRows = 32;     // two panels: one tile of rows
constexpr int64_t kBlockTokens = 192;  // their activations stay in the second-level cache

// Finishes sums of n rows of a matrix, which may lie in out: adds the bias, and writes them.
void finish_sums(const KernelTable& table, Finish finish, Rows<float> sums, int64_t num_tokens,
                 const float* bias, int64_t n, Rows<float> out) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    float* sum = sums.data + token * sums.stride;
    float* y = out.data + token * out.stride;
    if (bias != nullptr) {
      for (int64_t i = 0; i < n; ++i) sum[i] += bias[i];
    }
    switch (finish) {
      case Finish::store:
        break;
      case Finish::add:
        for (int64_t i = 0; i < n; ++i) y[i] += sum[i];
        break;
      case Finish::multiply:
        for (int64_t i = 0; i < n; ++i) y[i] *= sum[i];
        break;
      case Finish::gelu_erf:
        table.gelu(Gelu::erf, n, sum);
        break;
      case Finish::gelu_tanh:
        table.gelu(Gelu::tanh, n, sum);
        break;
      case Finish::gelu_quick:
        table.gelu(Gelu::quick, n, sum);
        break;
      case Finish::silu:
        table.silu(n, sum);
        break;
    }
  }
}

// Rounds x, then multiplies: at most kRoundedAtOnce tokens at a time, which bounds the scratch.
void linear_rounded(Runtime& runtime, const MatrixView& matrix, Rows<const float> x, int64_t num_tokens,
                    const float* bias, Finish finish, Rows<float> out) {
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
            .finish = finish,
            .y = out.data + (first + token) * out.stride + row,
            .y_stride = out.stride,
        });
      }
    });
  }
}

}  // namespace

void linear(Runtime& runtime, const MatrixView& matrix, Rows<const float> x, int64_t num_tokens,
            const float* bias, bool exact, Finish finish, Rows<float> out) {
  if (num_tokens == 0) return;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  if (!exact && matrix.format == Format::bf16 && num_tokens >= kFewestRounded && runtime.rounds()) {
    return linear_rounded(runtime, matrix, x, num_tokens, bias, finish, out);
  }
  const int64_t cols = matrix.cols;
  const uint8_t* activations = reinterpret_cast<const uint8_t*>(x.data);
  int64_t x_stride = x.stride * 4;
  const bool quantizes = is_quantized(matrix.format);
  const bool keeps_out = finish == Finish::add || finish == Finish::multiply;
  ScratchLayout layout;
  const int64_t quants_at = layout.add(quantizes ? num_tokens * activation_bytes(cols) : 0);
  const int64_t sums_at = layout.add(keeps_out ? num_tokens * matrix.rows * 4 : 0);
  uint8_t* scratch = layout.bytes() > 0 ? runtime.scratch(layout.bytes()) : nullptr;
  if (quantizes) {
    quantize_tokens(runtime, x.data, x.stride, cols, num_tokens, scratch + quants_at, ColumnOrder(matrix));
    activations = scratch + quants_at;
    x_stride = activation_bytes(cols);
  }
  const Rows<float> sums =
      keeps_out ? Rows<float>{reinterpret_cast<float*>(scratch + sums_at), matrix.rows} : out;
  const int64_t row_blocks = round_up(matrix.rows, kBlockRows) / kBlockRows;
  const int64_t token_blocks = (num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int64_t work = kBlockRows * cols * std::min(num_tokens, kBlockTokens);
  runtime.parallel_for(
      row_blocks * token_blocks, work,
      [&](int64_t begin, int64_t end, int worker) {
        while (begin < end) {
          const int64_t token = begin / row_blocks * kBlockTokens;
          const int64_t block = begin % row_blocks;
          const int64_t num_blocks = std::min(end - begin, row_blocks - block);
          const int64_t row = block * kBlockRows;
          const int64_t row_end = std::min(row + num_blocks * kBlockRows, matrix.rows);
          const int64_t count = std::min(num_tokens - token, kBlockTokens);
          const Rows<float> y = {sums.data + token * sums.stride + row, sums.stride};
          table.matmul[int(matrix.format)]({
              .format = matrix.format,
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
              .scratch = runtime.product_scratch(worker),
          });
          finish_sums(table, finish, y, count, bias != nullptr ? bias + row : nullptr, row_end - row,
                      {out.data + token * out.stride + row, out.stride});
          begin += num_blocks;
        }
      },
      runtime.blocks_together(kBlockRows));
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

void round_keys(Runtime& runtime, const RoundedKeys& keys, Rows<const float> key, Rows<const float> value,
                uint8_t* rounded) {
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t blocks = (keys.num_keys + kRoundedKeys - 1) / kRoundedKeys;
  // All heads of some keys come before the next keys: they share cache lines.
  runtime.parallel_for(
      blocks * keys.num_kv_heads, kRoundedKeys * keys.dim * 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t head = item % keys.num_kv_heads, first = item / keys.num_kv_heads * kRoundedKeys;
          uint8_t* to = rounded + head * keys.head_bytes() + first * keys.dim * 2;
          table.round_keys({
              .key = key.data + first * key.stride + head * keys.dim,
              .value = value.data + first * value.stride + head * keys.dim,
              .key_stride = key.stride,
              .value_stride = value.stride,
              .num_keys = std::min(keys.num_keys - first, kRoundedKeys),
              .dim = keys.dim,
              .keys = to,
              .values = to + keys.keys_bytes(),
          });
        }
      });
}

void attend_rounded(Runtime& runtime, Rows<const float> query, int64_t num_queries, int64_t num_heads,
                    const RoundedKeys& keys, const uint8_t* rounded, float scale, Rows<float> out) {
  if (num_queries == 0 || num_heads == 0) return;
  const KernelTable& table = runtime.kernels();
  const auto lock = runtime.lock();
  const int64_t scratch_floats = round_up(attend_rounded_scratch_floats(keys.dim), 16);
  float* scratch = reinterpret_cast<float*>(runtime.scratch(runtime.num_threads() * scratch_floats * 4));
  const int64_t heads_per_kv_head = num_heads / keys.num_kv_heads;
  const int64_t blocks = (num_queries + kAttendQueries - 1) / kAttendQueries;
  const int64_t work = std::min(num_queries, kAttendQueries) * keys.num_keys * keys.dim;
  // All queries of one head come before the next head, so that its keys stay in the cache.
  runtime.parallel_for(num_heads * blocks, work, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = item / blocks, first = item % blocks * kAttendQueries;
      const uint8_t* from = rounded + head / heads_per_kv_head * keys.head_bytes();
      table.attend_rounded({
          .query = query.data + first * query.stride + head * keys.dim,
          .query_stride = query.stride,
          .num_queries = std::min(num_queries - first, kAttendQueries),
          .keys = from,
          .values = from + keys.keys_bytes(),
          .num_keys = keys.num_keys,
          .dim = keys.dim,
          .scale = scale,
          .out = out.data + first * out.stride + head * keys.dim,
          .out_stride = out.stride,
          .scratch = scratch + worker * scratch_floats,
      });
    }
  });
}

}  // namespace argosy
