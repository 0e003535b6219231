"""`argosy plan`: will it fit, how fast will it be, and what will it cost?"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from argosy.cli.commands import completion
from argosy.cli.commands.plan_facts import PlanFacts
from argosy.cli.commands.plan_traffic import Wanted
from argosy.cli.shared.declared import options
from argosy.cli.shared.help_all import Command
from argosy.cli.shared.options import engine_options, recorder_of, settings_of
from argosy.cli.shared.output import print_facts
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.config import SERVED_AT_ONCE, SERVED_WAITING
from argosy.config.option import Further, Option
from argosy.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from argosy.budget.memory_plan import MemoryPlan
    from argosy.experts.hit_rate import WorkingSet
    from argosy.experts.resident import Progress
    from argosy.forecast.forecast import Forecast, Forecaster
    from argosy.forecast.money import ApiPrice, Owner
    from argosy.forecast.planning import Place, Subject
    from argosy.forecast.simulation import SimulatedServer


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """Options only for `plan`."""

    machine: Annotated[str, Option("--machine NAME", "here, aws:i7i.8xlarge, a CSV FILE:NAME, 4*NAME.")] = (
        "here"
    )
    streams: Annotated[str, Option("--streams N,...", "Answers generated at once.", shows_default=True)] = (
        "1,4,8"
    )
    pack_format: Annotated[
        Literal["q4", "q8", "bf16"] | None, Further("--format", "For a config.json: the pack to assume.")
    ] = None
    working_set: Annotated[
        Path | None,
        Option("--working-set FILE", "Routing recorded by `argosy routes`; default: by earlier runs."),
    ] = None
    api: Annotated[
        str | None, Option("--api PROVIDER/MODEL", "Compare with this API, as genai-prices names it.")
    ] = None
    api_price: Annotated[
        str | None, Further("--api-price IN:OUT", "Compare with these dollars per million tokens.")
    ] = None
    price: Annotated[float | None, Option("--price USD", "Purchase price of the machine.", least=0)] = None
    watts: Annotated[float | None, Further("--watts W", "Power draw while the machine answers.", least=0)] = (
        None
    )
    kwh: Annotated[float, Further("--kwh USD", "Electricity.", least=0, shows_default=True)] = 0.15
    calibrate: Annotated[bool, Option("--calibrate", "Measure this machine first: a minute, remembered.")] = (
        False
    )
    verify: Annotated[bool, Option("--verify", "Run the model briefly, and compare.")] = False
    network: Annotated[
        str | None, Further("--network SPEED", "Between machines, with 4*NAME: 10GbE, 25GbE.")
    ] = None
    rate: Annotated[float | None, Option("--rate N", "Simulate N requests per second, at random times.")] = (
        None
    )
    traffic: Annotated[
        str | None, Option("--traffic SPEC", "Tokens: prompt=800~2,answer=200, or a JSONL file.")
    ] = None
    target: Annotated[
        str | None, Option("--target SPEC", "Machines for first-token=2s, token=1s, request=1min.")
    ] = None
    plot: Annotated[Path | None, Further("--plot FILE.svg", "Draw speed over memory.")] = None
    as_json: Annotated[bool, Option("--json", "Print the same facts as JSON.")] = False


@click.command("plan", cls=Command)
@click.argument("model", shell_complete=completion.models)
@engine_options
@options(PlanOptions, into="given")
def plan(model: str, given: PlanOptions, flags: Settings) -> None:
    """Estimate whether MODEL fits, how fast it will run and what it will cost. MODEL is a name or path, config.json,
    OWNER/NAME[:Q4_K_M] on the Hugging Face Hub, or an https address. Exit code 3: it does not fit.

    \b
    Examples:
      argosy plan Qwen/Qwen3-30B-A3B --memory 16GiB
      argosy plan ./kimi-k2 --machine aws:i7i.8xlarge --rate 0.02 --traffic prompt=800~2,answer=200
    """
    from argosy.cli.shared.output import progress_bar
    from argosy.engine.engine import Engine  # noqa: F401  all that a process which runs the model imports
    from argosy.machine.resources import held_bytes

    before = held_bytes()
    from argosy.forecast import calibration, money, step_probe  # noqa: F401  what planning imports besides
    from argosy.forecast.planning import open_subject
    from argosy.library import names  # noqa: F401

    planner_bytes = held_bytes() - before
    asked = _Asked(model, given, flags)
    with (
        progress_bar() as progress,
        open_subject(
            model,
            format=given.pack_format or "q4",
            mmproj=for_engine(asked.settings).get("mmproj"),
            planner_bytes=planner_bytes,
            progress=progress,
        ) as subject,
    ):
        facts = asked.answer(subject, progress)
        forecast = facts.forecast
        if given.as_json:
            print(json.dumps(facts.as_dict(), ensure_ascii=False))
        else:
            print_facts(facts.lines())
        if given.plot is not None:
            _write_plot(given.plot, forecast, facts.owner)
        if given.verify and forecast.plan is not None:
            from argosy.forecast.verification import verify as run

            result = run(
                model, subject.files, facts.found, forecast.plan, for_engine(asked.settings),
                recorder=recorder_of(asked.settings),
            )  # fmt: skip
            print(json.dumps(result.as_dict()) if given.as_json else "\n".join(result.lines()))
    if forecast.refusal is not None:
        raise DoesNotFit(forecast.refusal.message, hint=forecast.refusal.hint, **forecast.refusal.facts)


class _Asked:
    """What the options request, after checks.

    Raises:
        UsageError: an option is invalid, or they contradict each other.
    """

    def __init__(self, model: str, given: PlanOptions, flags: Settings) -> None:
        from argosy.forecast.group import parse_count, parse_network
        from argosy.forecast.planning import HERE, read_working_set
        from argosy.library.names import preset_of

        self._model, self._given = model, given
        self._counts = _counts(given.streams)
        self._num_machines, self._machine = parse_count(given.machine)
        if self._num_machines == 1 and given.network is not None:
            raise UsageError(
                "--network is between machines, but --machine names one", hint="--machine 4*NAME"
            )
        self._between = parse_network(given.network or "10GbE")
        # This machine's environment does not apply to another machine.
        is_here = self._machine == HERE
        self.settings = settings_of(preset_of(model), read_settings(None if is_here else {}, **flags))
        if not is_here and (given.calibrate or given.verify):
            raise UsageError(
                f"--calibrate and --verify run on this machine, but --machine is {self._machine}"
            )
        self._recorded = None if given.working_set is None else read_working_set(given.working_set)
        self._api = _api_price(given.api, given.api_price, model)
        self._traffic = Wanted.of(given.rate, given.traffic, given.target)
        if self._traffic is not None and self._num_machines > 1:
            raise UsageError(
                "traffic is simulated on machines with the whole model, and --machine names a group of "
                f"{self._num_machines}",
                hint="`--target` says how many machines are needed",
            )

    def answer(self, subject: Subject, progress: Progress) -> PlanFacts:
        """Measure or run as requested, then forecast.

        Raises:
            UsageError: an option does not apply to this subject.
        """
        from argosy.forecast import calibration
        from argosy.forecast.planning import find_place, forecaster
        from argosy.machine import kept_rates

        given, threads = self._given, self.settings.get("threads")
        if given.pack_format is not None and subject.place != "assumed":
            raise UsageError("--format is for a config.json, but this model has files with their own formats")
        if given.verify and subject.place != "files":
            raise UsageError("--verify runs the model, but its files are not here")
        recorded = _saved(subject) if self._recorded is None else self._recorded
        at = subject.files.path if subject.place == "files" else Path.cwd()
        if given.calibrate:
            kept_rates.save(calibration.calibrate(subject.weights, threads=threads, progress=progress), at)
        place = find_place(self._machine, at, threads=threads)
        found, budget_bytes = forecaster(
            subject, place, streams=self._counts, working_set=recorded, recorder=recorder_of(self.settings),
            **for_engine(self.settings), **self._served,
        )  # fmt: skip
        forecast = found.forecast(budget_bytes, streams=self._counts)
        owner = _owner(given, place)
        group = simulated = None
        if self._num_machines > 1 and forecast.plan is not None:
            group = found.group(forecast.plan, self._num_machines, self._between)
        if self._traffic is not None and forecast.plan is not None:
            servers = self._servers(found, forecast.plan, progress)
            simulated = self._traffic.simulate(servers, owner, are_measured=given.verify)
        return PlanFacts(
            subject, place, forecast, found, owner, self._api, group, given.working_set, simulated
        )

    @property
    def _served(self) -> dict[str, int]:
        """The options of an engine that serves the traffic."""
        return (
            {} if self._traffic is None else {"max_sequences": SERVED_AT_ONCE, "max_waiting": SERVED_WAITING}
        )

    def _servers(
        self, found: Forecaster, plan: MemoryPlan, progress: Progress
    ) -> tuple[SimulatedServer, SimulatedServer, SimulatedServer]:
        """Fast, likely and slow servers, measured with --verify."""
        from argosy.forecast.step_probe import measured_servers

        servers = found.servers(plan)
        if not self._given.verify:
            return servers
        options = for_engine(self.settings) | self._served | found.engine_options(plan)
        return measured_servers(self._model, plan, servers[1], options, progress=progress)


def _owner(given: PlanOptions, place: Place) -> Owner:
    """The machine's costs, from the options or otherwise from its row in the table of machines."""
    from argosy.forecast.money import Owner

    row, price, watts = place.row, given.price, given.watts
    return Owner(
        usd_per_hour=row.usd_per_hour if row and price is None else None,
        usd=price if price is not None else row.usd if row and not row.usd_per_hour else None,
        watts=watts if watts is not None else row.watts if row else None,
        usd_per_kwh=given.kwh,
    )


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not 1 <= len(counts) <= 16 or not all(1 <= count <= 1024 for count in counts):
        raise UsageError(
            f"--streams takes 1 to 16 numbers from 1 to 1024, found '{text[:40]}'", hint="for example 1,4,8"
        )
    return sorted(set(counts))


def _saved(subject: Subject) -> WorkingSet | None:
    """The model's working set from earlier runs on this machine."""
    from argosy.observe import saved

    # without weights it is indistinguishable from other models with its geometry
    if subject.place != "files":
        return None
    try:
        return saved.find_for(subject.files)
    except (UsageError, OSError) as error:
        reason = error.message if isinstance(error, UsageError) else error.strerror
        print(f"note: routing recorded in earlier runs is not used: {reason}", file=sys.stderr)
        return None


def _api_price(api: str | None, api_price: str | None, model: str) -> ApiPrice | None:
    from argosy.forecast.money import look_up_price, parse_price

    if api is not None and api_price is not None:
        raise UsageError("--api and --api-price exclude each other")
    if api_price is not None:
        return parse_price(api_price)
    if api is None:
        return None
    found = look_up_price(api)
    if found is None:
        raise UsageError(f"genai-prices has no price of '{api}'", hint="`--api-price IN:OUT` gives it")
    return found


def _write_plot(path: Path, forecast: Forecast, owner: Owner) -> None:
    from argosy.cli.shared.output import write_file
    from argosy.cli.shared.plot import Line, draw
    from argosy.config import GIB

    if path.suffix != ".svg":
        raise UsageError(f"--plot writes an SVG file, found '{path.name}'")
    points = [(point.budget_bytes / GIB, point.tokens_per_s) for point in forecast.curve]
    lines = [Line("tok/s, one answer", points)]
    if owner.is_priced:
        usd_per_s = (owner.fixed_usd_per_hour + owner.running_usd_per_hour) / 3600
        lines.append(Line("$ per million tokens out", [(x, 1e6 / y * usd_per_s) for x, y in points]))
    marks = [] if forecast.knee_bytes is None else [("90 % of full speed", forecast.knee_bytes / GIB)]
    write_file(path, draw(lines, marks, x_label="memory, GiB"))
