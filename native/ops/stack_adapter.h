// stack_adapter.h: what an adapter changes in the layers of a Stack: low-rank pairs beside dense products,
// the embedding and latent attention, and whole matrices in place of the model's.
//
// A product is known by the memory of its matrix. The embedding has entries of its own, because a head may
// share its matrix.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "ops/latent_attention.h"
#include "ops/low_rank.h"
#include "ops/matmul.h"

namespace argosy {

// A pair for some rows of a matrix.
struct RowPair {
  LowRank pair;
  int64_t row_begin, num_rows;
};

// What takes the place of a product with a matrix, or is added to it.
struct ProductChange {
  std::optional<MatrixView> replacement;  // f32, f16 or bf16, of the same shape; none: the model's matrix
  std::vector<RowPair> pairs;             // added one after another
};

// All memory stays in place while the adapter is in use.
struct StackAdapter {
  std::unordered_map<const uint8_t*, ProductChange> products;  // by MatrixView::data
  std::unordered_map<const uint8_t*, ExpertPairs>
      networks;  // dense networks and shared experts, by their `up`
  std::unordered_map<const uint8_t*, LatentPairs> latents;  // by LatentHeads::key_up
  LowRank embedding;                                        // down [vocabulary][rank], up [rank][hidden]
  const float* token_factors = nullptr;                     // [vocabulary], of embeddings; nullptr: none
  std::optional<MatrixView> replaced_embedding;             // f32, f16 or bf16
  std::vector<std::shared_ptr<const void>> hold;
  // The largest sum of the ranks of gate, up and down over all dense networks and experts.
  int64_t ranks = 0;
};

// The tokens of a step that have this adapter.
struct AdaptedRows {
  int32_t number;
  std::shared_ptr<const StackAdapter> adapter;
  std::vector<int32_t> rows;  // ascending
};

// The most runtime scratch that change_products takes, whatever an adapter has.
int64_t adapter_scratch_bytes();
constexpr int64_t kMostRank = 4096;  // of a pair

// Applies an adapter to the outputs of products that are written, in these rows of x [..][cols].
void change_products(Runtime& runtime, const AdaptedRows& adapted, const std::vector<Product>& products,
                     const float* x);

// The same for embeddings [..][hidden] of tokens. ids are those of all rows.
void change_embeddings(Runtime& runtime, const AdaptedRows& adapted, const int32_t* ids, int64_t hidden,
                       float* out);

}  // namespace argosy
