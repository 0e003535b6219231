"""What this installation has, and the command that adds a package to it, whichever way it was made.

The names `argosy` and `argosy-demo` are not registered at the Python Package Index, where anybody could take them. So a
command names the packages that an extra stands for, or a file, and never these two.
"""

from __future__ import annotations

import json
import shutil
import sys
import urllib.parse
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

_NAME = "argosy"


def members(package: str, names: Sequence[str]) -> Iterator[ModuleType]:
    """Import the modules of a registry, in the order of `names`, except those that this installation is without."""
    for name in names:
        if find_spec(module := f"{package}.{name}"):
            yield import_module(module)


def command_for_extra(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml stands for, such as cluster."""
    wanted = f'extra == "{extra}"'
    named = (one.partition(";") for one in metadata.requires(_NAME) or [])
    return command_for(*(package.strip() for package, _, when in named if when.strip() == wanted))


def command_for_experts() -> str:
    """The command that installs the experts of the demo model: from the checkout, or from their wheel."""
    origin = _origin()
    if origin is not None and (checkout := origin / "packages" / "argosy-demo").is_dir():
        return command_for(str(checkout))
    wheels = [] if origin is None else sorted(origin.parent.glob("argosy_demo-*.whl"))
    # Without quotes, so that the shell completes the name of a wheel that is elsewhere.
    return command_for(str(wheels[-1])) if wheels else f"{command_for()} argosy_demo-*.whl"


def command_for(*packages: str) -> str:
    """The command that installs packages into the environment of this process."""
    import shlex

    prefix, python = Path(sys.prefix), Path(sys.executable)
    if (prefix / "pipx_metadata.json").exists():
        begin = ["pipx", "inject", _NAME]
    elif (prefix / "uv-receipt.toml").exists() or find_spec("pip") is None:
        begin = ["uv", "pip", "install", "--python", str(python)]
    elif (pip := shutil.which("pip")) is not None and Path(pip).parent == python.parent:
        begin = ["pip", "install"]
    else:
        begin = [str(python), "-m", "pip", "install"]
    return shlex.join([*begin, *packages])


def _origin() -> Path | None:
    """The checkout or the wheel from which Argosy was installed; None: from an index, or nobody noted it."""
    try:
        noted = json.loads(metadata.distribution(_NAME).read_text("direct_url.json") or "")
        parts = urllib.parse.urlsplit(str(noted["url"]))
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    return Path(urllib.parse.unquote(parts.path)) if parts.scheme == "file" else None
