"""Guesses of the next tokens, which one step of the model confirms."""
