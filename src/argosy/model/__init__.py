"""Batch -> logits. `decoder.py` is the way through; `families/` map checkpoints to it."""
