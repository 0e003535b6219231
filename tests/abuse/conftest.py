"""The server of `tests/serve`, under attack."""

from tests.serve.conftest import client, engine, service, url

__all__ = ["client", "engine", "service", "url"]
