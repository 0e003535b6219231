"""`argosy routes`: have a model read texts from several domains, and report how its experts are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from argosy.cli.commands import completion
from argosy.cli.shared.declared import choices
from argosy.cli.shared.numbers import WholeNumber
from argosy.cli.shared.output import progress_bar, write_file
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from argosy.checkpoint.files import ModelFiles
    from argosy.cli.shared.output import Progress
    from argosy.config import EngineConfig
    from argosy.observe.ablation import Change, Removal
    from argosy.observe.report import DomainRouting, LayerReport, RoutingReport, Specialisation
    from argosy.observe.trace import TraceRecorder
    from argosy.open.engine import Engine

_BYTES_PER_TOKEN = 32  # bytes to read of a file per wanted token; few tokens are longer
_WINDOW = 512  # tokens that attend to one another
_PROMPT, _ANSWER = 128, 48  # tokens of an answer in each domain, for the engine's own hit rate
_MOST_COLUMNS = 16  # experts in a table
_WINDOWS_SHOWN = (1, 8, 64, 512, 4096)


@click.command("routes")
@click.argument("model", metavar="MODEL", shell_complete=completion.models)
@click.argument(
    "files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path, dir_okay=False)
)
@click.option(
    "--tokens",
    type=WholeNumber(64, 65536),
    default=2048,
    show_default=True,
    metavar="N",
    help="Tokens read of each domain.",
)
@click.option("--ablate", metavar="WHAT", help="Remove LAYER:EXPERT,... or *:EXPERT, or `all`, each alone.")
@click.option(
    "--ablate-tokens",
    type=WholeNumber(64, 65536),
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens read of each domain for each removal.",
)
@click.option(
    "--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw a heat map."
)
@click.option("--json", "as_json", is_flag=True, help="Print all facts as JSON.")
@choices(Settings, "memory", "threads", into="flags")
def routes(
    model: str, files: tuple[Path, ...], tokens: int, ablate: str | None, ablate_tokens: int, svg: Path | None,
    as_json: bool, flags: Settings,
) -> None:  # fmt: skip
    """Show which experts of MODEL are used for given texts.

    Each FILE is a domain, named after the file. A file named .jsonl has lines such as
    {"domain": "maths", "text": "2 + 2 = 4"}. Which experts ran can reveal a text: treat the report like the texts.

    \b
    Examples:
      argosy routes demo news.txt code.txt --svg experts.svg
      argosy routes ./Qwen3-30B-A3B labelled.jsonl --memory 16GiB --ablate 3:5,3:17
    """
    from argosy.observe.ablation import parse_removals
    from argosy.observe.heat_map import draw
    from argosy.observe.report import report
    from argosy.observe.texts import read_texts

    settings = read_settings(**flags)
    texts = read_texts(files, most_bytes=tokens * _BYTES_PER_TOKEN)
    with _open(model, for_engine(settings), len(texts), tokens) as reader, progress_bar() as progress:
        config = reader.engine.config
        removals: list[Removal] = []
        if ablate is not None:
            removals = parse_removals(ablate, layers=config.moe_layers, num_experts=config.num_experts)
        ids = {domain: reader.tokens_of(domain, parts, tokens) for domain, parts in texts.items()}
        domains = [reader.read(domain, windows, progress) for domain, windows in ids.items()]
        realised = reader.answer(list(ids.values()), progress)
        changes = reader.remove(removals, ids, ablate_tokens, progress)
        found = report(
            domains,
            layers=config.moe_layers,
            num_experts=config.num_experts,
            num_slots=None if realised is None else realised.slots,
        )
    name = Path(model).name
    if svg is not None:
        title = f"{name}: how often each expert is chosen"
        write_file(svg, draw(found.shares, domains=found.domains, layers=found.layers, title=title))
    if as_json:
        _print_json(name, found, realised, changes)
    else:
        print(*_lines(name, found, realised, changes), sep="\n")


@dataclass(frozen=True, slots=True)
class Realised:
    """Hits of the engine's own cache while answering, and of other policies with the same choices."""

    slots: int
    hit_rate: float
    num_tokens: int
    replayed: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "slots": self.slots,
            "tokens": self.num_tokens,
            "engine": self.hit_rate,
            **self.replayed,
        }


def _open(model: str, options: dict[str, Any], num_domains: int, num_tokens: int) -> _Reader:
    from argosy import Engine
    from argosy.observe.report import working_bytes
    from argosy.observe.trace import TraceRecorder

    made: list[TraceRecorder] = []

    def open_recorder(files: ModelFiles, config: EngineConfig) -> TraceRecorder:
        geometry = files.config
        most = max(num_tokens, num_domains * (_PROMPT + _ANSWER))
        report_bytes = working_bytes(
            num_domains * num_tokens,
            num_layers=len(geometry.moe_layers),
            num_experts=geometry.num_experts,
            k=geometry.experts_per_token,
            num_domains=num_domains,
        )
        made.append(TraceRecorder(geometry, most + _WINDOW, working_bytes=report_bytes))
        return made[-1]

    with progress_bar() as progress:
        engine = Engine.open(
            model, progress=progress, recorder=open_recorder, prefix_reuse=False, max_sequences=1, media=False,
            **options,
        )  # fmt: skip
    if not made:
        engine.close()
        raise UsageError(
            f"{model} has no routed experts, or its layers choose different numbers of them; recordings need the same "
            "number in every layer"
        )
    return _Reader(engine, made[0])


class _Reader:
    """An engine that reads texts and records its routing and the loss of each token."""

    def __init__(self, engine: Engine, trace: TraceRecorder) -> None:
        self.engine = engine
        self._trace = trace
        self._window = min(_WINDOW, engine.plan.context_tokens - 1)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def tokens_of(self, domain: str, texts: Sequence[str], most: int) -> list[list[int]]:
        """The first tokens of a domain, split into windows.

        Raises:
            UsageError: there are fewer than two, or the model has no tokenizer.
        """
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise UsageError("texts need a tokenizer, but this checkpoint has none")
        windows: list[list[int]] = []
        left = most
        for text in texts:
            ids = tokenizer.encode(text)[:left]
            parts = [ids[at : at + self._window] for at in range(0, len(ids), self._window)]
            windows += [part for part in parts if len(part) > 1]
            left = most - sum(map(len, windows))
            if left < 2:
                break
        if not windows:
            raise UsageError(f"the domain '{domain}' has fewer than two tokens")
        return windows

    def read(self, domain: str, windows: list[list[int]], progress: Progress | None) -> DomainRouting:
        import numpy as np

        from argosy.observe.report import DomainRouting, class_of

        losses = self._losses(windows, _told(progress, f"reading {domain}"))
        self.engine.tell_recorder()
        taken = self._trace.take()
        tokenizer = self.engine.tokenizer
        assert tokenizer is not None
        ids = [token for window in windows for token in window]
        assert len(ids) == len(taken.choices)
        class_by_id = {
            token: class_of(tokenizer.token_bytes(token).decode("utf-8", "replace")) for token in set(ids)
        }
        classes = np.array([class_by_id[token] for token in ids], np.int8)
        return DomainRouting(domain, taken.choices, classes, losses)

    def answer(self, domains: list[list[list[int]]], progress: Progress | None) -> Realised | None:
        """Continue the texts: first to fill the cache, then to count. None if every expert is resident."""
        import numpy as np

        from argosy import SamplingParams
        from argosy.observe.replay import hit_rates

        engine, plan = self.engine, self.engine.plan
        if plan.slots.is_resident:
            return None
        params = SamplingParams(max_tokens=_ANSWER, ignore_eos=True)
        parts = []
        for number in range(2):
            for at, windows in enumerate(domains):
                if progress is not None:
                    progress("answering", (number * len(domains) + at) / (2 * len(domains)))
                engine.generate(windows[-number][:_PROMPT], params)
            engine.tell_recorder()
            parts.append(self._trace.take())
        filling, counted = parts
        chosen = [part.choices[part.is_decode] for part in parts]
        slots = plan.slots_in_decode(_PROMPT + _ANSWER)
        return Realised(
            slots,
            counted.hits / max(1, counted.lookups),
            len(chosen[1]),
            hit_rates(
                np.concatenate(chosen),
                num_experts=engine.config.num_experts,
                slots=slots,
                counted_from=int(np.count_nonzero(filling.is_decode)),
            ),
        )

    def remove(
        self, removals: list[Removal], ids: dict[str, list[list[int]]], most: int, progress: Progress | None
    ) -> list[Change]:
        """For each removal, read the first `most` tokens of each domain again with its experts forbidden."""
        from argosy.observe.ablation import compare

        if not removals:
            return []
        self._trace.stop()
        first = {domain: _first(windows, most) for domain, windows in ids.items()}
        before = {domain: self._losses(windows, None) for domain, windows in first.items()}
        changes: list[Change] = []
        for number, removal in enumerate(removals):
            if progress is not None:
                progress(f"without {removal.name}", number / len(removals))
            self.engine.forbid_experts(removal.experts)
            for domain, windows in first.items():
                after = self._losses(windows, None)
                changes.append(compare(removal.name, domain, before[domain], after))
        return changes

    def _losses(self, windows: list[list[int]], told: Callable[[float], None] | None) -> NDArray[np.float64]:
        """The loss in nats of every token except the first of each window."""
        import numpy as np

        from argosy import SamplingParams

        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        losses: list[float] = []
        for number, window in enumerate(windows):
            if told is not None:
                told(number / len(windows))
            result = self.engine.generate(window, params)
            losses += [-one.logprob for one in result.prompt_logprobs or () if one is not None]
        return np.array(losses, np.float64)


def _told(progress: Progress | None, what: str) -> Callable[[float], None] | None:
    return None if progress is None else lambda share: progress(what, share)


def _first(windows: list[list[int]], most: int) -> list[list[int]]:
    found: list[list[int]] = []
    for window in windows:
        left = most - sum(map(len, found))
        if left < 2:
            break
        found.append(window[:left])
    return found


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _print_json(name: str, found: RoutingReport, realised: Realised | None, changes: list[Change]) -> None:
    import json

    facts = {
        "model": name,
        **found.as_dict(),
        "engine": None if realised is None else realised.as_dict(),
        "removed": [change.as_dict() for change in changes],
    }
    print(json.dumps(facts, ensure_ascii=False))


def _lines(name: str, found: RoutingReport, realised: Realised | None, changes: list[Change]) -> list[str]:
    """The report as lines of text."""
    lines = [
        f"model    {name}: {len(found.layers)} layers of {found.num_experts} experts,"
        f" {found.experts_per_token} for a token"
    ]
    width = max(12, *(len(domain) for domain in found.domains)) + 2
    lines += [
        f"{'texts    ' if not at else '         '}{domain:<{width}}{count:>6} tokens, perplexity {perplexity:.2f}"
        for at, (domain, count, perplexity) in enumerate(
            zip(found.domains, found.num_tokens, found.perplexities, strict=True)
        )
    ]
    lines += _domain_lines(found, width)
    lines += ["", *_layer_lines(found.per_layer)]
    lines += ["", *_cache_lines(found, realised)]
    if changes:
        lines += ["", *_removal_lines(found, changes, width)]
    return lines


def _domain_lines(found: RoutingReport, width: int) -> list[str]:
    if found.across_domain is None:
        return []
    num_special = sum(one.domain is not None and one.domain.is_significant for one in found.per_layer)
    lines = [
        "",
        f"domains  {num_special} of {len(found.layers)} layers choose by domain (p at most 0.01)",
    ]
    across = found.across_domain
    if not across.is_significant:
        lines.append(
            f"         an expert's number means nothing across layers: {_bits(across)}; see single layers"
        )
        return lines
    lines.append(f"         an expert's number means the same across layers: {_bits(across)}")
    lines += ["", f"share of choices over all layers, % (even: {100 / found.num_experts:.1f})"]
    shares = 100 * found.shares.mean(axis=1)
    if found.num_experts <= _MOST_COLUMNS:
        lines.append(" " * width + "".join(f"{expert:>7}" for expert in range(found.num_experts)))
        lines += [
            f"{domain:<{width}}" + "".join(f"{share:>7.1f}" for share in row)
            for domain, row in zip(found.domains, shares, strict=True)
        ]
    for number, domain in enumerate(found.domains):
        own = found.served_by[domain]
        named = ", ".join(f"{expert} ({shares[number, expert]:.0f} %)" for expert in own[:8])
        lines.append(f"  {domain} is served by {'experts ' + named if own else 'no expert of its own'}")
    return lines


def _layer_lines(layers: list[LayerReport]) -> list[str]:
    lines = ["layer  balance  domain  chance   class  chance   reuse  chance  together"]
    for one in layers:
        domain = ("-", "-") if one.domain is None else _pair(one.domain)
        own_class = _pair(one.token_class)
        pairs = ", ".join(f"{a}+{b} {100 * share:.0f} %" for a, b, share, _ in one.pairs[:2])
        lines.append(
            f"{one.layer:>5}{one.balance:>9.2f}{domain[0]:>8}{domain[1]:>8}{own_class[0]:>8}{own_class[1]:>8}"
            f"{one.reuse:>8.2f}{one.reuse_by_chance:>8.2f}  {pairs}"
        )
    return [
        *lines,
        "balance: 1 if all experts are used alike. domain, class: bits that an expert tells about the domain of its",
        "text and the class of its token (word, number ...); ? if chance may explain them. reuse: share of a token's",
        "experts that the one before it had. together: pairs that tokens choose far more often than by chance.",
    ]


def _cache_lines(found: RoutingReport, realised: Realised | None) -> list[str]:
    working_set = found.working_set
    mean = working_set.distinct.mean(axis=0)
    shown = [
        f"{mean[at]:.1f} in {window}"
        for at, window in enumerate(working_set.windows)
        if window in _WINDOWS_SHOWN
    ]
    lines = [
        f"needed   distinct experts of a layer, mean, of {found.num_experts}: {', '.join(shown)} tokens",
        "",
    ]
    lines.append(f"{'cache':<26}{'LRU':>7}{'LFU':>7}{'optimum':>9}   hit rate, second half of each text")
    all_experts = len(found.layers) * found.num_experts
    for slots, rates in found.caches.items():
        share = f"{slots} experts ({100 * slots / all_experts:.0f} %)"
        lines.append(f"  {share:<24}{rates['lru']:>7.2f}{rates['lfu']:>7.2f}{rates['optimum']:>9.2f}")
    if realised is None:
        return [*lines, "engine   every expert is in memory"]
    rates = realised.replayed
    lines.append(
        f"engine   {realised.hit_rate:.2f} with {realised.slots} experts, over {realised.num_tokens} answer tokens;"
        f" of the same: LRU {rates['lru']:.2f}, LFU {rates['lfu']:.2f}, optimum {rates['optimum']:.2f}"
    )
    return lines


def _removal_lines(found: RoutingReport, changes: list[Change], width: int) -> list[str]:
    lines = [
        "rise of perplexity without an expert, % (the rise of the loss in standard errors: above 4 it is not chance)"
    ]
    lines.append(f"{'expert':<10}" + "".join(f"{domain:>{max(width, 18)}}" for domain in found.domains))
    by_removal: dict[str, list[Change]] = {}
    for change in changes:
        by_removal.setdefault(change.removal, []).append(change)
    for removal, row in by_removal.items():
        cells = (f"{100 * one.rise:+.1f} ({one.standard_errors:+.1f})" for one in row)
        lines.append(f"{removal:<10}" + "".join(f"{cell:>{max(width, 18)}}" for cell in cells))
    return lines


def _bits(one: Specialisation) -> str:
    return f"{one.bits:.2f} bits ({one.by_chance:.2f} by chance, p {one.p:.3f})"


def _pair(one: Specialisation) -> tuple[str, str]:
    mark = "" if one.is_significant else "?"
    return f"{one.bits:.2f}{mark}", f"{one.by_chance:.2f}"
