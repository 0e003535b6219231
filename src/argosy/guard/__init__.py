"""API keys (`keys.py`), their limits (`limits.py`), an audit (`audit.py`), and what is kept of people (`stores.py`).

Rules over texts are text in and verdict out (`policy.py`, `screen.py`, `pii/`); they keep no text. Contents of requests
are kept only by `sealed.py`, which encrypts them, if the operator keeps them at all.
"""
