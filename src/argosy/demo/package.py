"""Find the package argosy-demo, which contains the trained experts and the model card.

The package has its own wheel because the experts are ten times as large as all of Argosy. A checkout installs both.

Elsewhere: the package is `packages/argosy-demo/`; `experts.py` reads its file.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from argosy.errors import UsageError
from argosy.installed import command_for_experts

MODEL_CARD = "MODEL_CARD.md"
# Entries of the demo's generation_config.json. A model this small strays when it samples, and only a demonstration
# whose text is always the same can be checked.
GENERATION = {"do_sample": False}


def find_experts() -> Path:
    """Return the file of the trained experts; the model card is in the same directory.

    Raises:
        UsageError: the package is not installed.
    """
    package = find_spec("argosy_demo")
    if package is None or package.origin is None:
        raise UsageError(
            "the demo model needs the package argosy-demo, which is not installed",
            hint=f"`{command_for_experts()}` (52 MB); or name your own model",
        )
    return Path(package.origin).with_name("experts.gguf")
