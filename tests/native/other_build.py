"""Another build of the native module, such as one under a sanitizer, in place of the installed one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def open_module(path: Path | None) -> Any:
    """Return the native module at `path`, also for all later imports; None: the installed one.

    `_native_testing` is then the one of the same build, if there is one.
    """
    if path is not None:
        _open("argosy._native", path)
        testing = path.with_name(path.name.replace("_native", "_native_testing", 1))
        if testing.exists():
            _open("tests.native._native_testing", testing)
    from argosy import _native

    return _native


def _open(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
