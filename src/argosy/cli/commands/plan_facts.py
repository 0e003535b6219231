"""The output of `argosy plan` about a model on a machine, as lines and as JSON."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argosy.cli.commands.plan_traffic import Traffic
from argosy.cli.shared.output import fits_text, short_number, table_lines
from argosy.cli.shared.weights import formats_in_short, weight_facts, weight_lines
from argosy.config import disk_size, format_bytes

if TYPE_CHECKING:
    from argosy.checkpoint.files import ModelFiles
    from argosy.forecast.forecast import Forecast, Forecaster
    from argosy.forecast.group import GroupForecast
    from argosy.forecast.money import ApiPrice, Cost, Owner
    from argosy.forecast.planning import Place, Subject
    from argosy.forecast.speed import DecodeForecast, Range


class PlanFacts:
    """Everything to print, as lines and as JSON."""

    def __init__(
        self,
        subject: Subject,
        place: Place,
        forecast: Forecast,
        found: Forecaster,
        owner: Owner,
        api: ApiPrice | None,
        group: GroupForecast | None,
        working_set_file: Path | None,
        traffic: Traffic | None,
    ) -> None:
        self._subject, self._place, self.forecast, self.owner = subject, place, forecast, owner
        self.found = found
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
        forecast = self.forecast
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
        group, owner = self._group, self.owner
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
        forecast = self.forecast
        if forecast.plan is None:
            assert forecast.refusal is not None
            return f"no: it needs {format_bytes(forecast.smallest_bytes, rounds_up=True)}"
        plan = forecast.plan
        share = f", {plan.slots.own_percent:.0f} % of its experts in memory"
        where = "" if forecast.verdict == "resident" else share
        takes = f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.budget_bytes)}"
        left_out = "; text only: there is no room for pictures and sound" if forecast.is_text_only else ""
        verdict = f"{fits_text(forecast)}{where}; {takes}{left_out}"
        if self._exceeds_machine:
            has = format_bytes(self._place.memory_bytes)
            return f"not in this machine, which has {has}. With the budget: {verdict}"
        return verdict

    @property
    def _free_disk_bytes(self) -> int | None:
        """The room for a download."""
        from argosy.library.places import hub_cache
        from argosy.machine import resources

        is_download = self._subject.remote is not None and self._place.row is None
        return resources.free_disk_bytes(hub_cache()) if is_download else None

    @property
    def _exceeds_machine(self) -> bool:
        plan = self.forecast.plan
        return plan is not None and plan.total_bytes > self._place.memory_bytes

    def _budgets(self) -> list[str]:
        forecast = self.forecast
        smallest = f"budget    smallest {format_bytes(forecast.smallest_bytes, rounds_up=True)}"
        resident = format_bytes(forecast.resident_bytes, rounds_up=True)
        if not forecast.work.num_moe_layers:
            tokens = (
                ""
                if forecast.plan is None
                else f"; {resident} with {forecast.plan.context_tokens} tokens of context"
            )
            return [smallest + tokens]
        knee = ""
        if forecast.knee_bytes is not None:
            knee = f"; 90 % of full speed with {format_bytes(forecast.knee_bytes, rounds_up=True)}"
        lines = [f"{smallest}{knee}; all experts in memory with {resident}"]
        if forecast.expert_slots is not None:
            lines.append(
                "          without `--memory` the demo model streams: a quarter of its experts are in memory"
            )
        return lines

    def _model(self) -> list[str]:
        from argosy.forecast.assumed import active_parameters
        from argosy.library.places import hub_cache

        subject, work = self._subject, self.forecast.work
        everything, active = active_parameters(subject.files.config)
        files, has_experts = subject.files, work.num_moe_layers > 0
        formats = files.expert_format.split("+") if has_experts else _formats(files)
        where = "its files are here"
        if subject.place == "assumed":
            where = f"a config.json alone: assumed to be packed as {formats_in_short(formats)}"
            if subject.left_out:
                where += (
                    f"; text only, because it does not say what a {' or a '.join(subject.left_out)} takes"
                )
        elif subject.remote is not None:
            where = f"not here: a download of {disk_size(subject.remote.file_bytes)}"
            if (free := self._free_disk_bytes) is not None and free < subject.remote.file_bytes:
                where += f", for which {hub_cache()} has no room: {disk_size(free)} are free"
        lines = [
            f"model     {subject.name}; {where}",
            f"          {everything / 1e9:.1f} B parameters, {active / 1e9:.1f} B active; "
            f"{'experts' if has_experts else 'no experts, weights'} {formats_in_short(formats)}",
            *(f"          {line}" for line in weight_lines(weight_facts(files))),
            f"          a token reads {work.dense_bytes / 1e9:.2f} GB of dense weights"
            + (
                f" and {work.routed_token_bytes() / 1e9:.2f} GB of experts ({work.record_bytes / 1e6:.1f} MB each)"
                if has_experts
                else ""
            ),
        ]
        remote = subject.remote
        if remote is not None and remote.num_read < remote.num_shards:
            lines.append(
                f"          headers of {remote.num_read} of {remote.num_shards} files were read: layers of the others "
                "are taken to be alike"
            )
        return [*lines, f"          {self._hit_rate_source()}"] if has_experts else lines

    def _hit_rate_source(self) -> str:
        working_set, file = self.forecast.working_set, self._working_set_file
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

        owner = self.owner
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
            power = one.electricity_usd_per_m_out
            electricity = "" if power is None else f" ({power:.3g} $ electricity)"
            lines.append(
                f"  {streams:>3} at once     {one.usd_per_m_in:.3g} $ per million tokens in, {one.usd_per_m_out:.3g} $ "
                f"out{electricity}{energy}"
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

        subject, place, forecast = self._subject, self._place, self.forecast
        everything, active = active_parameters(subject.files.config)
        remote = subject.remote
        return {
            "model": {
                "name": subject.name, "place": subject.place, "family": subject.files.config.family,
                "num_parameters": everything, "num_active_parameters": active,
                "expert_format": subject.files.expert_format, "dense_bytes": forecast.work.dense_bytes,
                "routed_bytes_per_token": forecast.work.routed_token_bytes(),
                "record_bytes": forecast.work.record_bytes, "weights": weight_facts(subject.files),
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


def _group_dict(group: GroupForecast) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(group), "tokens_per_s": group.tokens_per_s._asdict()}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities, which JSON lacks: an unreachable break-even is null, and `times` shows by how much it is
    missed.
    """
    return {name: None if value == float("inf") else value for name, value in values.items()}


def _decode_dict(one: DecodeForecast) -> dict[str, Any]:
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


def _formats(files: ModelFiles) -> list[str]:
    """The formats of a model's matrices, in order of appearance."""
    return list(dict.fromkeys(ref.format for ref in files.dense.values() if ref.rows > 1))


def _spread(values: Range) -> str:
    return f"{short_number(values.low)} to {short_number(values.high)} tok/s, likely {short_number(values.likely)},"


def _short(values: Range, scale: float = 1.0, digits: int = 2) -> str:
    low, likely, high = (short_number(value * scale, digits) for value in values)
    return f"{likely} ({low} to {high})"


def _decode_lines(forecast: Forecast) -> list[str]:
    plan = forecast.plan
    assert plan is not None
    streams = forecast.work.num_moe_layers > 0  # otherwise nothing is read from the drive
    rows = []
    for one in forecast.decode:
        per_day = one.drive_bytes_per_token.likely * one.tokens_per_s.likely * 86_400 / 1e12
        hits = f"{one.hit_rate.likely:.2f} ({one.hit_rate.low:.2f} to {one.hit_rate.high:.2f})"
        read = _short(one.drive_bytes_per_token, 1e-9)
        of_drive = (hits, read, short_number(per_day)) if streams else ()
        rows.append((f"  {one.streams:>3} at once", _short(one.tokens_per_s), *of_drive, one.bound))
    of_drive = ("hit rate", "drive, GB/token", "TB/day") if streams else ()
    lines = table_lines(("decode", "tok/s in all", *of_drive, "bound by"), rows, right={4} if streams else ())
    lines.append(f"          with {plan.context_tokens // 2} positions shared by all")
    return lines


def _prompt_lines(forecast: Forecast) -> list[str]:
    rows = [(f"  {one.num_tokens:>6} tokens", _short(one.seconds), one.bound) for one in forecast.prompts]
    rows += [(f"  {length:>6} tokens", "longer than the context", "") for length in forecast.longer_prompts]
    if (picture := forecast.picture) is not None:
        size = f"{picture.width} x {picture.height} are {picture.num_positions} positions"
        rows.append(("  a picture", _short(picture.seconds), f"{picture.bound}; {size}"))
    return table_lines(("prompts", "seconds to first token", "bound by"), rows)
