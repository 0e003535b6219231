from __future__ import annotations

from collections.abc import Iterator

import pytest

from argosy.media.decoder import FileDecoder


@pytest.fixture(scope="package")
def decoder() -> Iterator[FileDecoder]:
    made = FileDecoder()
    yield made
    made.close()
