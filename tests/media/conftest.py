from __future__ import annotations

from collections.abc import Iterator

import pytest

from argosy.media.decoder import Decoder


@pytest.fixture(scope="package")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()
