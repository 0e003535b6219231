"""Price a forecast: per million tokens and per request, compared with an API, and the break-even point.

    seconds of a request, a machine's price  ->  Cost  |  API price  ->  Comparison, and one plain sentence

A machine costs its rent for every hour, or its purchase price spread over its lifetime plus electricity for the
hours in which it answers. Reading does not wear out a drive: endurance is rated in bytes written, and inference
writes none (unless `--kv-dir` keeps prompts), so there is no term for it.

A request is PROMPT_TOKENS of input, then its share of the steps that produce ANSWER_TOKENS.

Elsewhere: `speed.py` predicts the seconds; `machines.py` lists machine prices.
"""

from __future__ import annotations

from dataclasses import dataclass

from argosy.errors import UsageError
from argosy.installed import command_for_extra

PROMPT_TOKENS, ANSWER_TOKENS = 1024, 256
LIFE_YEARS = 4.0
USD_PER_KWH = 0.15
_HOURS_A_YEAR = 8766.0
_MILLION = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The costs of a machine: rent, or a purchase price; and electricity."""

    usd_per_hour: float | None = None  # rent, for every hour
    usd: float | None = None  # purchase
    watts: float | None = None  # while it answers
    life_years: float = LIFE_YEARS
    usd_per_kwh: float = USD_PER_KWH

    @property
    def is_priced(self) -> bool:
        return self.usd_per_hour is not None or self.usd is not None or self.watts is not None

    @property
    def fixed_usd_per_hour(self) -> float:
        """The cost of every hour, whether it answers or not."""
        bought = 0.0 if self.usd is None else self.usd / (self.life_years * _HOURS_A_YEAR)
        return (self.usd_per_hour or 0.0) + bought

    @property
    def running_usd_per_hour(self) -> float:
        """The additional cost of an hour in which it answers. Rent includes electricity."""
        if self.watts is None or self.usd_per_hour is not None:
            return 0.0
        return self.watts / 1000.0 * self.usd_per_kwh


@dataclass(frozen=True, slots=True)
class ApiPrice:
    """Dollars per million tokens; `name` is the provider and its model."""

    name: str
    usd_per_m_in: float
    usd_per_m_out: float

    def request_usd(self) -> float:
        return (PROMPT_TOKENS * self.usd_per_m_in + ANSWER_TOKENS * self.usd_per_m_out) / _MILLION


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of a machine that answers all the time.

    break_even: the fraction of all hours that it must answer to cost the same as the API; None without an API
        price.
    times: the cost of a request relative to the API.
    energy_wh: the energy of a request; None if the power is unknown.
    electricity_usd_per_m_out: the part of `usd_per_m_out` that is electricity; None if it is unknown or part of a rent.
    """

    usd_per_m_in: float
    usd_per_m_out: float
    request_usd: float
    energy_wh: float | None
    electricity_usd_per_m_out: float | None
    api: ApiPrice | None
    times: float | None
    break_even: float | None


def cost(owner: Owner, *, prompt_s: float, tokens_per_s: float, api: ApiPrice | None = None) -> Cost:
    """Price requests.

    Args:
        prompt_s: the time for PROMPT_TOKENS, which occupy the whole machine.
        tokens_per_s: for all streams together.
    """
    usd_per_s = (owner.fixed_usd_per_hour + owner.running_usd_per_hour) / 3600.0
    request_s = prompt_s + ANSWER_TOKENS / tokens_per_s
    request_usd = request_s * usd_per_s
    times = break_even = None
    if api is not None:
        times = request_usd / api.request_usd() if api.request_usd() else float("inf")
        earned = api.request_usd() / request_s * 3600.0 - owner.running_usd_per_hour  # per hour of answering
        break_even = owner.fixed_usd_per_hour / earned if earned > 0 else float("inf")
    return Cost(
        usd_per_m_in=prompt_s / PROMPT_TOKENS * _MILLION * usd_per_s,
        usd_per_m_out=_MILLION / tokens_per_s * usd_per_s,
        request_usd=request_usd,
        energy_wh=None if owner.watts is None else owner.watts * request_s / 3600.0,
        electricity_usd_per_m_out=(
            None
            if owner.watts is None or owner.usd_per_hour is not None
            else _MILLION / tokens_per_s * owner.running_usd_per_hour / 3600.0
        ),
        api=api,
        times=times,
        break_even=break_even,
    )


def sentence(found: Cost) -> str:
    """The comparison in one plain sentence."""
    assert found.api is not None
    assert found.times is not None
    assert found.break_even is not None
    if found.break_even > 1.0:
        return (
            f"The API is {found.times:.3g} times cheaper, even if this machine answers day and night: run it here for "
            "privacy, offline, or because you have the machine anyway."
        )
    return f"Running it here is cheaper if the machine answers more than {found.break_even:.0%} of all hours."


def parse_price(text: str) -> ApiPrice:
    """Parse `IN:OUT`, dollars per million tokens.

    Raises:
        UsageError: it has another form.
    """
    left, _, right = text.partition(":")
    try:
        price = ApiPrice("API", float(left), float(right))
    except ValueError:
        price = ApiPrice("", -1, -1)
    if not (0 <= price.usd_per_m_in < _MILLION and 0 <= price.usd_per_m_out < _MILLION):
        raise UsageError(f"--api-price takes IN:OUT, dollars per million tokens, found '{text[:40]}'")
    return price


def look_up_price(text: str) -> ApiPrice | None:
    """The price of `PROVIDER/MODEL` in genai-prices, or None.

    Raises:
        UsageError: genai-prices is not installed.
    """
    try:
        from genai_prices import Usage, calc_price
    except ImportError:
        raise UsageError(
            "API prices need the package genai-prices",
            hint=f"`{command_for_extra('prices')}`; or give the price yourself: `--api-price 0.6:2.5`",
        ) from None
    provider, _, model = text.partition("/")
    try:
        usd_in = calc_price(Usage(input_tokens=1_000_000), model, provider_id=provider).total_price
        usd_out = calc_price(Usage(output_tokens=1_000_000), model, provider_id=provider).total_price
    except LookupError:
        return None
    return ApiPrice(text, float(usd_in), float(usd_out))
