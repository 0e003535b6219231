"""Processes that are forks of one that has imported the engine and the server: they start in a fraction of a second."""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.model.open_parts", "tests.route.serving"])
