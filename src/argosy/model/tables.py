"""The n-gram tables of a model, whose rows are asked for when a step begins and awaited when their layers run.

    Tables.begin(step)  ->  reads start  ->  the native stack waits for them, layer by layer  ->  Tables.check

Elsewhere: `ngrams.py` turns token ids into rows; `native/ops/table_rows.h` reads and keeps rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import TableRef
from argosy.config import ModelConfig
from argosy.errors import CheckpointError, ReadFailed
from argosy.model.ngrams import Ngrams
from argosy.model.step import Step

_MOST_SHARE = 64  # of the budget: cached rows get no more than one part of so many


@dataclass(frozen=True, slots=True)
class TableCounts:
    """Counts of rows since a model was opened.

    asked: rows of tokens.   found: of these, in memory.   late: of these, not there when their layer needed them.
    read: rows that were read, and the bytes of their pages.
    """

    asked: int = 0
    found: int = 0
    late: int = 0
    read: int = 0
    bytes_read: int = 0

    def __add__(self, other: TableCounts) -> TableCounts:
        return TableCounts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


def cache_bytes(tables: Mapping[int, TableRef], budget_bytes: int) -> int:
    """Return the bytes of cached rows of each table."""
    if not tables:
        return 0
    largest = max(table.num_rows * (table.row_bytes + 5) for table in tables.values())
    return min(largest, budget_bytes // _MOST_SHARE // len(tables))


def table_bytes(
    config: ModelConfig, tables: Mapping[int, TableRef], cached_bytes: int, step_tokens: int
) -> int:
    """Return the memory of all tables: cached rows, their places, those that land, and maps of tokens."""
    found = 0
    for layer, table in tables.items():
        ngrams = config.layers[layer].ngrams
        assert ngrams is not None
        parts, most = table.native_parts(lambda path: 0), step_tokens * ngrams.num_heads
        found += _native.table_rows_bytes(
            table.format, table.num_rows, table.cols, parts, cached_bytes, most
        ) + 16 * (most + step_tokens * len(ngrams.multipliers))
        found += 4 * config.vocab_size if ngrams.folded_ids else 0
    return found


class Tables:
    """Opens the tables of a model.

    Args:
        cached_bytes: of each table's cached rows.
        token_map: the folded ids of tokens, for tables that fold them.
    """

    def __init__(
        self,
        config: ModelConfig,
        tables: Mapping[int, TableRef],
        store: _native.Store,
        open_file: Callable[[str], int],
        *,
        cached_bytes: int,
        step_tokens: int,
        token_map: NDArray[np.int32] | None = None,
    ) -> None:
        self._files = tables
        self.rows: dict[int, _native.TableRows] = {}
        self._ngrams: dict[int, Ngrams] = {}
        for layer, table in tables.items():
            ngrams = config.layers[layer].ngrams
            assert ngrams is not None
            self._ngrams[layer] = Ngrams(ngrams, config.vocab_size, token_map)
            self.rows[layer] = _native.TableRows(
                store,
                table.format,
                table.num_rows,
                table.cols,
                table.native_parts(open_file),
                cached_bytes,
                step_tokens * ngrams.num_heads,
            )

    def begin(self, step: Step) -> None:
        """Ask for the rows of a step."""
        for layer, rows in self.rows.items():
            rows.begin(self._ngrams[layer].rows(step).reshape(-1))

    def check(self) -> None:
        """Check that no read has failed.

        Raises:
            ReadFailed, CheckpointError: rows are missing; facts: `layer`, and `rows`, the tokens of the step that
                need them.
        """
        for layer, rows in self.rows.items():
            if (fault := rows.fault) is None:
                continue
            message, kind, indices = fault
            path = next(iter(self._files[layer].paths))
            error = CheckpointError if kind == "not finite" else ReadFailed
            tokens = np.unique(np.array(indices) // self._ngrams[layer].config.num_heads)
            raise error(
                f"{path.name}: layer {layer}, rows of the n-gram table: {message}",
                path=str(path),
                layer=layer,
                rows=tokens,
            )

    @property
    def counts(self) -> TableCounts:
        return sum((TableCounts(*rows.stats) for rows in self.rows.values()), TableCounts())
