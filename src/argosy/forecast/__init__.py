"""Forecast whether a model fits, how fast it will be and what it will cost, and compare with measurements."""
