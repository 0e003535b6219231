"""The oracle is transformers on torch, or MLX; without it, its tests are not collected."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_OF_MLX = "test_mlx*.py"
_OTHERS = "test_[!m]*.py", "test_m[!l]*.py"


def _has(*modules: str) -> bool:
    return all(map(importlib.util.find_spec, modules))


collect_ignore_glob = [
    *(() if _has("torch", "transformers") else _OTHERS),
    *(() if _has("mlx", "mlx_lm") else (_OF_MLX,)),
]


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
