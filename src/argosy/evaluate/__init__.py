"""Compare a compressed model with its reference, and describe a model on a card."""
