"""The trained experts of Argosy's demo model. They are data: `experts.gguf`, which MODEL_CARD.md describes."""
