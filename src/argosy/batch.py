"""Answer columns of prompts: in Ray Data's `map_batches`, or in plain lists.

    dataset.map_batches(Answers, fn_constructor_args=["Qwen3-30B-A3B"], compute=ActorPoolStrategy(size=1))
    Answers("demo")({"prompt": ["Why is the sky blue?"]})["answer"]

    batch: {column: values}  ->  Answers  ->  the batch with answer, prompt_tokens, new_tokens, finish_reason, error

The same batch gives the same answers: greedy ones unless `params` say otherwise, and sampled ones from a seed. A row
that cannot be answered has the reason in its `error`, and the other rows have their answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from argosy.config import DEMO, EngineOptions, SamplingParams
from argosy.engine.sequence import Sequence as EngineSequence
from argosy.errors import ArgosyError
from argosy.open.engine import Engine

COLUMNS = ("answer", "prompt_tokens", "new_tokens", "finish_reason", "error")
_SEED = 0  # for sampled answers whose parameters have no seed

Columns = dict[str, NDArray[Any]]


class Answers:
    """An engine that answers batches, one after another; calling it from two threads at once is not safe.

    Args:
        model: a path or name for `Engine.open`.
        column: the batch's column with prompts: texts, or lists of messages with `role` and `content`.
        params: for every answer; None: greedy.
        max_tokens: most tokens of an answer; None: what `params` say.
        options: for `Engine.open`, such as `memory`.

    Raises:
        ArgosyError: what `Engine.open` raises.
    """

    def __init__(
        self,
        model: str | Path = DEMO,
        *,
        column: str = "prompt",
        params: SamplingParams | None = None,
        max_tokens: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        params = SamplingParams(temperature=0.0) if params is None else params
        params = replace(params, seed=_SEED if params.seed is None else params.seed)
        self._params = params if max_tokens is None else replace(params, max_tokens=max_tokens)
        self._column = column
        self._engine = Engine.open(model, **options)

    def __call__(self, batch: Mapping[str, Any]) -> Columns:
        """Answer the prompts of a batch together: they share every expert that is read.

        Returns:
            The columns of `batch`, each [rows], and those of COLUMNS, which replace any of the same name. Answer and
            error are text, "" if there is none.

        Raises:
            KeyError: the batch has no such column.
        """
        prompts = batch[self._column]
        rows: list[tuple[str, int, int, str, str]] = [("", 0, 0, "error", "")] * len(prompts)
        running: dict[int, EngineSequence] = {}
        waiting = iter(enumerate(prompts))
        try:
            while True:
                while len(running) < 2 * self._engine.settings.max_sequences and (row := next(waiting, None)):
                    try:
                        running[row[0]] = self._engine.submit(_prompt(row[1]), self._params)
                    except Exception as error:  # a row may hold anything, and the others are not to blame
                        known = isinstance(error, ArgosyError)
                        rows[row[0]] = ("", 0, 0, "error", str(error) if known else repr(error))
                if not running:
                    break
                self._engine.step()
                for at in [at for at, sequence in running.items() if sequence.result is not None]:
                    result = running.pop(at).result
                    assert result is not None
                    used, fault = result.usage, "" if result.error is None else str(result.error)
                    rows[at] = (
                        result.text, used["prompt_tokens"], used["completion_tokens"], result.finish_reason, fault,
                    )  # fmt: skip
        finally:
            for sequence in running.values():
                self._engine.cancel(sequence)
        made = {
            name: np.array([row[at] for row in rows], np.int64 if name.endswith("_tokens") else object)
            for at, name in enumerate(COLUMNS)
        }
        return {**{name: _column(values) for name, values in batch.items()}, **made}

    def close(self) -> None:
        """Free the engine's memory; Ray ends the whole process instead."""
        self._engine.close()


def _prompt(value: Any) -> Any:
    """A prompt as the engine takes it; numpy's arrays of messages become lists."""
    return list(value) if isinstance(value, np.ndarray) else value


def _column(values: Any) -> NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values
    column = np.empty(len(values), object)
    column[:] = list(values) if isinstance(values, Sequence) else values
    return column
