"""Find the model to plan for, wherever it is, and forecast how it runs on a machine.

    path, name here, demo       ->  its files               ┐
    config.json                 ->  the pack it would make  ├─>  Subject  ->  forecaster  ->  Forecast
    OWNER/NAME, https://...     ->  its headers             ┘

Elsewhere: `forecast.py` computes; `cli/commands/plan_facts.py` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from argosy.budget.allowances import PROCESS_VARIES_BYTES, TEMPLATE_WORKER_BYTES, process_bytes
from argosy.checkpoint.files import ModelFiles
from argosy.checkpoint.geometry import count_parameters
from argosy.checkpoint.hub import Source
from argosy.checkpoint.sampling import declared_sampling
from argosy.config import Budget, Format, ModelConfig, parse_size
from argosy.engine.options import with_recorder
from argosy.errors import UsageError
from argosy.experts.hit_rate import WorkingSet
from argosy.experts.recording import OpenRecorder
from argosy.experts.resident import Progress
from argosy.forecast.assumed import assume_pack
from argosy.forecast.forecast import (
    BARE_PROCESS_BYTES,
    Forecast,
    Forecaster,
    Verdict,
    tokenizer_bytes,
)
from argosy.forecast.machines import Machine, find_machine
from argosy.machine import kept_rates
from argosy.machine import resources as this_machine
from argosy.machine.rates import Rates
from argosy.media.parts import Kind
from argosy.model.families import config_alone, open_model
from argosy.model.reading.mistral_params import read_raw
from argosy.model.remote import RemoteHeaders, fetch_headers
from argosy.open.models import configure, is_here, locate_model, open_files
from argosy.prompt.tokenizer import Tokenizer

HERE = "here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to plan for.

    place: whether its files are here, only their headers were read, or the files are assumed.
    local_bytes: the memory of a local process with its tokenizer; None if the tokenizer is not here.
    left_out: media that it takes but its plan leaves out.
    """

    name: str
    files: ModelFiles
    place: Literal["files", "headers", "assumed"]
    remote: RemoteHeaders | None = None
    local_bytes: int | None = None
    left_out: tuple[Kind, ...] = ()

    @property
    def weights(self) -> list[Path]:
        """Its weight files on this machine."""
        if self.place != "files":
            return []
        return list({ref.path for ref in self.files.dense.values()} | set(self.files.records.paths))


@contextmanager
def open_subject(
    model: str,
    *,
    format: Format = "q4",
    mmproj: str | None = None,
    planner_bytes: int = 0,
    progress: Progress | None = None,
) -> Iterator[Subject]:
    """Find a model; a remote one is valid until the context ends.

    Args:
        format: the format of the pack assumed for a config.json.
        planner_bytes: memory of this process that only planning takes and a process that runs the model would not.

    Raises:
        The errors of `locate_model`, `open_model` and `fetch_headers`.
    """
    if not is_here(model) and (source := Source.find(model)) is not None:
        with _remote_subject(model, source, progress) as subject:
            yield subject
        return
    path = locate_model(model, progress)
    if (config := config_alone(path)) is not None:
        files, left_out = assume_pack(config, format, path), _left_out(config, path)
        yield Subject(name=str(path), files=files, place="assumed", left_out=left_out)
        return
    files = open_files(path, mmproj=mmproj)
    tokenizer = Tokenizer.open(files.path, files.header)  # stays open while the process is measured
    local_bytes = process_bytes(tokenizer) - max(0, planner_bytes - PROCESS_VARIES_BYTES)
    yield Subject(name=model, files=files, place="files", local_bytes=local_bytes)


def _left_out(config: ModelConfig, path: Path) -> tuple[Kind, ...]:
    """The media that a model takes according to its config.json, which does not give the size of their weights."""
    from argosy.model.encoders.table import ENCODERS  # imports every tower

    raw, _ = read_raw(path.parent if path.is_file() else path)
    found = []
    for encoder in ENCODERS.get(config.family, ()):
        inner: object = raw
        for key in encoder.path:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            found.append(encoder.kind)
    return tuple(found)


@contextmanager
def _remote_subject(model: str, source: Source, progress: Progress | None) -> Iterator[Subject]:
    with fetch_headers(source, progress=progress) as headers:
        yield Subject(name=model, files=open_model(headers.path), place="headers", remote=headers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The machine to plan for. `row` is None for this one."""

    name: str
    row: Machine | None
    memory_bytes: int
    budget_bytes: int  # unless the caller names one
    rates: Rates


def find_place(text: str, model: Path | None = None, *, threads: int | None = None) -> Place:
    """Find a machine: this one, with measured rates if there are any for the drive of `model`, or another.

    Raises:
        UsageError: the machine is unknown.
    """
    if text != HERE:
        row = find_machine(text)
        limit = this_machine.MemoryLimit(row.memory_bytes, row.memory_bytes, "machine")
        budget_bytes, _ = this_machine.default_budget(limit)
        return Place(
            name=row.name,
            row=row,
            memory_bytes=row.memory_bytes,
            budget_bytes=budget_bytes,
            rates=row.rates(),
        )
    limit = this_machine.memory_limit()
    budget_bytes, _ = this_machine.default_budget(limit)
    rates = kept_rates.rates_here(model or Path.cwd(), threads=threads)
    return Place(name=HERE, row=None, memory_bytes=limit.total_bytes, budget_bytes=budget_bytes, rates=rates)


def forecaster(
    subject: Subject,
    place: Place,
    *,
    memory: str | int | None = None,
    streams: Sequence[int] = (1,),
    working_set: WorkingSet | None = None,
    recorder: OpenRecorder | None = None,
    **options: Any,
) -> tuple[Forecaster, int]:
    """Make the forecaster of a model on a machine, and work out the budget in bytes.

    Args:
        memory: as for `Engine.open`, with percentages of the machine's memory; None: the free memory less a margin,
            of which the demo model takes as much as in `Engine.open`.
        recorder: as `Engine.open` takes it.
        options: others of `Engine.open`.

    Raises:
        UsageError: an option is invalid, or the working set belongs to another model.
    """
    budget_bytes = (
        place.budget_bytes if memory is None else parse_size(memory, total_bytes=place.memory_bytes)
    )
    context = options.pop("context", None)
    config = configure(
        subject.name,
        subject.files,
        memory=None if memory is None else Budget(ram_bytes=budget_bytes, context_tokens=context),
        context=context,
        threads=options.pop("threads", None) or place.rates.cores,
        max_sequences=max(options.pop("max_sequences", 8), *streams),
        **options,
    )
    config = replace(config, budget=replace(config.budget, ram_bytes=budget_bytes))
    config, _ = with_recorder(config, subject.files, recorder)
    if working_set is not None:
        working_set.require_model(subject.files.config)
    held = subject.local_bytes
    if held is None or place.row is not None:
        model = subject.files.config
        json_bytes = subject.remote.tokenizer_bytes if subject.remote else 0
        held = BARE_PROCESS_BYTES + TEMPLATE_WORKER_BYTES + tokenizer_bytes(json_bytes, model.vocab_size)
    found = Forecaster(subject.files, config, place.rates, working_set=working_set, process_bytes=held)
    return found, budget_bytes


def plan_remote(
    source: Source,
    *,
    memory: str | int | None = None,
    streams: Sequence[int] = (1,),
    progress: Progress | None = None,
) -> tuple[RemoteHeaders, Forecast]:
    """Plan a model that is not here yet, for this machine; `pull` does so before it downloads.

    Raises:
        The errors of `fetch_headers`.
    """
    with _remote_subject(source.repository or source.url, source, progress) as subject:
        assert subject.remote is not None
        found, budget_bytes = forecaster(subject, find_place(HERE), memory=memory, streams=streams)
        return subject.remote, found.forecast(budget_bytes, streams=streams, with_curve=False)


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a model fits this machine in a format of which only the size is known. All numbers are estimates.

    smallest_bytes: the smallest budget that works.
    tokens_per_s: for a single answer; None if it does not fit.
    """

    verdict: Verdict
    smallest_bytes: int
    tokens_per_s: float | None


def compare_sizes(
    source: Source,
    sizes: Sequence[int],
    *,
    memory: str | int | None = None,
    progress: Progress | None = None,
) -> list[Fit]:
    """Estimate how a model fits in other formats, from the header in one format and the sizes of all.

    If the weights are r times as large, a budget holds as many experts as one with a share for weights r times
    smaller would hold of the header's weights, and a token reads r times the bytes.

    Args:
        sizes: the bytes of the weights in each format.

    Raises:
        The errors of `fetch_headers`.
    """
    with _remote_subject(source.repository or source.url, source, progress) as subject:
        assert subject.remote is not None
        found, budget_bytes = forecaster(subject, find_place(HERE), memory=memory)
        base_bytes = subject.remote.file_bytes
        resident_bytes = found.forecast(budget_bytes, prompts=(), with_curve=False).resident_bytes
        other_bytes = max(0, resident_bytes - base_bytes)  # keys and values, buffers, the process
        fits = []
        for nbytes in sizes:
            ratio = nbytes / base_bytes
            equal_bytes = other_bytes + (budget_bytes - other_bytes) / ratio
            forecast = found.forecast(max(1, int(equal_bytes)), prompts=(), with_curve=False)
            smallest_bytes = other_bytes + (forecast.smallest_bytes - other_bytes) * ratio
            rate = forecast.decode[0].tokens_per_s.likely / ratio if forecast.decode else None
            fits.append(Fit(forecast.verdict, int(smallest_bytes), rate))
        return fits


@dataclass(frozen=True, slots=True)
class Summary:
    """A one-line summary of a model, and the budgets at which it runs here."""

    family: str
    format: str
    num_experts: int
    experts_per_token: int
    smallest_bytes: int
    resident_bytes: int
    context_tokens: int
    num_layers: int
    vocab_size: int
    num_parameters: int
    weight_bytes: int
    sampling: dict[str, float]  # `SamplingDefaults.as_dict`
    media_kinds: list[Kind]  # media that a prompt may contain


def summarise(path: Path) -> Summary:
    """Read the headers of a model for `argosy list`.

    Raises:
        The errors of `open_model`.
    """
    files = open_files(path)
    found, budget_bytes = forecaster(
        Subject(name=str(path), files=files, place="files"), find_place(HERE, path)
    )
    forecast = found.forecast(budget_bytes, streams=(1,), with_curve=False)
    return Summary(
        family=files.config.family,
        format=files.expert_format if files.experts else "dense",
        num_experts=files.config.num_experts,
        experts_per_token=files.config.experts_per_token,
        smallest_bytes=forecast.smallest_bytes,
        resident_bytes=forecast.resident_bytes,
        context_tokens=files.config.context_tokens,
        num_layers=len(files.config.layers),
        vocab_size=files.config.vocab_size,
        num_parameters=count_parameters(files.config)[0],
        weight_bytes=files.dense_bytes + files.expert_bytes,
        sampling=declared_sampling(files).as_dict(),
        media_kinds=found.media_kinds,
    )


def read_working_set(path: Path) -> WorkingSet:
    """Read a recorded working set.

    Raises:
        UsageError: the file cannot be read, or is not a working set.
    """
    try:
        return WorkingSet.read(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
