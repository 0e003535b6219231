#include "ops/expert_adapter.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

namespace argosy {

namespace {

// With these, an offset stays far below 2^62.
constexpr int64_t kMostRank = int64_t{1} << 16, kMostSize = int64_t{1} << 30;

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

void require(const std::string& name, int64_t found, int64_t lowest, int64_t highest) {
  if (found < lowest || found > highest)
    refuse(name + " is " + std::to_string(found) + ", expected " + std::to_string(lowest) + " to " +
           std::to_string(highest));
}

void require_part(const ExpertPart& part) {
  if (part.format != Format::f32 && part.format != Format::f16 && part.format != Format::bf16)
    refuse("pairs have a format that is not one of f32, f16, bf16");
  require("hidden", part.hidden, 1, kMostSize);
  require("width", part.width, 1, kMostSize);
  require("num_experts", part.num_experts, 1, kMostSize);
  for (size_t i = 0; i < 3; ++i) {
    require("ranks[" + std::to_string(i) + "]", part.ranks[i], 0, kMostRank);
    if (!std::isfinite(part.scales[i]))
      refuse("scales[" + std::to_string(i) + "] is " + std::to_string(part.scales[i]) +
             ", expected a finite number");
  }
  if (std::all_of(part.ranks.begin(), part.ranks.end(), [](int64_t rank) { return rank == 0; }))
    refuse("ranks are all 0, so the layer has no pairs");
}

// The offsets, and where the last ends.
std::pair<std::array<std::array<int64_t, 2>, 3>, int64_t> lay_out(const ExpertPart& part) {
  std::array<std::array<int64_t, 2>, 3> offsets = {};
  int64_t end = 0;
  for (size_t matrix = 0; matrix < 3; ++matrix) {
    for (size_t half = 0; half < 2; ++half) {
      // `down` has the columns of the matrix, `up` its rows.
      const int64_t length = (matrix < 2) == (half == 0) ? part.hidden : part.width;
      offsets[matrix][half] = end;
      end += round_up(matrix_bytes(part.format, part.ranks[matrix], length), kPairAlignment);
    }
  }
  return {offsets, end};
}

}  // namespace

std::array<std::array<int64_t, 2>, 3> ExpertPart::offsets() const { return lay_out(*this).first; }
int64_t ExpertPart::nbytes() const { return lay_out(*this).second; }

ExpertAdapter::ExpertAdapter(std::shared_ptr<const void> hold, const uint8_t* data, int64_t nbytes)
    : hold_(std::move(hold)), data_(data), nbytes_(nbytes) {}

void ExpertAdapter::add_layer(int64_t layer, const ExpertPart& part) {
  require("layer", layer, 0, UINT16_MAX);
  if (this->part(layer) != nullptr) refuse("layer " + std::to_string(layer) + " was already added");
  require_part(part);
  if (layer >= num_layers()) layers_.resize(size_t(layer) + 1);
  const size_t experts = size_t(part.num_experts);
  layers_[size_t(layer)] = {part, std::vector<ExpertPairs>(experts), std::vector<bool>(experts)};
}

const ExpertPart* ExpertAdapter::part(int64_t layer) const {
  if (layer < 0 || layer >= num_layers()) return nullptr;
  const ExpertPart& part = layers_[size_t(layer)].part;
  return part.num_experts > 0 ? &part : nullptr;
}

ExpertAdapter::Placed& ExpertAdapter::layer_of(int64_t layer, int64_t expert) {
  if (part(layer) == nullptr) refuse("layer " + std::to_string(layer) + " has no pairs in this adapter");
  Placed& placed = layers_[size_t(layer)];
  require("expert", expert, 0, placed.part.num_experts - 1);
  return placed;
}

void ExpertAdapter::place(int64_t layer, int64_t expert, int64_t at) {
  Placed& placed = layer_of(layer, expert);
  const ExpertPart& part = placed.part;
  const auto [offsets, size] = lay_out(part);
  if (at < -1 || (at >= 0 && (size > nbytes_ || at > nbytes_ - size)))
    refuse("the part of expert " + std::to_string(expert) + " of layer " + std::to_string(layer) + ", " +
           std::to_string(size) + " bytes at " + std::to_string(at) + ", does not lie inside memory of " +
           std::to_string(nbytes_) + " bytes");
  placed.has_place[size_t(expert)] = at >= 0;
  ExpertPairs& pairs = placed.pairs[size_t(expert)];
  pairs = {};
  if (at < 0) return;
  LowRank* const of_matrices[3] = {&pairs.gate, &pairs.up, &pairs.down};
  for (size_t i = 0; i < 3; ++i) {
    if (part.ranks[i] == 0) continue;
    *of_matrices[i] = {.format = part.format,
                       .down = data_ + at + offsets[i][0],
                       .up = data_ + at + offsets[i][1],
                       .rank = part.ranks[i],
                       .scale = part.scales[i]};
  }
}

bool ExpertAdapter::has_places(int64_t layer, const std::vector<int32_t>& experts) const {
  if (part(layer) == nullptr) return true;
  const Placed& placed = layers_[size_t(layer)];
  return std::all_of(experts.begin(), experts.end(), [&](int32_t expert) { return placed.has(expert); });
}

const ExpertPairs* ExpertAdapter::find(int64_t layer, int64_t expert) const {
  if (part(layer) == nullptr) return nullptr;
  const Placed& placed = layers_[size_t(layer)];
  if (!placed.has(expert))
    refuse("the pairs of expert " + std::to_string(expert) + " of layer " + std::to_string(layer) +
           " are not in memory");
  return &placed.pairs[size_t(expert)];
}

}  // namespace argosy
