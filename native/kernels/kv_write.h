// kv_write.h: writes the keys and values of new tokens into their KV blocks (layout: kernel_table.h), for one
// KV head.
//
// Rounds to nearest even if the cache is float16. Several tokens share cache lines of keys, so threads may
// split the heads, but not the tokens.
#pragma once

#include "kernels/half.h"
#include "kernels/kernel_table.h"

namespace argosy {
namespace {

template <class Element>
inline Element element_from(float value) {
  if constexpr (sizeof(Element) == 2) {
    return f16_from_float(value);
  } else {
    return value;
  }
}

template <class Element>
void kv_write_as(const KvWriteArgs& a) {
  const KvLayer& kv = a.kv;
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const int64_t block = a.slots[token] / kv.block_tokens;
    const int64_t offset = a.slots[token] % kv.block_tokens;
    const int64_t from = (token * kv.kv_heads + a.kv_head) * kv.head_dim;
    Element* keys = reinterpret_cast<Element*>(key_head(kv, block, a.kv_head)) +
                    offset / kKeyTile * kKeyTile * kv.head_dim + offset % kKeyTile;
    Element* values =
        reinterpret_cast<Element*>(value_head(kv, block, a.kv_head)) + offset * kv_padded_dim(kv);
    for (int64_t d = 0; d < kv.head_dim; ++d) {
      keys[d * kKeyTile] = element_from<Element>(a.keys[from + d]);
      values[d] = element_from<Element>(a.values[from + d]);
    }
  }
}

void kv_write(const KvWriteArgs& args) {
  if (args.kv.is_f16) return kv_write_as<uint16_t>(args);
  kv_write_as<float>(args);
}

}  // namespace
}  // namespace argosy
