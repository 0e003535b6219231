"""Choose how products run on this machine, and on how many threads: measure once, then keep the result.

    the user's cache, or a probe of a second or two  ->  Choices  ->  Runtime

A product can run in several ways with equal results: how far ahead it prefetches weights, how many rows a tile takes,
and from how many tokens on it uses AMX tiles. The fastest way depends on the processor, even within one instruction
set, on the format and on the number of threads. So the first start on a machine times the real kernels, and later
starts read the result. A start that cannot wait uses the defaults. So does a start that other work disturbs too much,
and the next start measures again.

Kept choices belong to one processor, number of cores, instruction set and version of Argosy. They are checked against
bounds when they are read, and measured again if any is wrong: a choice may cost time, but never change a result.

Elsewhere: `native/kernels/matmul_quantized.h` implements the ways; `native/ops/machine_probe.h` is the probe.
"""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple, get_args

from argosy import _native
from argosy.config import FLOAT_FORMATS, MEASURED_FORMATS, MIB, AskAhead, Format, Tuning
from argosy.directory import Directory
from argosy.machine import resources
from argosy.strict_json import JsonError, parse_json
from argosy.user_directories import measurement_file

PROBE_S = 5.0  # at most
FORMATS: tuple[Format, ...] = tuple(name for name in MEASURED_FORMATS if name not in FLOAT_FORMATS)

_VERSION = 2  # version of the file
_MOST_BYTES = 256 << 10
_MOST_ENTRIES = 32  # most numbers of threads in one file
_MOST_PASSES = 5
_SMALLEST_BYTES, _BYTES_PER_THREAD, _LARGEST_BYTES = 8 * MIB, MIB, 32 * MIB  # bytes that a pass reads
_OUTPUT_SHARE = 0.25  # a product's output takes at most this share of its weights' bytes
_FEW_TOKENS = (2, 4, 8)
# AMX may be used from these numbers of tokens on; with fewer it was slower on the first machine that had it.
_AMX_TOKENS = (16, 24, 32)
_AGREED = 0.9  # second-best pass over the best, in nine trials of ten; a quiet thread reaches 0.98
_DISTURBED = "other work disturbed the measurement, and the next start measures again"
_TIE = 0.01  # gains below this are noise: the defaults stay
# More threads on the same cores must gain at least this much, since other programs also need the cores.
_WORTH_SIBLINGS = 0.05
_MOST_GAIN, _MOST_BYTES_PER_S = 1e3, 1e15  # bounds of values in a kept file
_MANY_TOKENS = 32


class FormatChoice(NamedTuple):
    """The choice for weights of one format, and its gain.

    bytes_per_s: the rate at which one token reads weights that are in no processor cache; 0 if the format was not
        measured, so that another one's tuning stands in.
    gain: speed of one token relative to the defaults, 1.0 if there is no gain.
    few_tokens_gain: speed of 2 to 8 tokens relative to the defaults.
    amx_gain: speed of 32 tokens with AMX tiles relative to AVX-512, whichever was chosen; 1.0 without AMX, 0.0 if the
        results differed.
    """

    tuning: Tuning
    bytes_per_s: float
    gain: float
    few_tokens_gain: float
    amx_gain: float


class ThreadsChoice(NamedTuple):
    """The number of threads, and the speed of a thread per usable core relative to a thread per physical core."""

    threads: int
    gain: float


@dataclass(frozen=True, slots=True)
class Choices:
    """How products run with one number of threads.

    formats: empty if nothing was measured.
    why_not: why nothing was measured, or why the measurement is not kept; None if it is kept.
    """

    threads: int
    instruction_set: str
    formats: Mapping[Format, FormatChoice]
    why_not: str | None = None

    @property
    def is_measured(self) -> bool:
        return bool(self.formats)

    def tunings(self, ask_ahead: AskAhead | None = None) -> dict[Format, Tuning]:
        """Return the choices as a `Runtime` takes them; `ask_ahead` replaces measured values for all formats."""
        found = {name: choice.tuning for name, choice in self.formats.items()}
        if ask_ahead is None:
            return found
        known = default_tuning()
        return {
            name: found.get(name, known)._replace(ask_ahead=ask_ahead, few_ask_ahead=ask_ahead)
            for name in FORMATS
        }


def is_on() -> bool:
    """Whether `ARGOSY_TUNE` leaves tuning on; read here because it applies to every process of Argosy."""
    return os.environ.get("ARGOSY_TUNE") != "off"


def default_tuning() -> Tuning:
    """Return how products run if nothing was measured."""
    return Tuning(*_native.default_tuning())


def known_threads(instruction_set: str | None = None, *, tune: bool = True) -> int:
    """Return the default number of compute threads: the measured one, or otherwise one per usable core."""
    usable = resources.usable_cores()
    if not tune or not is_on() or resources.physical_cores() >= usable:
        return usable
    found = kept_threads(instruction_set or _native.instruction_sets()[-1])
    return usable if found is None else found.threads


def measured_threads(instruction_set: str | None = None, *, tune: bool = True) -> int:
    """Return `known_threads`, measured first if necessary.

    On a machine whose cores run several threads each, the first call compares a thread per physical core with a thread
    per usable core, in a fraction of a second.
    """
    chosen = instruction_set or _native.instruction_sets()[-1]
    usable, physical = resources.usable_cores(), resources.physical_cores()

    def missing(known: _Kept) -> _Kept:
        if known.threads is not None:
            return known
        return known.with_threads(_measured_threads(chosen, usable, physical))

    if tune and is_on() and physical < usable and chosen != "plain" and kept_threads(chosen) is None:
        with suppress(MemoryError):
            _keep(chosen, missing)
    return known_threads(chosen, tune=tune)


def choose(
    threads: int, instruction_set: str, *, tune: bool = True, room_bytes: int | None = None
) -> Choices:
    """Choose how products run: return the kept choices, or let a probe measure them now and keep them.

    Args:
        tune: False returns the defaults, whatever is kept.
        room_bytes: memory that a probe may take; None: no limit. If the probe needs more, returns the defaults.
    """
    if not tune or not is_on():
        return Choices(threads, instruction_set, {}, "tuning is off")
    return _chosen(threads, instruction_set, room_bytes is None or probe_bytes(threads) <= room_bytes)


def measure(threads: int, instruction_set: str) -> Choices:
    """Measure again, whatever is kept, and keep the result: `argosy doctor --tune`."""
    _chosen.cache_clear()
    usable, physical = resources.usable_cores(), resources.physical_cores()

    def again(known: _Kept) -> _Kept:
        chosen = _measured_threads(instruction_set, usable, physical) if physical < usable else None
        formats = _measured_formats(threads, instruction_set, FORMATS)
        return known if formats is None else known.with_threads(chosen).with_formats(threads, formats)

    return _updated(threads, instruction_set, again)


def kept(threads: int, instruction_set: str) -> Choices | None:
    """Return the kept measurements for `threads` threads, or None."""
    found = _read(instruction_set).formats.get(threads)
    return None if found is None else Choices(threads, instruction_set, found)


def kept_threads(instruction_set: str) -> ThreadsChoice | None:
    """Return the kept measurement of the number of threads, or None."""
    return _read(instruction_set).threads


def kept_file(instruction_set: str) -> Path:
    """Return the path of the file that keeps this machine's choices."""
    return measurement_file("choices", _facts(instruction_set))


def probe_bytes(threads: int) -> int:
    """Return the most memory that measuring takes; it uses quantised weights only."""
    working = threads * resources.THREAD_BYTES + _native.product_scratch_bytes(threads)
    return int(_weights_bytes(threads) * (1 + _OUTPUT_SHARE)) + working


# ── in memory ───────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def _chosen(threads: int, instruction_set: str, has_room: bool) -> Choices:
    """Choose once per process: the machine stays the same."""
    if (found := kept(threads, instruction_set)) is not None:
        return found
    if instruction_set == "plain":
        return Choices(threads, instruction_set, {}, "plain kernels run in one way only")
    if not has_room:
        return Choices(threads, instruction_set, {}, "the budget leaves no room for measuring")

    def missing(known: _Kept) -> _Kept:
        if threads in known.formats:  # another process measured while this one waited
            return known
        formats = _measured_formats(threads, instruction_set, with_a_choice())
        return known if formats is None else known.with_formats(threads, formats)

    try:
        return _updated(threads, instruction_set, missing)
    except MemoryError:
        return Choices(threads, instruction_set, {}, "there was too little memory for measuring")


def _updated(threads: int, instruction_set: str, update: Callable[[_Kept], _Kept]) -> Choices:
    known, why_not = _keep(instruction_set, update)
    formats = known.formats.get(threads, {})
    return Choices(threads, instruction_set, formats, why_not or (None if formats else _DISTURBED))


# ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────

_Trial = tuple[Format, int, Tuning]


def with_a_choice() -> tuple[Format, ...]:
    """Return the formats whose products can run in several ways.

    Products of a coded format decode for so long that no way is faster than another. `measure` alone times them, to
    show their rates; a start does not wait for that.
    """
    coded = set(_native.coded_formats())
    return tuple(name for name in FORMATS if name not in coded)


def _measured_formats(
    threads: int, instruction_set: str, formats: Sequence[Format]
) -> dict[Format, FormatChoice] | None:
    """Choose for these formats; return None if other work disturbed the probe, so that its results may be chance.

    Several threads are disturbed more easily than one, because they are fast only while all of them run; if they are,
    one thread decides for them. Formats for which no time is left get the tuning of the first format.
    """
    default, with_choice = default_tuning(), with_a_choice()
    trials = {name: _trials(name, default, instruction_set) for name in formats}
    numbers = (threads,) if threads == 1 else (threads, 1)
    for number in numbers:
        found = _rates(number, trials, instruction_set, PROBE_S / len(numbers))
        measured_twice = (sorted(rates) for rates in found.values() if len(rates) > 1)
        agreed = sorted(rates[-2] / rates[-1] for rates in measured_twice if rates[-1] > 0)
        if agreed and agreed[len(agreed) // 10] < _AGREED:
            continue
        # Disturbances only ever slow a pass down, so the best one counts.
        best = {trial: max(rates) for trial, rates in found.items()}
        measured = {name: _fastest(name, default, best) for name in formats if trials[name][0] in best}
        first = measured[FORMATS[0]].tuning
        return {
            name: measured.get(name)
            or FormatChoice(first if name in with_choice else default, 0.0, 1.0, 1.0, 1.0)
            for name in FORMATS
        }
    return None


def _rates(
    threads: int, trials: Mapping[Format, Sequence[_Trial]], instruction_set: str, seconds: float
) -> dict[_Trial, list[float]]:
    """Measure the rates of each trial, one pass after another."""
    found: dict[_Trial, list[float]] = {}
    end = time.monotonic() + seconds
    # Formats take turns, since a noisy neighbour comes and goes; at least one format is measured.
    for _, name in product(range(_MOST_PASSES), trials):
        rates = _native.product_probe(threads, trials[name], _weights_bytes(threads), 1, instruction_set)
        for trial, rate in zip(trials[name], rates, strict=True):
            found.setdefault(trial, []).append(rate)
        if time.monotonic() > end:
            break
    return found


def _trials(name: Format, default: Tuning, instruction_set: str) -> list[_Trial]:
    if name in _native.coded_formats():
        return [(name, 1, default)]
    alone = [default._replace(ask_ahead=ask_ahead) for ask_ahead in get_args(AskAhead)]
    few = [default._replace(few_ask_ahead=ask_ahead) for ask_ahead in get_args(AskAhead)]
    has_avx512 = instruction_set in {"avx512", "amx"}
    if has_avx512:  # only AVX-512 has more than one tile shape
        few = [_with_panels(each, two) for each in few for two in (False, True)]
    has_amx = has_avx512 and name in _native.amx_formats()
    tiles = [default, default._replace(amx_from=1)] if has_amx else []
    return [
        *((name, 1, each) for each in alone),
        *((name, tokens, each) for tokens in _FEW_TOKENS for each in few),
        *((name, tokens, each) for tokens in _AMX_TOKENS for each in tiles),
    ]


def _with_panels(tuning: Tuning, two: bool) -> Tuning:
    """Return the tuning in which few tokens take two panels of rows at once, or one."""
    return tuning._replace(two_panels_from=_FEW_TOKENS[0] if two else _native.MOST_FOR_ONE_PANEL + 1)


def _fastest(name: Format, default: Tuning, rates: Mapping[_Trial, float]) -> FormatChoice:
    """Choose the fastest way for one token and for few tokens, or the defaults if they are equally fast."""

    def alone(tuning: Tuning) -> float:
        return rates[name, 1, default._replace(ask_ahead=tuning.ask_ahead)]

    def few(tuning: Tuning) -> float:
        """Return the geometric mean over the numbers of tokens."""
        each = []
        for tokens in _FEW_TOKENS:
            trial = default._replace(few_ask_ahead=tuning.few_ask_ahead)
            with_panels = (name, tokens, _with_panels(trial, tokens >= tuning.two_panels_from))
            each.append(rates[with_panels] if with_panels in rates else rates[name, tokens, trial])
        return math.prod(each) ** (1 / len(each))

    def best(rate: Callable[[Tuning], float], among: Sequence[Tuning]) -> tuple[Tuning, float]:
        fastest = max(among, key=rate)
        gain = rate(fastest) / rate(default)
        return (fastest, gain) if gain > 1 + _TIE else (default, 1.0)

    if name in _native.coded_formats():
        return FormatChoice(default, rates[name, 1, default], 1.0, 1.0, 1.0)
    one, gain = best(alone, [default._replace(ask_ahead=each) for each in get_args(AskAhead)])
    limits = (*_FEW_TOKENS, _native.MOST_FOR_ONE_PANEL + 1)
    has_shapes = (name, _FEW_TOKENS[0], _with_panels(default, True)) in rates
    several, few_gain = best(
        few,
        [
            default._replace(few_ask_ahead=each, two_panels_from=limit)
            for each in get_args(AskAhead)
            for limit in (limits if has_shapes else (default.two_panels_from,))
        ],
    )
    in_tiles = default._replace(amx_from=1)
    amx_gains = {
        tokens: rates[name, tokens, in_tiles] / rates[name, tokens, default]
        for tokens in _AMX_TOKENS
        if (name, tokens, in_tiles) in rates
    }
    amx_from = 0
    for tokens in reversed(amx_gains):  # with fewer tokens, AMX never gains more
        if amx_gains[tokens] <= 1 + _TIE:
            break
        amx_from = tokens
    chosen = several._replace(ask_ahead=one.ask_ahead, amx_from=amx_from)
    return FormatChoice(chosen, alone(one), gain, few_gain, amx_gains.get(_AMX_TOKENS[-1], 1.0))


def _measured_threads(instruction_set: str, usable: int, physical: int) -> ThreadsChoice:
    """Compare a thread per physical core with a thread per usable core, for one token and for many."""
    default = default_tuning()
    trials: list[_Trial] = [("q4", 1, default), ("q4", _MANY_TOKENS, default)]
    nbytes = _weights_bytes(usable)
    best = {physical: [0.0, 0.0], usable: [0.0, 0.0]}
    for _ in range(_MOST_PASSES):
        for threads, found in best.items():
            rates = _native.product_probe(threads, trials, nbytes, 1, instruction_set)
            best[threads] = [max(pair) for pair in zip(found, rates, strict=True)]
    ratios = [more / fewer for more, fewer in zip(best[usable], best[physical], strict=True)]
    gain = math.sqrt(math.prod(ratios))
    return ThreadsChoice(usable if gain > 1 + _WORTH_SIBLINGS else physical, gain)


def _weights_bytes(threads: int) -> int:
    """Return the bytes of weights in a pass: enough per thread that starting the thread hardly counts."""
    return min(max(_SMALLEST_BYTES, threads * _BYTES_PER_THREAD), _LARGEST_BYTES)


# ── the kept file ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Kept:
    """threads: None if not measured.   formats: by number of threads."""

    threads: ThreadsChoice | None
    formats: Mapping[int, Mapping[Format, FormatChoice]]

    def with_threads(self, threads: ThreadsChoice | None) -> _Kept:
        return replace(self, threads=threads)

    def with_formats(self, threads: int, formats: Mapping[Format, FormatChoice]) -> _Kept:
        others = {number: found for number, found in self.formats.items() if number != threads}
        latest = list(others.items())[1 - _MOST_ENTRIES :]
        return replace(self, formats={**dict(latest), threads: formats})


_NOTHING = _Kept(None, {})


def _facts(instruction_set: str) -> list[str | int]:
    """Return the facts on which the choices depend."""
    return [
        resources.cpu_model(), resources.usable_cores(), resources.physical_cores(), instruction_set,
        metadata.version("argosy"), _VERSION,
    ]  # fmt: skip


def _keep(instruction_set: str, update: Callable[[_Kept], _Kept]) -> tuple[_Kept, str | None]:
    """Update the kept choices; return them, and the reason if they could not be kept.

    Other processes wait until this one has measured: two probes at once would measure each other.
    """
    place, after = kept_file(instruction_set), None
    try:
        with (
            Directory(place.parent, make=True, mode=0o700) as cache,
            cache.replacing(place.name, wait_s=2 * PROBE_S) as write,
        ):
            before = _read(instruction_set)
            after = update(before)
            if after is not before:
                write(json.dumps(_as_json(after, instruction_set)).encode())
        return after, None
    except TimeoutError:
        return _read(instruction_set), "another process has been measuring for too long"
    except OSError as error:
        why_not = f"{place.parent} cannot be written to: {error.strerror or error}"
    return after or update(_read(instruction_set)), why_not


def _read(instruction_set: str) -> _Kept:
    """Read the kept choices: empty if the file is absent, damaged, from another machine, or out of bounds."""
    place = kept_file(instruction_set)
    try:
        with Directory(place.parent) as cache:
            return _checked(parse_json(cache.read(place.name, _MOST_BYTES)), instruction_set)
    except (OSError, JsonError):
        return _NOTHING


def _as_json(kept: _Kept, instruction_set: str) -> dict[str, object]:
    formats = {
        str(threads): {name: [*choice.tuning, *choice[1:]] for name, choice in found.items()}
        for threads, found in kept.formats.items()
    }
    return {"machine": _facts(instruction_set), "threads": kept.threads, "formats": formats}


def _checked(value: object, instruction_set: str) -> _Kept:
    """Check what `_as_json` wrote. Raises JsonError."""
    if not isinstance(value, dict) or value.keys() != {"machine", "threads", "formats"}:
        raise JsonError("has other keys than those that were written")
    if value["machine"] != _facts(instruction_set):
        raise JsonError("is of another machine")
    threads, formats = value["threads"], value["formats"]
    if threads is not None:
        limits = (resources.physical_cores(), resources.usable_cores())
        if not isinstance(threads, list) or len(threads) != 2 or threads[0] not in limits:
            raise JsonError("has a number of threads that is not of this machine")
        threads = ThreadsChoice(_whole(threads[0], limits[1]), _number(threads[1], _MOST_GAIN))
    if not isinstance(formats, dict) or len(formats) > _MOST_ENTRIES:
        raise JsonError("has no table of formats")
    return _Kept(threads, {_thread_count(key): _checked_formats(found) for key, found in formats.items()})


def _checked_formats(value: object) -> dict[Format, FormatChoice]:
    if not isinstance(value, dict) or value.keys() != set(FORMATS):
        raise JsonError("has choices for other formats")
    return {name: _checked_choice(value[name]) for name in FORMATS}


def _checked_choice(value: object) -> FormatChoice:
    if not isinstance(value, list) or len(value) != 8:
        raise JsonError("has a choice that does not exist")
    ask_ahead, few_ask_ahead, two_panels_from, amx_from, bytes_per_s, gain, few_gain, amx_gain = value
    if ask_ahead not in get_args(AskAhead) or few_ask_ahead not in get_args(AskAhead):
        raise JsonError("has a choice that does not exist")
    if _whole(two_panels_from, _native.MOST_FOR_ONE_PANEL + 1) < _native.FEWEST_FOR_TWO_PANELS:
        raise JsonError("has a choice that does not exist")
    if amx_from not in (0, *_AMX_TOKENS) or isinstance(amx_from, bool):
        raise JsonError("has a choice that does not exist")
    return FormatChoice(
        Tuning(ask_ahead, few_ask_ahead, two_panels_from, amx_from),
        0.0 if bytes_per_s == 0 else _number(bytes_per_s, _MOST_BYTES_PER_S),
        _number(gain, _MOST_GAIN),
        _number(few_gain, _MOST_GAIN),
        0.0 if amx_gain == 0 else _number(amx_gain, _MOST_GAIN),
    )


def _thread_count(key: str) -> int:
    if not key.isascii() or not key.isdecimal() or len(key) > 4:
        raise JsonError("has a number of threads that is none")
    return int(key)


def _whole(value: object, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise JsonError("has a number that is out of range")
    return value


def _number(value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise JsonError("has a number that is out of range")
    return float(value)
