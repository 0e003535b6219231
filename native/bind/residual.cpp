// residual.cpp: binds how sublayers read and write residual streams.

#include <nanobind/stl/optional.h>

#include <cmath>
#include <string>
#include <utility>

#include "bind/layers.h"

namespace argosy {

using namespace nb::literals;

namespace {

constexpr int64_t kMostStreams = 16;

BoundMix sinkhorn_mix(const Matrix& matrix, const ArrayOf<float>& base, const ArrayOf<float>& scale) {
  BoundMix bound;
  const float* base_data = bound.kept.keep("base", base, matrix.view.rows);
  read_array("scale", scale, {kAnySize});
  const int64_t scales = int64_t(scale.shape(0));
  require_range("size of scale", scales, 1, 3);
  bound.mix = SinkhornMix{bound.kept.keep(matrix), base_data, bound.kept.keep("scale", scale, scales)};
  bound.num_scales = scales;
  return bound;
}

BoundMix gated_mix(const ArrayOf<float>& norm, const Matrix& down, const Matrix& up, const Matrix* inject) {
  BoundMix bound;
  bound.mix = GatedMix{
      .norm = bound.kept.keep("norm", norm, down.view.cols),
      .down = bound.kept.keep(down),
      .up = bound.kept.keep(up),
      .inject = inject != nullptr ? std::optional(bound.kept.keep(*inject)) : std::nullopt,
  };
  require_size("rows of up", up.view.rows, down.view.cols);
  require_size("columns of up", up.view.cols, down.view.rows);
  if (inject != nullptr) require_size("columns of inject", inject->view.cols, down.view.cols);
  return bound;
}

BoundMix bank_mix(const ArrayOf<float>& weight, bool starts_block) {
  BoundMix bound;
  read_array("weight", weight, {kAnySize});
  bound.num_scales = int64_t(weight.shape(0));
  bound.mix = BankMix{bound.kept.keep("weight", weight, bound.num_scales), starts_block};
  return bound;
}

BoundMix other_mix(StreamMix mix) {
  BoundMix bound;
  bound.mix = std::move(mix);
  return bound;
}

void make_rule(BoundResidual* self, int64_t num_streams, const BoundMix& head, int64_t iterations, float eps,
               bool is_lagged, float magnitude) {
  require_range("num_streams", num_streams, 2, kMostStreams);
  require_range("iterations", iterations, 0, 1000);
  if (!(eps >= 0) || !std::isfinite(eps)) refuse("eps is " + std::to_string(eps) + ", expected 0 or more");
  if (!std::isfinite(magnitude)) refuse("magnitude is " + std::to_string(magnitude) + ", expected a number");
  new (self) BoundResidual{{num_streams, iterations, eps, magnitude, is_lagged, head.mix}, head};
}

}  // namespace

void require_mix(const BoundMix& bound, const ResidualRule& rule, int64_t hidden, bool is_head) {
  const int64_t n = rule.num_streams;
  if (const auto* own = std::get_if<SinkhornMix>(&bound.mix)) {
    const int64_t rows = rule.mixes_streams() ? n * (2 + n) : 2 * n;
    require_size("rows of a mix", own->matrix.rows, is_head ? n : rows);
    require_size("columns of a mix", own->matrix.cols, n * hidden);
    require_size("scales of a mix", bound.num_scales, is_head ? 1 : rule.mixes_streams() ? 3 : 2);
  } else if (const auto* gated = std::get_if<GatedMix>(&bound.mix)) {
    if (rule.is_lagged) refuse("gated streams carry no weights: is_lagged belongs to sinkhorn_mix");
    require_size("columns of a mix", gated->down.cols, n * hidden);
    if (gated->inject.has_value() == is_head) refuse("inject belongs to every mix but that of the head");
    if (gated->inject) require_size("rows of inject", gated->inject->rows, n);
  } else if (const auto* bank = std::get_if<BankMix>(&bound.mix)) {
    require_size("size of weight", bound.num_scales, hidden);
    if (bank->starts_block && is_head) refuse("only sublayers start a block");
  } else if (!is_head) {
    refuse("only the head reads streams by a mean or by carried weights");
  }
  if (std::holds_alternative<CarriedMix>(bound.mix) && !rule.is_lagged)
    refuse("nothing carries weights to the head unless is_lagged");
}

void require_streams(const BoundLayer& bound, const ResidualRule& rule, int64_t hidden) {
  const Layer& layer = bound.layer;
  if (rule.num_streams == 1) {
    if (bound.mixer_mix || bound.ffn_mix) refuse("the layer has mixes, but the stack has one stream");
    return;
  }
  if (layer.mixer.has_value() != bound.mixer_mix.has_value() ||
      layer.ffn.has_value() != bound.ffn_mix.has_value())
    refuse("with residual streams, a mixer and a feed-forward network have a mix each");
  if (layer.is_parallel || layer.scale != 1 || layer.normed_residual != 0)
    refuse("with residual streams, a layer is not parallel, and has neither scale nor normed_residual");
  if (const RoutedFfn* ffn = layer.routed(); ffn != nullptr && (ffn->norm != nullptr || ffn->router.norm))
    refuse("with residual streams, router and experts read what the layer's norm gives");
  const bool has_bank = std::holds_alternative<BankMix>(rule.head);
  for (const std::optional<BoundMix>* mix : {&bound.mixer_mix, &bound.ffn_mix}) {
    if (!*mix) continue;
    require_mix(**mix, rule, hidden, false);
    if (std::holds_alternative<BankMix>((*mix)->mix) != has_bank)
      refuse("either all mixes of a stack, and its head's, read a bank, or none");
  }
}

void require_room(const std::vector<Layer>& layers, const ResidualRule& rule) {
  int64_t blocks = 0;
  for (const Layer& layer : layers) {
    for (const std::optional<StreamMix>* mix : {&layer.mixer_mix, &layer.ffn_mix}) {
      const auto* bank = *mix ? std::get_if<BankMix>(&**mix) : nullptr;
      if (bank != nullptr && bank->starts_block) ++blocks;
    }
  }
  require_range("blocks that start", blocks, 0, rule.num_streams - 1);
}

void bind_residual(nb::module_& m) {
  nb::class_<BoundMix>(m, "StreamMix", "How a sublayer reads and writes residual streams.");
  m.def("sinkhorn_mix", &sinkhorn_mix, "matrix"_a, "base"_a, "scale"_a, R"(
    Manifold-constrained hyper-connections of n streams (arXiv:2512.24880; native/ops/residual.h).

    Args:
        matrix: [n (2 + n), n * hidden], rows of the input's, the output's and the streams' weights; without iterations
            [2 n, n * hidden], and before the head [n, n * hidden].
        base: one number for each row.   scale: [3]; without iterations [2], before the head [1].)");
  m.def("gated_mix", &gated_mix, "norm"_a, "down"_a, "up"_a, "inject"_a.none() = nb::none(), R"(
    Streams that are normed, and gated by a product of low rank (Qwen3.8; native/ops/residual.h).

    Args:
        norm: [n * hidden].   down: [rank, n * hidden].   up: [n * hidden, rank].
        inject: [n, n * hidden]; None before the head.)");
  m.def("bank_mix", &bank_mix, "weight"_a, "starts_block"_a = false, R"(
    A bank of earlier hidden states, which is read with the current one (Kimi-K3; native/ops/residual.h).

    Args:
        weight: [hidden].
        starts_block: after this sublayer has read, the hidden state goes to the bank. Blocks that start are fewer than
            the streams.)");
  m.def("mean_mix", [] { return other_mix(MeanMix{}); }, "The mean of the streams, for the head.");
  m.def(
      "carried_mix", [] { return other_mix(CarriedMix{}); },
      "The sum of the streams with the input weights that the last sublayer left, for the head.");
  nb::class_<BoundResidual>(m, "Residual", R"(
    The residual streams of a Stack.

    Args:
        head: how the streams become what the final norm reads.
        iterations, eps, magnitude: of `sinkhorn_mix`; without iterations, streams are not mixed.
        is_lagged: the input weights of a sublayer are for the next one; those of the first are [1, 0, ...].)")
      .def("__init__", &make_rule, "num_streams"_a, "head"_a, nb::kw_only(), "iterations"_a = 0,
           "eps"_a = 0.0f, "is_lagged"_a = false, "magnitude"_a = 2.0f);
}

}  // namespace argosy
