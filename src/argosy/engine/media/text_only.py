"""The media of an engine with a text-only model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from argosy.errors import ArgosyError
from argosy.media.parts import Hearing, Kind

_NO_FAULTS: Mapping[Kind, ArgosyError] = MappingProxyType({})


class TextOnly:
    """Replaces `PromptMedia`, so that its module and imports are loaded only for media."""

    kinds: tuple[Kind, ...] = ()
    faults = _NO_FAULTS
    hears: Hearing = "none"

    def settle(self) -> None: ...

    def forget(self, tenant: str) -> None: ...

    def close(self) -> None: ...
