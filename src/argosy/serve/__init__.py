"""The engine over HTTP: one core, and one file for each API dialect.

gate.py  admission  ->  app.py  routes  ->  the dialect's file  ->  core.py  ->  the engine's thread
"""
