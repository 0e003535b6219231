"""The server as a process: sockets, bodies, the checks before a route, streams, the log."""
