"""API keys (`keys.py`), their limits (`limits.py`), an audit (`audit.py`), and the data kept about people
(`stores.py`).

Rules take a text and return a verdict (`policy.py`, `screen.py`, `pii/`); they keep no text. Only `sealed.py` keeps
the contents of requests, encrypted, and only if the operator turns that on.
"""
