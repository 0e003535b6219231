"""Tests mirror src/ and native/; `models/` makes tiny checkpoints."""
