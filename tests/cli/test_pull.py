"""`pull` lists the formats of a repository with their fit, and takes the best one if asked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from argosy.cli.commands import pull
from argosy.cli.main import main
from argosy.forecast.planning import Fit, compare_sizes, plan_remote
from argosy.library.pull import Offer, ask_hub, look_up
from tests.helpers.hub_server import REPOSITORY, Served, directory_files, served
from tests.library.caches import GGUF

Captured = pytest.CaptureFixture[str]
NAME = REPOSITORY


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home" / ".cache" / "huggingface" / "hub"


@pytest.fixture
def server(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A repository with a true model, and names of others that have the right sizes."""
    gguf = directory_files(GGUF)
    beginning, size = gguf["model.gguf"]

    def larger(times: float) -> tuple[bytes, int]:
        return beginning[: int(size * times)], int(size * times)

    content = {
        "Q4_K_M/m-Q4_K_M.gguf": (beginning, size),
        "m-Q8_0.gguf": (beginning, size),
        "m-Q6_K.gguf": larger(1.5),
        "m-BF16-00001-of-00002.gguf": larger(2),
        "m-BF16-00002-of-00002.gguf": larger(2),
        "m-IQ2_KT.gguf": larger(0.5),
        "m-IQ1_KT.gguf": larger(0.3),
        "m-Q3_K_M-00001-of-00003.gguf": larger(0.1),
        "m-imatrix.gguf": (b"of a quantisation", 17),
        "mmproj-F32.gguf": (b"not this one", 12),
        "mmproj-F16.gguf": gguf["mmproj-model.gguf"],
    }
    with served(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a table by format."""
    lines = text.splitlines()
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in table}


def test_formats_are_listed_with_size_fit_and_speed_and_nothing_is_fetched(
    server: Served, hub: Path, capsys: Captured
) -> None:
    assert main(["pull", NAME, "--formats", "--memory", "1GiB"]) == 0
    said = capsys.readouterr().out
    table = rows(said)
    assert table["IQ2_KT"] == ["55 kB", "no, IQ2_KT is not read"]
    assert table["IQ1_KT"] == ["33 kB", "no, IQ1_KT is not read"]
    assert table["Q4_K_M"][:2] == ["110 kB", "yes, with every expert in memory"]
    assert table["Q4_K_M"][2].startswith("about ")
    assert table["BF16"][0] == "439 kB in 2 parts"
    assert table["Q3_K_M"] == ["incomplete", "-"]
    assert [name for name, cells in table.items() if "best that fits" in cells] == ["Q6_K"]
    assert "with each: mmproj-F16.gguf, " in said
    assert f"`argosy pull {NAME}:Q6_K` fetches the best that fits" in said
    assert not hub.exists()
    assert max(last for name, _, last in server.ranges if name == "Q4_K_M/m-Q4_K_M.gguf") < 2 << 20
    assert {name for name, _, _ in server.ranges} == {"Q4_K_M/m-Q4_K_M.gguf"}


@pytest.mark.parametrize(
    ("asked", "told", "num_listed"),
    [
        ("", "none was named", 7),
        (":Q5", "none of them has 'Q5' in its name", 7),
        (":_K", "'_K' is a part of 5 names", 5),
    ],
)
def test_a_format_that_is_not_one_of_the_repository_gets_the_list(
    server: Served, hub: Path, capsys: Captured, asked: str, told: str, num_listed: int
) -> None:
    assert main(["pull", NAME + asked, "--yes", "--memory", "1GiB"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"error: {NAME} has 7 formats, and {told}\n" in said.err
    assert len(rows(said.err.partition("with each")[0])) == 1 + num_listed
    assert "hint: `argosy pull owner/model:Q6_K` fetches the best that fits, as --fit does" in said.err
    assert not hub.exists()


def test_fit_fetches_the_best_that_fits_with_its_tower(server: Served, hub: Path, capsys: Captured) -> None:
    for name in list(server.files):
        if any(format in name for format in ("Q4_K_M", "Q6_K", "BF16")):
            del server.files[name]
    assert main(["pull", NAME, "--fit", "--yes", "--memory", "1GiB"]) == 0
    said = capsys.readouterr().out
    assert f"model     {NAME}:Q8_0, revision" in said
    assert "mmproj-F16.gguf, 161 kB of it, reads pictures or sound" in said
    assert {path.name for path in hub.rglob("*.gguf")} == {"m-Q8_0.gguf", "mmproj-F16.gguf"}


def test_formats_of_a_revision_are_fetched_from_it(server: Served, capsys: Captured) -> None:
    server.branches["v1"] = Served(dict(server.files), revision="1" * 40)
    assert main(["pull", NAME, "--formats", "--memory", "1GiB", "--revision", "v1"]) == 0
    assert f"`argosy pull {NAME}:Q6_K --revision v1` fetches" in capsys.readouterr().out


def test_listing_and_fetching_exclude_each_other(server: Served, capsys: Captured) -> None:
    assert main(["pull", NAME, "--formats", "--fit"]) == 2
    assert "--formats lists and --fit fetches" in capsys.readouterr().err
    assert server.tokens == []


def test_a_repository_with_more_formats_than_anybody_makes_is_not_compared(
    server: Served, capsys: Captured
) -> None:
    siblings = [{"rfilename": f"m-{at}.gguf", "size": 9} for at in range(5000)]
    server.listing = {"sha": "a" * 40, "siblings": siblings}
    assert main(["pull", NAME, "--formats"]) == 2
    assert "has 5000 files or formats of that name, too many to list" in capsys.readouterr().err
    assert server.ranges == []


def test_a_person_is_asked_first_and_told_what_to_run_then(
    server: Served, hub: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(return_value=False)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("click.confirm", asked)
    command = ["pull", f"{NAME}:Q4_K_M", "--memory", "1GiB"]
    assert main(command) == 1
    assert asked.call_args.args == ("Fetch it, under the licence apache-2.0?",)
    assert list(hub.rglob("*.gguf")) == []
    asked.return_value = True
    assert main(command) == 0
    assert f"ready     argosy run -m {NAME}:Q4_K_M " in capsys.readouterr().out
    assert list(hub.rglob("*.gguf"))


def test_fit_keeps_to_the_part_of_a_name_that_is_given(server: Served, hub: Path, capsys: Captured) -> None:
    assert main(["pull", f"{NAME}:q4", "--fit", "--yes", "--memory", "1GiB"]) == 0
    assert {path.name for path in hub.rglob("*.gguf")} == {"m-Q4_K_M.gguf", "mmproj-F16.gguf"}
    assert main(["pull", f"{NAME}:Q5", "--fit", "--yes", "--memory", "1GiB"]) == 2
    assert "none of them has 'Q5' in its name" in capsys.readouterr().err


def test_where_no_format_fits_the_smallest_need_is_told(server: Served, capsys: Captured) -> None:
    assert main(["pull", NAME, "--fit", "--yes", "--memory", "20MiB"]) == 3
    said = capsys.readouterr().err
    assert "none of the 7 formats of owner/model fits this machine" in said
    assert "hint: the smallest needs about " in said
    assert main(["pull", NAME, "--formats", "--memory", "20MiB"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["Q4_K_M"][1].startswith("no, needs ")


def test_a_format_whose_header_has_a_type_without_a_kernel_is_no_base_of_the_estimates(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    beginning, size = server.files["Q4_K_M/m-Q4_K_M.gguf"]
    broken = beginning.replace(b"qwen3vlmoe", b"qwen3vlmox")
    assert broken != beginning
    server.files["Q4_K_M/m-Q4_K_M.gguf"] = (broken, size)
    assert main(["pull", NAME, "--formats", "--memory", "1GiB"]) == 0
    assert rows(capsys.readouterr().out)["Q8_0"][1] == "yes, with every expert in memory"


def test_the_estimate_of_a_size_is_the_plan_of_the_header_and_larger_ones_are_slower(server: Served) -> None:
    source = look_up(f"{NAME}:Q4_K_M").source
    size = server.files["Q4_K_M/m-Q4_K_M.gguf"][1]
    _, planned = plan_remote(source, memory="1GiB")
    same, larger = compare_sizes(source, [size, 2 * size], memory="1GiB")
    assert same.verdict == planned.verdict
    assert same.smallest_bytes == pytest.approx(planned.smallest_bytes, rel=0.01)
    assert same.tokens_per_s == pytest.approx(planned.decode[0].tokens_per_s.likely, rel=0.01)
    assert larger.tokens_per_s is not None
    assert larger.tokens_per_s == pytest.approx((same.tokens_per_s or 0) / 2, rel=0.01)


def test_every_format_of_a_listing_selects_itself(server: Served) -> None:
    repository = ask_hub(NAME)
    for offer in repository.offers():
        if offer.nbytes is not None:
            files = look_up(offer.name).files
            assert offer.format in files[0].name
            assert sum("mmproj" in file.name for file in files) == 1


@pytest.mark.parametrize(
    ("fits", "best"),
    [
        ({"Q4_K_M": "resident", "Q8_0": "resident", "BF16": "resident"}, "Q8_0"),
        ({"Q4_K_M": "resident", "Q8_0": "streams", "BF16": "streams"}, "Q4_K_M"),
        ({"Q2_K": "streams", "Q4_K_M": "streams", "Q8_0": "streams"}, "Q4_K_M"),
        ({"Q2_K": "streams", "Q3_K_M": "streams", "Q4_K_M": "thrashes"}, "Q3_K_M"),
        ({"Q2_K": "resident", "Q4_K_M": "streams"}, "Q2_K"),
        ({"BF16": "resident"}, "BF16"),
        ({"Q4_K_M": "no", "BF16": "no"}, None),
        ({}, None),
    ],
)
def test_the_best_is_what_the_help_says(fits: dict[str, str], best: str | None) -> None:
    sizes = {"Q2_K": 20, "Q3_K_M": 30, "Q4_K_M": 40, "Q8_0": 80, "BF16": 160}
    source = None
    given = [
        (
            Offer(name=f, format=f, source=source, num_parts=1, nbytes=sizes[f], may_run=True),  # type: ignore[arg-type]
            Fit(verdict, 1, 1.0),  # type: ignore[arg-type]
        )
        for f, verdict in fits.items()
    ]
    found = pull._best(given)
    assert (found and found.name) == best
