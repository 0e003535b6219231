"""`argosy plan`: will it fit, how fast will it be, and what will it cost?"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.commands import completion
from argosy.cli.commands.plan_traffic import Traffic, Wanted
from argosy.cli.shared.help_all import Command, Further
from argosy.cli.shared.options import engine_options, recorder_of, settings_of
from argosy.cli.shared.output import FITS, print_facts, short_number, table_lines
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.config import SERVED_AT_ONCE, SERVED_WAITING, disk_size, format_bytes
from argosy.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    from argosy.experts.hit_rate import WorkingSet
    from argosy.forecast.forecast import Forecast, Forecaster
    from argosy.forecast.group import Group
    from argosy.forecast.money import ApiPrice, Cost, Owner
    from argosy.forecast.planning import Place, Subject
    from argosy.forecast.speed import Decode, Range


@click.command("plan", cls=Command)
@click.argument("model", shell_complete=completion.models)
@engine_options
@click.option(
    "--machine",
    default="here",
    metavar="NAME",
    help="here, aws:i7i.8xlarge, a CSV FILE:NAME, 4*NAME.",
)
@click.option(
    "--streams", default="1,4,8", show_default=True, metavar="N,...", help="Answers generated at once."
)
@click.option(
    "--format",
    "pack_format",
    cls=Further,
    type=click.Choice(["q4", "q8", "bf16"]),
    help="For a config.json: the pack to assume.",
)
@click.option(
    "--working-set",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Routing recorded by `argosy routes`; default: by earlier runs.",
)
@click.option("--api", metavar="PROVIDER/MODEL", help="Compare with this API, as genai-prices names it.")
@click.option(
    "--api-price", cls=Further, metavar="IN:OUT", help="Compare with these dollars per million tokens."
)
@click.option("--price", type=click.FloatRange(0), metavar="USD", help="Purchase price of the machine.")
@click.option(
    "--watts",
    cls=Further,
    type=click.FloatRange(0),
    metavar="W",
    help="Power draw while the machine answers.",
)
@click.option(
    "--kwh",
    cls=Further,
    type=click.FloatRange(0),
    default=0.15,
    show_default=True,
    metavar="USD",
    help="Electricity.",
)
@click.option("--calibrate", is_flag=True, help="Measure this machine first: a minute, remembered.")
@click.option("--verify", is_flag=True, help="Run the model briefly, and compare.")
@click.option("--network", cls=Further, metavar="SPEED", help="Between machines, with 4*NAME: 10GbE, 25GbE.")
@click.option("--rate", type=float, metavar="N", help="Simulate N requests per second, at random times.")
@click.option("--traffic", metavar="SPEC", help="Tokens: prompt=800~2,answer=200, or a JSONL file.")
@click.option("--target", metavar="SPEC", help="Machines for first-token=2s, token=1s, request=1min.")
@click.option(
    "--plot", cls=Further, type=click.Path(path_type=Path), metavar="FILE.svg", help="Draw speed over memory."
)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def plan(
    model: str, machine: str, streams: str, pack_format: str | None, working_set: Path | None, api: str | None,
    api_price: str | None, price: float | None, watts: float | None, kwh: float, calibrate: bool, verify: bool,
    network: str | None, rate: float | None, traffic: str | None, target: str | None, plot: Path | None, as_json: bool,
    flags: Settings,
) -> None:  # fmt: skip
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
    from argosy.forecast import calibration
    from argosy.forecast.group import parse_count, parse_network
    from argosy.forecast.money import Owner
    from argosy.forecast.planning import HERE, find_place, forecaster, open_subject, read_working_set
    from argosy.forecast.step_probe import measured_servers
    from argosy.library.names import preset_of
    from argosy.machine import kept_rates

    planner_bytes = held_bytes() - before
    counts = _counts(streams)
    num_machines, machine = parse_count(machine)
    if num_machines == 1 and network is not None:
        raise UsageError("--network is between machines, and --machine names one", hint="--machine 4*NAME")
    between = parse_network(network or "10GbE")
    # This machine's environment says nothing about another machine.
    settings = read_settings(None if machine == HERE else {}, **flags)
    settings = settings_of(preset_of(model), settings)
    if machine != HERE and (calibrate or verify):
        raise UsageError(f"--calibrate and --verify run on this machine, and --machine is {machine}")
    recorded = None if working_set is None else read_working_set(working_set)
    api_of = _api_price(api, api_price, model)
    wanted = Wanted.of(rate, traffic, target)
    if wanted is not None and num_machines > 1:
        raise UsageError(
            f"traffic is simulated on machines with the whole model, and --machine names a group of {num_machines}",
            hint="`--target` says how many machines are needed",
        )
    served = {"max_sequences": SERVED_AT_ONCE, "max_waiting": SERVED_WAITING} if wanted is not None else {}
    with (
        progress_bar() as progress,
        open_subject(
            model,
            format=pack_format or "q4",  # type: ignore[arg-type]
            mmproj=for_engine(settings).get("mmproj"),
            planner_bytes=planner_bytes,
            progress=progress,
        ) as subject,
    ):
        if pack_format is not None and subject.place != "assumed":
            raise UsageError(
                "--format is for a config.json, and this model has files, with formats of their own"
            )
        if verify and subject.place != "files":
            raise UsageError("--verify runs the model, and its files are not here")
        if recorded is None:
            recorded = _saved(subject)
        at = subject.files.path if subject.place == "files" else Path.cwd()
        if calibrate:
            rates = calibration.calibrate(subject.weights, threads=settings.get("threads"), progress=progress)
            kept_rates.save(rates, at)
        place = find_place(machine, at, threads=settings.get("threads"))
        found, budget_bytes = forecaster(
            subject,
            place,
            streams=counts,
            working_set=recorded,
            recorder=recorder_of(settings),
            **for_engine(settings),
            **served,
        )
        forecast = found.forecast(budget_bytes, streams=counts)
        row = place.row
        owner = Owner(
            usd_per_hour=row.usd_per_hour if row and price is None else None,
            usd=price if price is not None else row.usd if row and not row.usd_per_hour else None,
            watts=watts if watts is not None else row.watts if row else None,
            usd_per_kwh=kwh,
        )
        group = None
        if num_machines > 1 and forecast.plan is not None:
            group = found.group(forecast.plan, num_machines, between)
        simulated = None
        if wanted is not None and forecast.plan is not None:
            servers = found.servers(forecast.plan)
            if verify:
                options = for_engine(settings) | served | found.engine_options(forecast.plan)
                servers = measured_servers(model, forecast.plan, servers[1], options, progress=progress)
            simulated = wanted.simulate(servers, owner, are_measured=verify)
        facts = _Facts(subject, place, forecast, found, owner, api_of, group, working_set, simulated)
        if as_json:
            import json

            print(json.dumps(facts.as_dict(), ensure_ascii=False))
        else:
            print_facts(facts.lines())
        if plot is not None:
            _write_plot(plot, forecast, owner)
        if verify and forecast.plan is not None:
            from argosy.forecast.verification import verify as run

            result = run(
                model,
                subject.files,
                found,
                forecast.plan,
                for_engine(settings),
                recorder=recorder_of(settings),
            )
            print(json.dumps(result.as_dict()) if as_json else "\n".join(result.lines()))
    if forecast.refusal is not None:
        raise DoesNotFit(forecast.refusal.message, hint=forecast.refusal.hint, **forecast.refusal.facts)


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
    """The working set that earlier runs on this machine recorded of the model."""
    from argosy.observe import saved

    if subject.place != "files":  # without weights it cannot be told from others of its geometry
        return None
    try:
        return saved.find_for(subject.files)
    except (UsageError, OSError) as error:
        reason = error.message if isinstance(error, UsageError) else error.strerror
        print(f"note: what earlier runs recorded of its routing is left out: {reason}", file=sys.stderr)
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


class _Facts:
    """Everything that is printed, as lines and as JSON."""

    def __init__(
        self,
        subject: Subject,
        place: Place,
        forecast: Forecast,
        found: Forecaster,
        owner: Owner,
        api: ApiPrice | None,
        group: Group | None,
        working_set_file: Path | None,
        traffic: Traffic | None,
    ) -> None:
        self._subject, self._place, self._forecast, self._owner = subject, place, forecast, owner
        self._group, self._working_set_file = group, working_set_file
        self._traffic = traffic
        self._costs: list[tuple[int, Cost]] = []
        if forecast.plan is not None and (owner.is_priced or api is not None):
            from argosy.forecast.money import PROMPT_TOKENS, cost

            prompt_s = found.prompt(forecast.plan, PROMPT_TOKENS).seconds.likely
            self._costs = [
                (one.streams, cost(owner, prompt_s=prompt_s, tokens_per_s=one.tokens_per_s.likely, api=api))
                for one in forecast.decode
            ]

    def lines(self) -> list[str]:
        forecast = self._forecast
        lines = [f"fits      {self._fit()}"]
        if forecast.decode:
            first = forecast.decode[0]
            lines.append(
                f"speed     {_spread(first.tokens_per_s)} for one answer, estimated; most of its time goes to "
                f"{first.bound}"
            )
        lines += self._budgets()
        lines += self._model()
        lines.append(
            f"machine   {self._place.name}, {format_bytes(self._place.memory_bytes)}; {forecast.rates.source}"
        )
        if told := forecast.rates.drive_source:
            lines.append(f"          drive: {told}")
        if not forecast.rates.is_measured and self._place.row is None:
            lines.append("          `--calibrate` measures it in a minute; ranges become narrower")
        if forecast.plan is not None:
            lines.append(f"memory    {format_bytes(forecast.plan.total_bytes)}")
            lines += [
                f"  {label:<17}{format_bytes(nbytes):>9}{f'  {note}' if note else ''}"
                for label, nbytes, note in forecast.plan.lines()
            ]
        if forecast.decode:
            lines += _decode_lines(forecast)
            lines += _prompt_lines(forecast)
        lines += self._group_lines() + self._money()
        return lines if self._traffic is None else lines + self._traffic.lines()

    def _group_lines(self) -> list[str]:
        group, owner = self._group, self._owner
        if group is None:
            return []
        lines = [
            f"group     {group.num_machines} such machines, one of which answers: {_spread(group.tokens_per_s)} "
            "for one answer",
            f"          {group.speed_up:.2f} times as fast as one; hit rate {group.hit_rate:.2f}; the network takes "
            f"{group.network_share:.1%} of the time",
        ]
        if owner.is_priced:
            usd_per_s = group.num_machines * (owner.fixed_usd_per_hour + owner.running_usd_per_hour) / 3600
            usd = usd_per_s * 1e6 / group.tokens_per_s.likely
            lines.append(f"          {usd:.3g} $ per million tokens out, one answer at a time")
        return lines

    def _fit(self) -> str:
        forecast = self._forecast
        if forecast.plan is None:
            assert forecast.refusal is not None
            return f"no: it needs {format_bytes(forecast.smallest_bytes)}"
        plan = forecast.plan
        share = 100 * plan.num_slots / max(1, plan.num_experts)
        where = "" if forecast.verdict == "resident" else f", {share:.0f} % of its experts in memory"
        takes = f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.budget_bytes)}"
        left_out = "; text only: there is no room for pictures and sound" if forecast.is_text_only else ""
        verdict = f"{FITS[forecast.verdict]}{where}; {takes}{left_out}"
        if self._exceeds_machine:
            has = format_bytes(self._place.memory_bytes)
            return f"not in this machine, which has {has}. With the budget: {verdict}"
        return verdict

    @property
    def _free_disk_bytes(self) -> int | None:
        """Room for a download."""
        from argosy.library.places import hub_cache
        from argosy.machine import resources

        is_download = self._subject.remote is not None and self._place.row is None
        return resources.free_disk_bytes(hub_cache()) if is_download else None

    @property
    def _exceeds_machine(self) -> bool:
        plan = self._forecast.plan
        return plan is not None and plan.total_bytes > self._place.memory_bytes

    def _budgets(self) -> list[str]:
        forecast = self._forecast
        knee = ""
        if forecast.knee_bytes is not None:
            knee = f"; 90 % of full speed with {format_bytes(forecast.knee_bytes)}"
        lines = [
            f"budget    smallest {format_bytes(forecast.smallest_bytes)}{knee}; all experts in memory with "
            f"{format_bytes(forecast.resident_bytes)}"
        ]
        if forecast.fixed_slots is not None:
            lines.append(
                "          without `--memory` the demo model streams: a quarter of its experts are in memory"
            )
        return lines

    def _model(self) -> list[str]:
        from argosy.forecast.assumed import active_parameters
        from argosy.library.places import hub_cache

        subject, work = self._subject, self._forecast.work
        everything, active = active_parameters(subject.files.config)
        files = subject.files
        where = "its files are here"
        if subject.place == "assumed":
            where = f"a config.json alone: assumed to be packed as {files.expert_format}"
            if subject.left_out:
                where += f"; text only, for it does not say what a {' or a '.join(subject.left_out)} takes"
        elif subject.remote is not None:
            where = f"not here: a download of {disk_size(subject.remote.file_bytes)}"
            if (free := self._free_disk_bytes) is not None and free < subject.remote.file_bytes:
                where += f", for which {hub_cache()} has no room: {disk_size(free)} are free"
        lines = [
            f"model     {subject.name}; {where}",
            f"          {everything / 1e9:.1f} B parameters, {active / 1e9:.1f} B active; experts in "
            f"{files.expert_format}",
            f"          a token reads {work.dense_bytes / 1e9:.2f} GB of dense weights and "
            f"{work.routed_token_bytes() / 1e9:.2f} GB of experts ({work.record_bytes / 1e6:.1f} MB each)",
        ]
        remote = subject.remote
        if remote is not None and remote.num_read < remote.num_shards:
            lines.append(
                f"          headers of {remote.num_read} of {remote.num_shards} files were read: layers of the others "
                "are taken to be alike"
            )
        lines.append(f"          {self._hit_rate_source()}")
        return lines

    def _hit_rate_source(self) -> str:
        working_set, file = self._forecast.working_set, self._working_set_file
        within = f"within {100 * working_set.error:.0f} points"
        if not working_set.num_tokens:
            return f"hit rate: typical of such models, {within}; no run of this one was recorded"
        where = "on this machine" if file is None else f"in {file}"
        return (
            f"hit rate: from {working_set.num_tokens} tokens recorded {where}, {within} for texts like those"
        )

    def _money(self) -> list[str]:
        if not self._costs:
            return []
        from argosy.forecast.money import sentence

        owner = self._owner
        basis = []
        if owner.usd_per_hour is not None:
            basis.append(f"{owner.usd_per_hour:g} $/h")
        if owner.usd is not None:
            basis.append(f"{owner.usd:g} $ over {owner.life_years:g} years")
        if owner.watts is not None:
            basis.append(f"{owner.watts:g} W at {owner.usd_per_kwh:g} $/kWh")
        lines = [
            f"money     {', '.join(basis) or 'no price of this machine: `--price`, `--watts`'}; estimated"
        ]
        for streams, one in self._costs:
            energy = "" if one.energy_wh is None else f", {one.energy_wh:.2g} Wh an answer"
            lines.append(
                f"  {streams:>3} at once     {one.usd_per_m_in:.3g} $ per million tokens in, {one.usd_per_m_out:.3g} $ "
                f"out{energy}"
            )
        if (api := self._costs[-1][1].api) is not None:
            lines.append(f"  {api.name:<16} {api.usd_per_m_in:g} $ in, {api.usd_per_m_out:g} $ out")
            if owner.is_priced:
                cheapest = min((cost for _, cost in self._costs), key=lambda one: one.request_usd)
                lines += textwrap.wrap(sentence(cheapest), 100, initial_indent="  ", subsequent_indent="  ")
        return lines

    def as_dict(self) -> dict[str, Any]:
        from dataclasses import asdict

        from argosy.forecast.assumed import active_parameters

        subject, place, forecast = self._subject, self._place, self._forecast
        everything, active = active_parameters(subject.files.config)
        remote = subject.remote
        return {
            "model": {
                "name": subject.name, "place": subject.place, "family": subject.files.config.family,
                "num_parameters": everything, "num_active_parameters": active,
                "expert_format": subject.files.expert_format, "dense_bytes": forecast.work.dense_bytes,
                "routed_bytes_per_token": forecast.work.routed_token_bytes(),
                "record_bytes": forecast.work.record_bytes,
                "download_bytes": remote.file_bytes if remote else None,
                "free_disk_bytes": self._free_disk_bytes,
                "headers_read": None if remote is None else [remote.num_read, remote.num_shards],
            },
            "machine": {
                "name": place.name, "memory_bytes": place.memory_bytes, "is_measured": forecast.rates.is_measured,
                "rates": forecast.rates.as_dict(),
            },
            "verdict": forecast.verdict,
            "fits": forecast.plan is not None,
            "exceeds_machine": self._exceeds_machine,
            "is_text_only": forecast.is_text_only,
            "why": None if forecast.refusal is None else forecast.refusal.message,
            "smallest_bytes": forecast.smallest_bytes,
            "knee_bytes": forecast.knee_bytes,
            "resident_bytes": forecast.resident_bytes,
            "hit_rate_is_recorded": forecast.working_set.num_tokens > 0,
            "hit_rate_tokens": forecast.working_set.num_tokens,
            "hit_rate_error": forecast.working_set.error,
            "plan": None if forecast.plan is None else forecast.plan.as_dict(),
            "decode": [_decode_dict(one) for one in forecast.decode],
            "prompts": [
                {
                    "num_tokens": one.num_tokens, "seconds": one.seconds._asdict(), "bound": one.bound,
                    "drive_bytes": one.drive_bytes._asdict(),
                }
                for one in forecast.prompts
            ],
            "prompts_longer_than_the_context": list(forecast.longer_prompts),
            "picture": None if forecast.picture is None else {
                **asdict(forecast.picture), "seconds": forecast.picture.seconds._asdict(),
            },
            "group": None if self._group is None else _group_dict(self._group),
            "traffic": None if self._traffic is None else self._traffic.as_dict(),
            "curve": [asdict(point) for point in forecast.curve],
            "money": [
                {"streams": streams, **_finite(asdict(one))} for streams, one in self._costs
            ],
        }  # fmt: skip


def _group_dict(group: Group) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(group), "tokens_per_s": group.tokens_per_s._asdict()}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: a break-even that is never reached is null, and `times` says by how much it is missed."""
    return {name: None if value == float("inf") else value for name, value in values.items()}


def _decode_dict(one: Decode) -> dict[str, Any]:
    return {
        "streams": one.streams,
        "tokens_per_s": one.tokens_per_s._asdict(),
        "hit_rate": one.hit_rate._asdict(),
        "drive_bytes_per_token": one.drive_bytes_per_token._asdict(),
        "drive_bytes_per_day": one.drive_bytes_per_token.likely * one.tokens_per_s.likely * 86_400,
        "memory_bytes_per_token": one.memory_bytes_per_token,
        "seconds": dict(one.parts),
        "bound": one.bound,
    }


def _spread(values: Range) -> str:
    return f"{short_number(values.low)} to {short_number(values.high)} tok/s, likely {short_number(values.likely)},"


def _short(values: Range, scale: float = 1.0, digits: int = 2) -> str:
    low, likely, high = (short_number(value * scale, digits) for value in values)
    return f"{likely} ({low} to {high})"


def _decode_lines(forecast: Forecast) -> list[str]:
    plan = forecast.plan
    assert plan is not None
    rows = []
    for one in forecast.decode:
        per_day = one.drive_bytes_per_token.likely * one.tokens_per_s.likely * 86_400 / 1e12
        hits = f"{one.hit_rate.likely:.2f} ({one.hit_rate.low:.2f} to {one.hit_rate.high:.2f})"
        read = _short(one.drive_bytes_per_token, 1e-9)
        cells = _short(one.tokens_per_s), hits, read, short_number(per_day), one.bound
        rows.append((f"  {one.streams:>3} at once", *cells))
    header = ("decode", "tok/s in all", "hit rate", "drive, GB/token", "TB/day", "bound by")
    lines = table_lines(header, rows, right={4})
    lines.append(f"          with {plan.context_tokens // 2} positions shared by all")
    return lines


def _prompt_lines(forecast: Forecast) -> list[str]:
    rows = [(f"  {one.num_tokens:>6} tokens", _short(one.seconds), one.bound) for one in forecast.prompts]
    rows += [(f"  {length:>6} tokens", "longer than the context", "") for length in forecast.longer_prompts]
    if (picture := forecast.picture) is not None:
        size = f"{picture.width} x {picture.height} are {picture.num_positions} positions"
        rows.append(("  a picture", _short(picture.seconds), f"{picture.bound}; {size}"))
    return table_lines(("prompts", "seconds to first token", "bound by"), rows)


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
