"""The engine over HTTP: one path for every request, and one file for each API dialect.

http/gate.py  admission  ->  app.py  routes  ->  dialects/  ->  answer/service.py  ->  the engine's thread
"""
