"""The engine over HTTP: one core, one file for each dialect that tools speak.

gate.py  who may come in, and how  ->  app.py  routes  ->  a dialect's file  ->  core.py  ->  the engine's thread
"""
