"""The server fixtures of `tests/serve`, for attacks."""

from tests.serve.conftest import client, engine, service, url

__all__ = ["client", "engine", "service", "url"]
