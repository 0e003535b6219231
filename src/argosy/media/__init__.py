"""Turns files into pixels and mel features: pure data in, data out.

    parts.py -> Content (bytes, digest) -> decoder.py -> worker.py in its own process -> pixels, samples
    pixels  -> pictures.py -> patches and their grid
    samples -> sounds.py   -> log-mel features

A file is data from a stranger, so the engine's process never parses one.
"""
