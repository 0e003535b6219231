"""API keys (`keys.py`) and their limits (`limits.py`). Nothing here sees the content of a request."""
