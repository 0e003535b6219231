"""Step -> logits. `decoder.py` is the main path; `families/` maps checkpoints to it."""
