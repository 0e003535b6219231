"""Whether a model fits, how fast it will be and at what price; and what was measured beside it."""
