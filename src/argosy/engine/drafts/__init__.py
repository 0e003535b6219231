"""Proposals for the next tokens, which one step of the model confirms."""
