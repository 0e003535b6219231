"""(layer, expert) -> lease. `source.py` is the seam, `cache.py` what the budget allows."""
