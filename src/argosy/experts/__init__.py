"""(layer, rows) -> expert outputs. `runner.py` is the interface; `resident.py` and `cache.py` run experts locally."""
