"""The output of `argosy plan --rate`: times of simulated requests, and the machines that a target needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isnan
from typing import TYPE_CHECKING, Any, Self

from argosy.cli.shared.output import short_number
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.forecast.money import Owner
    from argosy.forecast.simulation import Case, Outcome, Prediction, SimulatedServer, Target, Times
    from argosy.forecast.traffic import Mix, RecordedTraffic

DEFAULT_TRAFFIC = "prompt=1024,answer=256"  # the request for which prices are given
_HOURS_A_MONTH = 730.5
_TIMES: tuple[tuple[str, Callable[[Outcome], Times]], ...] = (
    ("first token", lambda outcome: outcome.first_token_s),
    ("each further token", lambda outcome: outcome.token_s),
    ("whole answer", lambda outcome: outcome.request_s),
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The traffic requested on the command line.

    rate_per_s: None: arrivals follow the file.
    """

    source: Mix | RecordedTraffic
    rate_per_s: float | None
    target: Target | None

    @classmethod
    def of(cls, rate: float | None, traffic: str | None, target: str | None) -> Self | None:
        """Check the options; None if they request no simulation.

        Raises:
            UsageError: an option is invalid, or needs another one.
        """
        from argosy.forecast.simulation import parse_target
        from argosy.forecast.traffic import parse_traffic, requests_of, require_rate

        if rate is None and traffic is None:
            if target is not None:
                raise UsageError("--target needs the rate of requests", hint="--rate 0.5")
            return None
        source = parse_traffic(DEFAULT_TRAFFIC if traffic is None else traffic)
        requests_of(source, None if rate is None else require_rate(rate), count=1)
        return cls(source, rate, None if target is None else parse_target(target))

    def simulate(
        self,
        servers: tuple[SimulatedServer, SimulatedServer, SimulatedServer],
        owner: Owner,
        *,
        are_measured: bool = False,
    ) -> Traffic:
        """Simulate the traffic; raises UsageError if no prompt fits the context.

        Args:
            servers: fast, likely and slow.   are_measured: whether their steps were measured.
        """
        from argosy.forecast.simulation import predict_traffic
        from argosy.forecast.traffic import MOST_LINES, MOST_REQUESTS, requests_of

        most = MOST_LINES if self.rate_per_s is None else MOST_REQUESTS
        requests = requests_of(self.source, self.rate_per_s, count=most)
        found = predict_traffic(requests, servers, rate_per_s=self.rate_per_s, target=self.target)
        return Traffic(found, str(self.source), owner, are_measured)


@dataclass(frozen=True, slots=True)
class Traffic:
    """A prediction and its basis.

    source: the lengths of requests, in words.   are_measured: steps were measured rather than forecast.
    """

    found: Prediction
    source: str
    owner: Owner
    are_measured: bool

    def lines(self) -> list[str]:
        from argosy.forecast.traffic import SEED

        found, likely = self.found, self.found.likely.outcome
        when = f"at random (seed {SEED})" if found.is_random else "as the file says"
        lines = [
            f"traffic   {short_number(found.rate_per_s)} requests/s {when}; {self.source}; "
            f"{likely.num_requests} simulated"
        ]
        if found.num_too_long:
            lines.append(
                f"          {found.num_too_long} more are refused: the context has no room for the prompt"
            )
        capacity = _spread(*(case.capacity for case in reversed(found.cases)))
        how = "by measured steps" if self.are_measured else "estimated"
        if found.keeps_up(found.likely):
            lines.append(
                f"          one machine keeps up: {likely.busy:.0%} busy; it can do {capacity} requests/s, {how}"
            )
        else:
            lines.append(
                f"          one machine cannot keep up: it can do {capacity} requests/s, {how}; the queue grows "
                "until requests are refused"
            )
        if self._has_times(found.likely):
            lines += self._times()
            refused = likely.num_refused / likely.num_requests
            lines.append(
                f"          on average {short_number(likely.num_running)} run and {short_number(likely.num_waiting)} "
                f"wait; {short_number(likely.tokens_per_s)} tok/s; {f'{refused:.1%}' if refused else 'none'} refused"
            )
        return lines + self._machines()

    def _has_times(self, case: Case) -> bool:
        """Whether times are meaningful: if the queue grows without bound, they only reflect how long was simulated."""
        return self.found.keeps_up(case) or not self.found.is_random

    def _times(self) -> list[str]:
        fast, likely, slow = self.found.cases
        lines = [f"  {'seconds':<20}{'p50':<26}{'p90':<26}p99"]
        for name, of in _TIMES:
            if isnan(of(likely.outcome).p50):
                continue  # answers of one token have no time between tokens
            columns = []
            for at in ("p50", "p90", "p99"):
                # If the slow server cannot keep up, times have no upper limit.
                ends = [
                    getattr(of(case.outcome), at) if self._has_times(case) else None for case in (fast, slow)
                ]
                columns.append(_spread(ends[0], getattr(of(likely.outcome), at), ends[1]))
            lines.append(f"  {name:<20}{columns[0]:<26}{columns[1]:<26}{columns[2]}")
        return lines

    def _machines(self) -> list[str]:
        from argosy.forecast.simulation import MOST_SERVERS

        found = self.found
        if found.target is None:
            return []
        needed = found.likely.needed
        if needed is None:
            return [
                f"machines  {found.target} in 99 of 100 requests: {MOST_SERVERS} such machines do not reach it; more "
                "may not either: a request takes its time on any"
            ]
        few, many = (case.needed.num_servers if case.needed else None for case in (found.fast, found.slow))
        lines = [
            f"machines  {_spread(few, needed.num_servers, many)} for {found.target} in 99 of 100 requests"
            + ("; each request goes to the machine with the fewest" if needed.num_servers > 1 else ""),
        ]
        if self.owner.is_priced:
            lines.append(
                f"          {short_number(self._usd_per_month(needed), 3)} $ a month; {needed.busy:.0%} busy"
            )
        return lines

    def _usd_per_month(self, needed: Outcome) -> float:
        owner = self.owner
        hourly = owner.fixed_usd_per_hour + needed.busy * owner.running_usd_per_hour
        return needed.num_servers * hourly * _HOURS_A_MONTH

    def as_dict(self) -> dict[str, Any]:
        from argosy.forecast.traffic import SEED

        found = self.found
        fast, likely, slow = found.cases
        return {
            "rate_per_s": found.rate_per_s,
            "at_random": found.is_random,
            "seed": SEED if found.is_random else None,
            "lengths": self.source,
            "steps_are_measured": self.are_measured,
            "num_too_long": found.num_too_long,
            "fast": self._case(fast),
            "likely": self._case(likely),
            "slow": self._case(slow),
            "target": None if found.target is None else found.target._asdict(),
        }

    def _case(self, case: Case) -> dict[str, Any]:
        """A case as JSON; times are null if the queue grows without bound."""
        outcome = asdict(case.outcome)
        for name in ("first_token_s", "token_s", "request_s"):
            times: Times = getattr(case.outcome, name)
            is_known = self._has_times(case) and not isnan(times.p50)
            outcome[name] = times._asdict() if is_known else None
        return {
            "keeps_up": self.found.keeps_up(case),
            "capacity_per_s": case.capacity,
            "one_machine": outcome,
            "machines": None if case.needed is None else case.needed.num_servers,
            "usd_per_month": self._usd_per_month(case.needed)
            if case.needed and self.owner.is_priced
            else None,
        }


def _spread(low: float | None, likely: float, high: float | None) -> str:
    """Format `2 (1 to 3)`; an unknown end is left out."""
    if low == likely == high:
        return short_number(likely)
    if low is None or high is None:
        return f"{short_number(likely)} ({f'{short_number(low)} or more' if low is not None else 'or more'})"
    return f"{short_number(likely)} ({short_number(low)} to {short_number(high)})"
