"""Prompt -> token events. `engine.py` is the map of the system."""
