// layers.h: what Python gives of a layer, with the objects whose memory it points to.
#pragma once

#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "bind/bind.h"
#include "bind/experts.h"
#include "bind/matrix.h"
#include "ops/stack.h"

namespace argosy {

// The Python objects whose memory a description points to.
struct Kept {
  std::vector<Memory> memories;
  std::vector<Array> arrays;
  std::vector<std::shared_ptr<TableRows>> tables;

  MatrixView keep(const Matrix& matrix) {
    memories.push_back(matrix.memory);
    return matrix.view;
  }
  const float* keep(const char* name, const ArrayOf<float>& vector, int64_t size) {
    arrays.push_back(vector);
    return read_array(name, vector, {size});
  }
  const float* keep(const char* name, const ArrayOf<float>& array, std::initializer_list<int64_t> shape) {
    arrays.push_back(array);
    return read_array(name, array, shape);
  }
  const float* keep(const char* name, const std::optional<ArrayOf<float>>& vector, int64_t size) {
    return vector ? keep(name, *vector, size) : nullptr;
  }
  ExpertView keep(const Matrix* gate, const Matrix& up, const Matrix& down) {
    for (const Matrix* matrix : {gate, &up, &down}) {
      if (matrix != nullptr) memories.push_back(matrix->memory);
    }
    return view_network(gate, up, down);
  }
  // [hidden], the weight, or [2, hidden], weight and bias.
  Norm keep_norm(const char* name, const std::optional<ArrayOf<float>>& norm, int64_t hidden) {
    if (!norm) return {};
    if (norm->ndim() != 2) return {keep(name, norm, hidden)};
    const float* weight = keep(name, *norm, {2, hidden});
    return {weight, weight + hidden};
  }
  void keep(const Kept& other) {
    memories.insert(memories.end(), other.memories.begin(), other.memories.end());
    arrays.insert(arrays.end(), other.arrays.begin(), other.arrays.end());
    tables.insert(tables.end(), other.tables.begin(), other.tables.end());
  }
};

struct BoundMixer {
  Mixer mixer;
  Kept kept;
};

struct BoundFfn {
  Ffn ffn;
  Kept kept;
};

struct BoundMix {
  StreamMix mix;
  Kept kept;
  int64_t num_scales = 0;  // of a SinkhornMix; the weights of a BankMix
};

struct BoundResidual {
  ResidualRule rule;
  BoundMix head;
};

struct BoundNgrams {
  Ngrams ngrams;
  Kept kept;
};

// The rotary's index and the mixes are checked by the stack, which has the rotaries and the streams.
struct BoundLayer {
  Layer layer;
  int64_t hidden;  // 0: no norm says it
  Kept kept;
  std::optional<BoundMix> mixer_mix, ffn_mix;
};

// Checks that the parts of a mixer fit the hidden state, its cache or its state, and each other.
void require_mixer(const Mixer& mixer, const KvCache& cache, int64_t layer, const RecurrentState* recurrent,
                   const Rotary* rotary, int64_t hidden);

// Checks that a mix, or those of a layer, fit the streams.
void require_mix(const BoundMix& bound, const ResidualRule& rule, int64_t hidden, bool is_head);
void require_streams(const BoundLayer& bound, const ResidualRule& rule, int64_t hidden);
// The same for the n-gram sublayer.
void require_ngrams(const Ngrams& ngrams, const RecurrentState* recurrent, int64_t streams, int64_t hidden);
// Whether a bank has room for the blocks that layers start.
void require_room(const std::vector<Layer>& layers, const ResidualRule& rule);

}  // namespace argosy
