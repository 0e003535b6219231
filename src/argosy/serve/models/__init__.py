"""The models of a server, and open engines."""
