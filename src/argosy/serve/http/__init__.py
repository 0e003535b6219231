"""The server as a process: sockets, bodies, checks before a route, streams, the log."""
