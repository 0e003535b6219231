"""Another build of the native module, such as one under a sanitizer, in place of the installed one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def open_module(path: Path | None) -> Any:
    """Return the native module at `path`, also for all later imports; None: the installed one."""
    if path is not None:
        spec = importlib.util.spec_from_file_location("argosy._native", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["argosy._native"] = module
    from argosy import _native

    return _native
