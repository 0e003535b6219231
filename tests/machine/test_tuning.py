"""Choices are measured once for a machine, kept, read strictly, and never more than what kernels have."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from argosy import _native
from argosy.config import Format, Tuning
from argosy.directory import replacing
from argosy.machine import resources, tuning
from tests.helpers.tunings import keep, random_tunings, use_cache

Trial = tuple[Format, int, tuple[str, str, int]]
AVX512 = "avx512"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    use_cache(monkeypatch, tmp_path / "cache")
    yield tmp_path / "cache"
    tuning._chosen.cache_clear()


class Probe:
    """A machine on which each trial has a given rate, and where one pass over all formats is enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rate: Callable[[int, Trial], float]) -> None:
        self.num_calls = self.num_passes = 0
        self.formats: set[Format] = set()
        self._rate = rate
        monkeypatch.setattr(tuning, "_MOST_PASSES", 1)
        monkeypatch.setattr(tuning, "PROBE_S", 30.0)
        monkeypatch.setattr(_native, "product_probe", self)
        monkeypatch.setattr(_native, "default_tuning", lambda: ("off", "one_level", 4, 0))
        monkeypatch.setattr(_native, "amx_formats", list)

    def __call__(
        self, threads: int, trials: Sequence[Trial], nbytes: int, passes: int, instruction_set: str
    ) -> list[float]:
        self.num_calls += 1
        name = trials[0][0]
        self.num_passes += name == tuning.FORMATS[0]
        self.formats.add(name)
        return [self._rate(threads, trial) for trial in trials]


# The speed with AMX; one that pays with 16 tokens only was chance, and 0 is that of a wrong result.
AMX_SPEEDS: dict[str, dict[int, float]] = {
    "q8": {16: 1.2, 24: 1.0, 32: 1.005},
    "q4": {16: 0.9, 24: 1.1, 32: 1.3},
    "q4_k": {16: 1.1, 24: 0.9, 32: 1.2},
    "q5_k": {16: 0.0, 24: 0.0, 32: 0.0},
    "q6_k": {16: 1.1, 24: 1.2, 32: 1.4},
}


def some_rate(threads: int, trial: Trial) -> float:
    """Formats differ: q4 gains from two levels, q8 from one by less than the noise, mxfp4 loses from both."""
    name, tokens, (ask_ahead, few_ask_ahead, two_panels_from, amx_from) = trial
    if tokens == 1:
        gains = {"q4": (1.1, 1.4), "q8": (1.005, 1.0), "mxfp4": (0.9, 0.8)}
        one, two = gains.get(name, (1.2, 1.1))
        return 1e9 * {"off": 1.0, "one_level": one, "two_levels": two}.get(ask_ahead, 0.5)
    if tokens >= 16:
        assert (ask_ahead, few_ask_ahead, two_panels_from) == ("off", "one_level", 4)
        return 1e9 * (AMX_SPEEDS[name][tokens] if amx_from else 1.0)
    pays_from = {"q4": 2, "q8": 8, "mxfp4": 9}.get(name, 4)
    is_two = two_panels_from == 2
    few = 1.1 if few_ask_ahead == ("off" if name == "q5_k" else "one_level") else 1.0
    return 1e9 * few * (1.2 if is_two == (tokens >= pays_from) else 1.0)


def new_process() -> None:
    tuning._chosen.cache_clear()


def test_each_format_gets_what_is_fastest_and_the_default_on_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    Probe(monkeypatch, some_rate)
    found = tuning.choose(2, AVX512).formats
    assert {name: found[name].tuning for name in ("q4", "q8", "mxfp4", "q4_k", "q5_k")} == {
        "q4": ("two_levels", "one_level", 2, 0),
        "q8": ("off", "one_level", 8, 0),
        "mxfp4": ("off", "one_level", 9, 0),
        "q4_k": ("one_level", "one_level", 4, 0),
        "q5_k": ("one_level", "off", 4, 0),
    }
    assert found["q4"].gain == pytest.approx(1.4)
    assert found["q4"].bytes_per_s == pytest.approx(1.4e9)
    assert found["q4"].few_tokens_gain == pytest.approx(
        1.2 ** (1 / 3)
    )  # at 2 tokens; the default is as fast at 4 and 8
    assert found["q5_k"].few_tokens_gain == pytest.approx(1.1)
    assert found["q8"].gain == found["mxfp4"].gain == found["q4_k"].few_tokens_gain == 1.0


def test_amx_is_used_from_where_it_pays_with_all_larger_numbers_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Probe(monkeypatch, some_rate)
    monkeypatch.setattr(_native, "amx_formats", lambda: list(AMX_SPEEDS))
    found = tuning.choose(2, AVX512).formats
    assert {name: found[name].tuning.amx_from for name in AMX_SPEEDS} == {
        "q8": 0, "q4": 24, "q4_k": 32, "q5_k": 0, "q6_k": 16,
    }  # fmt: skip
    assert [found[name].amx_gain for name in AMX_SPEEDS] == pytest.approx([1.005, 1.3, 1.2, 0.0, 1.4])
    assert (found["mxfp4"].tuning.amx_from, found["mxfp4"].amx_gain) == (0, 1.0)
    new_process()
    assert tuning.choose(2, AVX512).formats == found
    assert {choice.tuning.amx_from for choice in tuning.choose(2, "avx2").formats.values()} == {0}
    monkeypatch.setattr(tuning, "_MOST_PASSES", 2)  # passes with wrong results do not count as disturbed
    assert tuning.measure(2, AVX512).tunings() == tuning.choose(2, AVX512).tunings()
    assert tuning.measure(2, AVX512).formats["q5_k"] == found["q5_k"]


def test_a_start_does_not_wait_for_formats_whose_products_have_one_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = Probe(monkeypatch, some_rate)
    found = tuning.choose(2, AVX512).formats
    coded = set(_native.coded_formats())
    assert probe.formats == set(tuning.FORMATS) - coded
    assert {found[name] for name in coded} == {(tuning.default_tuning(), 0.0, 1.0, 1.0, 1.0)}
    assert all(found[name].bytes_per_s for name in found if name not in coded)
    measured = tuning.measure(2, AVX512).formats
    assert probe.formats == set(tuning.FORMATS)
    assert all(choice.bytes_per_s for choice in measured.values())


def test_formats_that_the_time_is_too_short_for_get_the_tuning_of_the_first_and_no_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = Probe(monkeypatch, some_rate)
    monkeypatch.setattr(tuning, "PROBE_S", 0.0)
    found = tuning.choose(2, AVX512).formats
    assert probe.num_calls == 1
    assert found["q8"].tuning.two_panels_from == 8
    assert found["q8"].bytes_per_s == pytest.approx(1e9)
    others = {found[name] for name in tuning.with_a_choice() if name != "q8"}
    assert others == {(found["q8"].tuning, 0.0, 1.0, 1.0, 1.0)}
    new_process()
    assert tuning.choose(2, AVX512).formats == found  # they are kept


def test_what_chance_decided_is_not_kept_and_one_thread_may_decide_for_several(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    disturbed = {1, 2}
    noise = iter(range(1, 10**6))

    def rate(threads: int, trial: Trial) -> float:
        return 1e9 * next(noise) ** 2 if threads in disturbed else some_rate(threads, trial)

    probe = Probe(monkeypatch, rate)
    monkeypatch.setattr(tuning, "_MOST_PASSES", 2)
    found = tuning.choose(2, AVX512)
    assert found.formats == {}
    assert found.why_not == tuning._DISTURBED
    assert tuning.measure(2, AVX512) == found
    assert list(cache.glob("choices-*")) == []
    assert probe.num_passes == 2 * 4
    disturbed.remove(1)
    new_process()
    assert tuning.choose(2, AVX512).formats["q4"].tuning == ("two_levels", "one_level", 2, 0)
    assert tuning.kept(2, AVX512) is not None
    assert tuning.kept(1, AVX512) is None


def test_it_is_measured_once_for_a_machine_and_a_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    probe = Probe(monkeypatch, some_rate)
    first = tuning.choose(2, AVX512)
    assert first.why_not is None
    new_process()
    assert tuning.choose(2, AVX512) == first
    assert probe.num_passes == 1
    tuning.choose(1, AVX512)
    assert probe.num_passes == 2  # threads compete for memory
    assert tuning.kept(2, AVX512) == first
    tuning.choose(2, "avx2")
    assert probe.num_passes == 3
    assert len(list(cache.glob("choices-*.json"))) == 2
    assert tuning.measure(2, AVX512).tunings() == first.tunings()
    assert probe.num_passes == 4  # asked for
    cores = resources.usable_cores()
    monkeypatch.setattr(
        resources, "usable_cores", lambda root=None: cores + 1
    )  # a container with another quota
    new_process()
    tuning.choose(2, AVX512)
    assert probe.num_passes == 5


def test_without_time_or_room_there_are_the_defaults(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    probe = Probe(monkeypatch, some_rate)
    assert tuning.choose(2, AVX512, tune=False).formats == {}
    assert tuning.choose(2, AVX512, room_bytes=tuning.probe_bytes(2) - 1).formats == {}
    assert tuning.choose(2, "plain").formats == {}
    assert not cache.exists()
    assert probe.num_calls == 0
    tuned = tuning.choose(2, AVX512, room_bytes=tuning.probe_bytes(2))
    assert tuned.formats.keys() == set(tuning.FORMATS)
    fixed = tuning.Choices(2, AVX512, {}).tunings("one_level")
    assert set(fixed.values()) == {("one_level", "one_level", 4, 0)}
    assert tuned.tunings("one_level")["q4"] == ("one_level", "one_level", 2, 0)


def test_a_file_that_says_what_cannot_be_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(monkeypatch, some_rate)
    tuning.choose(2, AVX512)
    place = tuning.kept_file(AVX512)
    good = place.read_bytes()

    def with_(*path: Any, value: Any) -> bytes:
        content = json.loads(good)
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(content).encode()

    of_q4 = ("formats", "2", "q4")
    bad = [
        b"", good[: len(good) // 2], good + b"}", b"[]", b"\xff" * 100, b"[" * 100_000, b" " * (1 << 20),
        with_("machine", 0, value="another processor"), with_("machine", value=None), with_("more", value=1),
        with_("threads", value=[10**6, 1.0]), with_("threads", value=[True, 1.0]), with_("threads", value=3),
        with_("formats", value=[]), with_("formats", "2", value={}), with_("formats", "²", value={}),
        with_("formats", value={str(n): {} for n in range(99)}), with_(*of_q4, value=None),
        with_(*of_q4, value=["off", "off", 4, 0, 1e9, 1.0]), with_(*of_q4, 0, value="three_levels"),
        with_(*of_q4, 0, value=["off"]), with_(*of_q4, 1, value=None), with_(*of_q4, 2, value=1),
        with_(*of_q4, 2, value=10), with_(*of_q4, 2, value=4.0), with_(*of_q4, 2, value=True),
        with_(*of_q4, 3, value=17), with_(*of_q4, 3, value=False), with_(*of_q4, 3, value=[]),
        with_(*of_q4, 4, value=-1.0), with_(*of_q4, 4, value=1e300), with_(*of_q4, 5, value=0),
        with_(*of_q4, 6, value="1"), with_(*of_q4, 7, value=-1.0), with_(*of_q4, 7, value=None),
        good.replace(b"1000000000.0", b"NaN", 1), good.replace(b'"q4":', b'"q4": null, "q4":'),
    ]  # fmt: skip
    for number, content in enumerate(bad):
        place.write_bytes(content)
        new_process()
        assert tuning.kept(2, AVX512) is None, content[:200]
        assert tuning.choose(2, AVX512).formats["q4"].tuning == ("two_levels", "one_level", 2, 0)
        assert probe.num_passes == number + 2
        assert place.read_bytes() == good  # it is replaced
    place.unlink()
    os.mkfifo(place)  # reading it would wait forever
    assert tuning.kept(2, AVX512) is None


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_next_measurement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = Probe(monkeypatch, some_rate)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARGOSY_CACHE", str(tmp_path / "file" / "cache"))
    found = tuning.choose(2, AVX512)
    assert found.formats["q4"].tuning == ("two_levels", "one_level", 2, 0)
    assert found.why_not is not None
    assert str(tmp_path / "file") in found.why_not
    assert probe.num_passes == 1
    assert tuning.choose(2, AVX512) == found  # the same process does not measure again
    assert probe.num_passes == 1


def test_a_link_in_the_place_of_the_file_goes_and_its_target_stays(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    Probe(monkeypatch, some_rate)
    cache.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    place = tuning.kept_file(AVX512)
    place.symlink_to(victim)
    assert tuning.choose(2, AVX512).why_not is None
    assert victim.read_bytes() == b"keep"
    assert not place.is_symlink()
    place.with_name(f".{place.name}.lock").symlink_to(victim)
    new_process()
    why_not = tuning.choose(3, AVX512).why_not
    assert why_not is not None
    assert "symbolic link" in why_not
    assert victim.read_bytes() == b"keep"


def test_a_process_waits_for_another_that_measures_and_takes_what_it_found(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    probe = Probe(monkeypatch, some_rate)
    cache.mkdir()
    theirs = random_tunings(1)
    found: list[tuning.Choices] = []
    asking = threading.Thread(target=lambda: found.append(tuning.choose(2, AVX512)))
    with replacing(tuning.kept_file(AVX512)) as write:
        asking.start()
        known = tuning._NOTHING.with_formats(
            2, {name: tuning.FormatChoice(each, 1e9, 1.0, 1.0, 1.0) for name, each in theirs.items()}
        )
        write(json.dumps(tuning._as_json(known, AVX512)).encode())
    asking.join()
    assert found[0].tunings() == theirs
    assert probe.num_calls == 0


def test_a_process_does_not_wait_forever(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    probe = Probe(monkeypatch, some_rate)
    monkeypatch.setattr(tuning, "PROBE_S", 0.05)
    cache.mkdir()
    with replacing(tuning.kept_file(AVX512)):
        found = tuning.choose(2, AVX512)
    assert (found.formats, probe.num_calls) == ({}, 0)
    assert found.why_not == "another process has been measuring for too long"


def test_a_file_keeps_the_latest_numbers_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in range(1, 40):
        keep(random_tunings(threads), threads, AVX512)
    assert tuning.kept(7, AVX512) is None
    assert all(tuning.kept(threads, AVX512) is not None for threads in range(8, 40))


def test_sibling_threads_are_used_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "usable_cores", lambda: 8)
    monkeypatch.setattr(resources, "physical_cores", lambda: 4)
    speed = 1.0
    probe = Probe(monkeypatch, lambda threads, trial: 1e9 * (speed if threads == 8 else 1.0))
    assert tuning.known_threads(AVX512) == 8  # nothing was measured
    for speed, expected in ((0.9, 4), (1.02, 4), (1.3, 8)):
        tuning.kept_file(AVX512).unlink(missing_ok=True)
        assert tuning.measured_threads(AVX512, tune=False) == 8
        assert tuning.measured_threads(AVX512) == expected
        assert tuning.known_threads(AVX512) == expected
        known = tuning.kept_threads(AVX512)
        assert known is not None
        assert known.threads == expected
        assert known.gain == pytest.approx(speed)
    num_calls = probe.num_calls
    assert tuning.measured_threads(AVX512) == 8
    assert probe.num_calls == num_calls
    monkeypatch.setattr(resources, "physical_cores", lambda: 8)
    assert tuning.measured_threads(AVX512) == 8
    assert probe.num_calls == num_calls


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
def test_what_is_measured_here_is_something_that_kernels_have(instruction_set: str) -> None:
    choices = tuning.choose(2, instruction_set)
    assert choices.is_measured == (instruction_set != "plain")
    runtime = _native.Runtime(2, choices.tunings(), instruction_set)
    expected = choices.tunings() or dict.fromkeys(tuning.FORMATS, tuning.default_tuning())
    assert runtime.tunings == expected
    runtime.close()


def test_a_runtime_refuses_what_kernels_do_not_have() -> None:
    bad: tuple[tuple[Any, str], ...] = (
        ({"q4": ("three_levels", "off", 4, 0)}, "unknown ask_ahead"),
        ({"q4": ("off", "three_levels", 4, 0)}, "unknown ask_ahead"),
        ({"q4": ("off", "off", 1, 0)}, "two_panels_from is 1, expected 2 to 9"),
        ({"q4": ("off", "off", 10, 0)}, "two_panels_from is 10, expected 2 to 9"),
        ({"q4": ("off", "off", 4, -1)}, "amx_from is -1, expected 0 or more"),
        ({"f32": ("off", "off", 4, 0)}, "'f32' has nothing to tune"),
        ({"q9": ("off", "off", 4, 0)}, "unknown format 'q9'"),
    )
    for wrong, message in bad:
        with pytest.raises(ValueError, match=message):
            _native.Runtime(1, wrong)
    tunings: dict[Format, Tuning] = {"q4": Tuning("off", "two_levels", 9, 24)}
    assert _native.Runtime(1, tunings).tunings["q4"] == tunings["q4"]
