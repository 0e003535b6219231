"""The media of an engine whose model takes text only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from argosy.errors import ArgosyError
from argosy.media.parts import Hearing, Kind

_NO_FAULTS: Mapping[Kind, ArgosyError] = MappingProxyType({})


class TextOnly:
    """Stands for `PromptMedia`, whose module and its imports only media need."""

    kinds: tuple[Kind, ...] = ()
    faults = _NO_FAULTS
    hears: Hearing = "none"

    def settle(self) -> None: ...

    def forget(self, tenant: str) -> None: ...

    def close(self) -> None: ...
