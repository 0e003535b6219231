"""The oracle is transformers on torch; without them, no test here is collected."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

collect_ignore_glob = [] if all(map(importlib.util.find_spec, ("torch", "transformers"))) else ["test_*.py"]


@pytest.fixture(scope="module")
def one_quiet_thread() -> Iterator[None]:
    """Make torch use one thread, so that its sums have one order."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
