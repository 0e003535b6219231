"""(layer, expert) -> lease. `source.py` is the interface; `cache.py` keeps the experts that fit the budget."""
