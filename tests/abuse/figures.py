"""Measure the reliability figures that a test at its own size does not prove.

    python tests/abuse/figures.py                  all, at the sizes they are named with, exit code 1 if one does not hold
    python tests/abuse/figures.py R4 R10           these two
    python tests/abuse/figures.py R13=20           twenty runs: reported as "holds at 20 of 200"

Every figure is counted, not sampled from a log: a violation is a request, a run or a mutation that did not do what it
must, and is printed. Seconds are wall time on the machine at hand, so an upper bound where it is busy.

Elsewhere: `test_figures.py` runs a small form of each; kills of the writers are `kills.py`; the memory budget under
attack is `benchmarks/attack.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from argosy import Engine, SamplingParams, _native
from argosy.checkpoint.manifest import EXPERTS_FILE, MANIFEST_FILE
from argosy.checkpoint.pack import pack
from argosy.errors import ArgosyError, CheckpointError, CorruptRecord, ReadFailed
from argosy.experts.source import Key
from argosy.model.families import open_model
from tests.models.tiny import prompt_ids, qwen3_moe, write_model

_MOST_SHOWN = 5  # violations


@dataclass
class Finding:
    """What one figure came to.

    Attributes:
        size: how many were done.
        whole: how many the figure is about, where only the measurement can tell.
        violations: one sentence each.
    """

    size: int = 0
    whole: int = 0
    violations: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def require(self, condition: object, sentence: str) -> None:
        if not condition:
            self.violations.append(sentence)


@dataclass(frozen=True)
class Figure:
    """measure: takes a directory to work in, and how many to do."""

    what: str
    named_size: int
    measure: Callable[[Path, int], Finding]

    def line(self, number: str, finding: Finding) -> str:
        """One line: what was done, what it came to, whether it holds and at which size."""
        whole = finding.whole or self.named_size
        if finding.violations:
            verdict = f"open: {len(finding.violations)} violations"
        elif finding.size < whole:
            verdict = f"holds at {finding.size:,} of {whole:,}"
        else:
            verdict = "holds"
        facts = "; ".join(finding.facts)
        return f"{number:<4} {finding.size:,} {self.what}: {facts}  {verdict}"


FIGURES: dict[str, Figure] = {}


def figure(
    number: str, named_size: int, what: str
) -> Callable[[Callable[[Path, int], Finding]], Callable[[Path, int], Finding]]:
    def register(measure: Callable[[Path, int], Finding]) -> Callable[[Path, int], Finding]:
        FIGURES[number] = Figure(what, named_size, measure)
        return measure

    return register


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {word}" for word, count in counts.most_common())


# ── R4: a damaged store ─────────────────────────────────────────────────────────────────────────────────────────────

_TINY = qwen3_moe(num_hidden_layers=2, num_experts=6, max_position_embeddings=256)
_PARAMS = SamplingParams(max_tokens=16, ignore_eos=True)


@dataclass
class Run:
    """One answer, and the experts that each of its steps used; token i comes out of step i."""

    token_ids: list[int]
    error: ArgosyError | None
    uses: list[set[Key]]


def run_once(directory: Path, prompt: list[int]) -> Run:
    """Raises: ArgosyError, when the model is not even opened."""
    uses: list[set[Key]] = [set()]

    def note(layer: int, ids: Any) -> None:
        uses[-1].update((layer, int(expert)) for expert in ids.flat)

    with Engine(
        directory, memory="2GiB", threads=1, expert_slots=3, readers=1, observe_routes=note
    ) as engine:
        sequence = engine.submit(prompt, _PARAMS)
        while sequence.result is None:
            engine.step()
            uses.append(set())
        return Run(list(sequence.result.token_ids), sequence.result.error, uses)


class Damage:
    """One seeded mutation of a pack's files."""

    KINDS = (
        "bit flip",
        "4 KiB of zeros",
        "cut off",
        "two records swapped",
        "stale manifest",
        "stale records",
    )

    def __init__(self, whole: dict[str, bytes], stale: dict[str, bytes], pieces: dict[Key, range]) -> None:
        self._whole, self._stale, self._pieces = whole, stale, pieces

    def apply(self, directory: Path, seed: int) -> tuple[str, set[Key]]:
        """Write the damaged files; which kind it is, and whose bytes of `experts.bin` are no longer what they were."""
        rng = random.Random(seed)
        kind = self.KINDS[seed % len(self.KINDS)]
        for name in (EXPERTS_FILE, MANIFEST_FILE):
            (directory / name).write_bytes(self._whole[name])
        if kind == "stale manifest":
            return kind, self._stale_manifest(directory, rng)
        experts = bytearray(self._whole[EXPERTS_FILE])
        key, other = rng.sample(sorted(self._pieces), 2)
        piece, second = self._pieces[key], self._pieces[other]
        if kind == "bit flip":
            experts[rng.choice(piece)] ^= 1 << rng.randrange(8)
        elif kind == "4 KiB of zeros":
            start = rng.choice(piece) // 4096 * 4096
            experts[start : start + 4096] = bytes(min(4096, len(experts) - start))
        elif kind == "cut off":
            del experts[rng.randrange(len(experts)) :]
        elif kind == "two records swapped":
            first = experts[piece.start : piece.stop]
            experts[piece.start : piece.stop] = experts[second.start : second.stop]
            experts[second.start : second.stop] = first
        else:
            experts[piece.start : piece.stop] = self._stale[EXPERTS_FILE][piece.start : piece.stop]
        (directory / EXPERTS_FILE).write_bytes(experts)
        return kind, self._changed(experts)

    def _changed(self, experts: bytearray) -> set[Key]:
        whole = self._whole[EXPERTS_FILE]
        return {
            key
            for key, piece in self._pieces.items()
            if experts[piece.start : piece.stop] != whole[piece.start : piece.stop]
        }

    def _stale_manifest(self, directory: Path, rng: random.Random) -> set[Key]:
        """That of another pack of the same shape, whole, or one checksum of it."""
        manifest = json.loads(self._whole[MANIFEST_FILE])
        stale = json.loads(self._stale[MANIFEST_FILE])
        places = [
            (own, number, value)
            for own, other in pairs_of_lists(manifest, stale)
            for number, (mine, value) in enumerate(zip(own, other, strict=True))
            if isinstance(value, int) and value != mine
        ]
        if rng.random() < 0.1:
            (directory / MANIFEST_FILE).write_bytes(self._stale[MANIFEST_FILE])
        else:
            own, number, value = rng.choice(places)
            own[number] = value
            (directory / MANIFEST_FILE).write_text(json.dumps(manifest))
        return set(self._pieces)


def pairs_of_lists(one: Any, other: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Lists of equal length at the same place of two documents."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() & other.keys():
            yield from pairs_of_lists(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        yield one, other
        for left, right in zip(one, other, strict=True):
            yield from pairs_of_lists(left, right)


@figure("R4", 2000, "mutations of a pack's expert store")
def damaged_store(scratch: Path, size: int) -> Finding:
    packs = []
    for seed in (4, 5):
        source = open_model(write_model(scratch / f"source{seed}", _TINY, seed=seed))
        pack(source, scratch / f"pack{seed}", format="bf16")
        packs.append({path.name: path.read_bytes() for path in (scratch / f"pack{seed}").iterdir()})
    directory = scratch / "pack4"
    records = open_model(directory).experts
    pieces = {
        key: range(one.pieces[0].offset, one.pieces[0].offset + one.pieces[0].nbytes)
        for key, one in records.items()
    }
    prompt = prompt_ids(_TINY, 1, 19)
    golden = run_once(directory, prompt)
    damage = Damage(packs[0], packs[1], pieces)
    finding, counts = Finding(), Counter[str]()
    for seed in range(size):
        kind, changed = damage.apply(directory, seed)
        first_use = next((at for at, used in enumerate(golden.uses) if used & changed), None)
        outcome, fault = judge(directory, prompt, golden, changed, first_use)
        counts[outcome] += 1
        finding.require(fault is None, f"seed {seed}, {kind}: {fault}")
        finding.size += 1
    finding.facts.append(counted(counts))
    return finding


def judge(
    directory: Path, prompt: list[int], golden: Run, changed: set[Key], first_use: int | None
) -> tuple[str, str | None]:
    """What a damaged pack led to, and what is wrong about it."""
    try:
        run = run_once(directory, prompt)
    except CheckpointError as error:
        names_file = EXPERTS_FILE in str(error) or MANIFEST_FILE in str(error)
        return "refused at the start, file named", None if names_file else f"names no file: {error}"
    if run.error is None:
        is_same = run.token_ids == golden.token_ids
        if first_use is not None:
            return "unnoticed", "damage that was read is not reported"
        return "not read, tokens unchanged", None if is_same else "the output changed in silence"
    facts = run.error.facts
    named = (facts.get("layer"), facts.get("expert"))
    if not isinstance(run.error, CorruptRecord | ReadFailed) or named not in changed:
        return "wrongly named", f"{run.error}"
    if EXPERTS_FILE not in str(run.error):
        return "wrongly named", f"names no file: {run.error}"
    if run.token_ids != golden.token_ids[: len(run.token_ids)]:
        return "changed", "the output changed before the error"
    if first_use is None or len(run.token_ids) > first_use:
        return "too late", f"{len(run.token_ids)} tokens left, and step {first_use} used what is damaged"
    return "reported with file, layer and expert before a token that depends on it", None


# ── R5: reads that fail ─────────────────────────────────────────────────────────────────────────────────────────────

_LONG = SamplingParams(max_tokens=64, ignore_eos=True)
_ERROR_S = 2.0
# A read that fails is tried once more: a single fault is read over, and many end the answers that need it.
_FAULTS = (("eio", 1), ("eio", 8), ("truncated", 8), ("eintr", 1), ("short", 1))


@contextmanager
def reading_from(faults: _native.FaultyFileSystem) -> Iterator[None]:
    """Engines that are opened meanwhile read from a file system with faults."""
    plain = _native.Store
    _native.Store = lambda readers: plain(readers, faults)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        _native.Store = plain  # type: ignore[misc]


@figure("R5", 0, "runs of 64 tokens, a fault at every Nth read")
def failing_reads(scratch: Path, size: int) -> Finding:
    """`size`: so many N at most, evenly; 0: every one."""
    source = open_model(write_model(scratch / "source", _TINY, seed=4))
    pack(source, scratch / "pack", format="bf16")
    prompts = [prompt_ids(_TINY, 1, 9), prompt_ids(_TINY, 2, 3)]

    def opened() -> Engine:
        return Engine(scratch / "pack", memory="2GiB", threads=1, expert_slots=4, readers=1)

    def tokens(engine: Engine) -> list[list[int]]:
        return [list(result.token_ids) for result in engine.generate_batch(prompts, _LONG)]

    whole = _native.FaultyFileSystem(1 << 40, "eio")
    with reading_from(whole), opened() as engine:
        first = whole.num_reads
        expected = tokens(engine)
    num_reads = whole.num_reads - first
    finding, counts, slowest_s = Finding(), Counter[str](), 0.0
    finding.whole = len(_FAULTS) * num_reads
    step = max(1, num_reads // size) if size else 1
    for kind, num_faults in _FAULTS:
        for nth in range(1, num_reads + 1, step):
            faults = _native.FaultyFileSystem(first + nth, kind, num_faults=num_faults)  # type: ignore[arg-type]
            at = f"{kind} x {num_faults} at read {nth} of {num_reads}"
            with reading_from(faults), opened() as engine:
                sequences = [engine.submit(prompt, _LONG) for prompt in prompts]
                while any(one.result is None for one in sequences):
                    began = time.monotonic()
                    engine.step()
                    slowest_s = max(slowest_s, time.monotonic() - began)
                for one, wanted in zip(sequences, expected, strict=True):
                    assert one.result is not None
                    found, error = list(one.result.token_ids), one.result.error
                    if error is None:
                        counts["answers the same"] += 1
                        finding.require(found == wanted, f"{at}: another answer")
                    else:
                        counts["answers ended by ReadFailed"] += 1
                        finding.require(isinstance(error, ReadFailed), f"{at}: {error}")
                        finding.require(num_faults > 1, f"{at}: not tried again")
                        finding.require(found == wanted[: len(found)], f"{at}: other tokens before the error")
                finding.require(engine.facts().kv_blocks_held == 0, f"{at}: blocks are held")
                while faults.num_reads < first + nth + num_faults:  # until the drive is well again
                    try:
                        tokens(engine)
                    except ReadFailed:
                        continue
                if num_faults > 1:
                    finding.require(tokens(engine) == expected, f"{at}: another answer afterwards")
            finding.size += 1
    finding.require(slowest_s <= _ERROR_S, f"a step took {slowest_s:.2f} s")
    which = "every one" if step == 1 else f"every {step}th"
    finding.facts += [
        f"{which} of {num_reads} reads, {len(_FAULTS)} faults",
        counted(counts),
        f"longest step {slowest_s:.2f} s",
    ]
    return finding


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(number: str, size: int | None = None) -> tuple[Finding, str]:
    """One figure at `size`, or at the size it is named with; and its line."""
    one = FIGURES[number]
    with tempfile.TemporaryDirectory(prefix=f"argosy-{number}-") as scratch:
        finding = one.measure(Path(scratch), one.named_size if size is None else size)
    return finding, one.line(number, finding)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE[=SIZE]", help=f"of {', '.join(FIGURES)}; default: all"
    )
    num_violations = 0
    for asked in parser.parse_args().figures or FIGURES:
        number, _, size = asked.partition("=")
        began = time.monotonic()
        finding, line = measure(number, int(size) if size else None)
        print(f"{line}  ({time.monotonic() - began:.0f} s)")
        print(*(f"  {one}" for one in finding.violations[:_MOST_SHOWN]), sep="\n", end="", flush=True)
        num_violations += len(finding.violations)
    return 1 if num_violations else 0


if __name__ == "__main__":
    sys.exit(main())
