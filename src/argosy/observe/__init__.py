"""Routing: counts while a model runs, kept and reported. Nothing here changes what a model computes."""
