"""Several servers behind one address: choose one for each request, and replay an answer whose server dies.

The page to read first is `app.py`. Decision 59 says why a router may replay.
"""
