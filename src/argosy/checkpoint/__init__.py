"""Files -> named tensors: safetensors and GGUF in place, packs, and the names that all other code uses."""
