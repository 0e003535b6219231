"""Observe routing: counts while a model runs, saved and reported. Nothing here changes what a model computes."""
