"""Print the tables of `docs/guides/choosing-a-machine.md`: what `argosy plan` says of nine models on four machines.

    python benchmarks/choosing.py [--write]

Models are known by the geometry in their config.json (`tests/families`) and taken to be packed as q4; machines are rows
of `forecast/machines.csv`, with speeds guessed from their processors. Nothing is measured, so nothing depends on the
machine that runs this. `--write` puts the tables into the page; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from common import REPOSITORY

sys.path.insert(0, str(REPOSITORY))

from argosy.config import format_bytes
from argosy.forecast.assumed import active_parameters
from argosy.forecast.forecast import Forecast
from argosy.forecast.money import PROMPT_TOKENS, Owner, cost
from argosy.forecast.planning import find_place, forecaster, open_subject
from argosy.forecast.speed import Range
from tests.families.published import PUBLISHED

PAGE = REPOSITORY / "docs" / "guides" / "choosing-a-machine.md"
MACHINES = ("box:laptop-16", "box:laptop-32", "box:desktop-64", "box:desktop-128")
CONTEXT = 8192
SHOWN_PROMPT_TOKENS = 2000


class Chosen(NamedTuple):
    """A model of the page: its title there, and the geometry that it has."""

    title: str
    geometry: str


MODELS = (
    Chosen("gpt-oss-120b", "gpt-oss-120b"),
    Chosen("Qwen3.6-35B-A3B", "Qwen3.6-35B-A3B"),
    Chosen("GLM-5.2", "GLM-5.2"),
    Chosen("DeepSeek-V4.1-Flash", "DeepSeek-V4.1-Flash"),
    Chosen("Kimi-K2.6", "Kimi-K2"),
    Chosen("Qwen3.8-Flash-Next", "Qwen3.8-Flash-Next"),
    Chosen("GLM-5.3-Flash", "GLM-5.3-Flash"),
    Chosen("MiniMax-M3", "MiniMax-M3"),
    Chosen("Kimi-K3", "Kimi-K3"),
)


def table_of(chosen: Chosen) -> str:
    raw = next(model.config for model in PUBLISHED if model.name == chosen.geometry)
    columns = (
        "machine", "fits", "experts in memory", "tok/s", "2,000 tokens of prompt, s", "drive, GB a token",
        "bound by", "$ per million out", "of which electricity",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(raw))
        with open_subject(str(path)) as subject:
            everything, active = active_parameters(subject.files.config)
            expert_bytes = subject.files.expert_bytes
            for name in MACHINES:
                place = find_place(name)
                found, budget_bytes = forecaster(subject, place, context=CONTEXT)
                forecast = found.forecast(budget_bytes, prompts=(PROMPT_TOKENS, SHOWN_PROMPT_TOKENS))
                assert place.row is not None
                owner = Owner(usd=place.row.usd, watts=place.row.watts)
                lines.append(row_of(name, forecast, owner))
    about = (
        f"{everything / 1e9:,.1f} B parameters, {active / 1e9:.1f} B active; {expert_bytes / 1e9:,.0f} GB of experts "
        f"as q4. Smallest budget {format_bytes(forecast.smallest_bytes)}; 90 % of full speed with "
        f"{format_bytes(forecast.knee_bytes or 0)}; every expert in memory with "
        f"{format_bytes(forecast.resident_bytes)}."
    )
    return "\n".join([about, "", *lines])


def row_of(machine: str, forecast: Forecast, owner: Owner) -> str:
    if forecast.plan is None:
        return f"| `{machine}` | no, it needs {format_bytes(forecast.smallest_bytes)} | | | | | | | |"
    decode, (prompt, shown) = forecast.decode[0], forecast.prompts
    priced = cost(owner, prompt_s=prompt.seconds.likely, tokens_per_s=decode.tokens_per_s.likely)
    share = forecast.plan.slots.own / max(1, forecast.plan.slots.num_experts)
    verdict = {"thrashes": "barely", "streams": "streams", "resident": "resident"}[forecast.verdict]
    cells = (
        f"`{machine}`", verdict, f"{share:.0%}", spread(decode.tokens_per_s), spread(shown.seconds),
        f"{decode.drive_bytes_per_token.likely / 1e9:.2g}", decode.bound, short(priced.usd_per_m_out),
        short(priced.electricity_usd_per_m_out or 0),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def spread(values: Range) -> str:
    low, likely, high = map(short, values)
    return f"{likely} ({low} to {high})"


def short(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def updated(page: str) -> str:
    """The page with the tables as they are now; each follows a comment that names its model."""
    titles = {chosen.title: chosen for chosen in MODELS}

    def filled(place: re.Match[str]) -> str:
        return f"{place[1]}\n{table_of(titles.pop(place[2]))}\n{place[3]}"

    page = re.sub(r"(<!-- plan: (.*?) -->)\n.*?(<!-- end -->)", filled, page, flags=re.DOTALL)
    assert not titles, f"{PAGE.name} has no place for {', '.join(titles)}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put them into the page")
    if parser.parse_args().write:
        PAGE.write_text(updated(PAGE.read_text()))
        return
    for chosen in MODELS:
        print(f"{chosen.title}\n{table_of(chosen)}\n")


if __name__ == "__main__":
    main()
