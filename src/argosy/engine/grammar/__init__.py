"""Answers that follow a grammar or a schema."""
