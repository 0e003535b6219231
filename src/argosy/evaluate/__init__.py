"""Compare a model with another form of itself, and describe a model on a card."""
