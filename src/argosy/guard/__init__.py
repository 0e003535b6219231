"""Who may ask for what, and how much of it: `keys.py` and `limits.py`. Nothing here sees what is asked."""
