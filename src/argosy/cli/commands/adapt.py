"""`argosy adapt`: train a LoRA adapter on a CPU, as an experiment."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from argosy.cli.commands import completion
from argosy.cli.shared.numbers import RealNumber, WholeNumber
from argosy.cli.shared.output import parameter_count, print_facts, progress_bar
from argosy.config import counted, format_bytes
from argosy.errors import ArgosyError, DoesNotFit, UsageError

if TYPE_CHECKING:
    from argosy.adapters.making.mixture import Mixture
    from argosy.adapters.making.rows import Examples
    from argosy.checkpoint.files import ModelFiles

_TOLD_STEPS = 10
_CHECKED_TOKENS = 64
_MOST_NATS = 1e-3  # mean KL divergence; experts of a q8 pack differ by 1e-7 from float32
_WORKING_BYTES = 2 << 30  # of torch itself, activations and the engine that checks; 1.6 GiB were measured


@click.command("adapt")
@click.argument("model", metavar="MODEL", shell_complete=completion.models)
@click.argument("texts", metavar="TEXTS", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    required=True,
    type=click.Path(path_type=Path),
    help="The adapter's directory, in PEFT's format.",
)
@click.option(
    "--rank", type=WholeNumber(1, 64), default=8, show_default=True, help="Rank of every LoRA pair."
)
@click.option(
    "--steps",
    type=WholeNumber(1, 100_000),
    default=80,
    show_default=True,
    help="Steps of up to 8 rows each.",
)
@click.option(
    "--learning-rate",
    type=RealNumber(0, 1, min_open=True),
    default=2e-3,
    show_default=True,
    help="Its peak.",
)
@click.option(
    "--context",
    "context_tokens",
    type=WholeNumber(2, 8192),
    default=512,
    show_default=True,
    help="Longer rows are cut to this many tokens.",
)
@click.option("--threads", type=WholeNumber(1, 1024), help="Threads; default: the cores of this machine.")
@click.option("--force", is_flag=True, help="Replace the adapter in DIR.")
def adapt(
    model: str, texts: Path, output: Path, rank: int, steps: int, learning_rate: float, context_tokens: int,
    threads: int | None, force: bool,
) -> None:  # fmt: skip
    """Train a LoRA adapter for MODEL on the rows of TEXTS: `demo`, or another Qwen2-MoE model of its size.

    An experiment: PEFT and Unsloth train larger models, and `--lora` runs their adapters too. A line of TEXTS is
    {"text": "..."}, or {"messages": [...]}, of which the assistant's turns are learned. The pairs are of q, k, v and
    o, and of all routed experts. A tenth of the rows is held out to measure the loss. It needs torch.

    \b
    Examples:
      argosy adapt demo examples/tern.jsonl -o tern
      argosy adapt demo texts.jsonl -o mine --steps 200 --rank 16
    """
    require_torch()
    from argosy.adapters.making.peft_files import require_place, write_peft
    from argosy.adapters.making.weights import require_trainable
    from argosy.machine.resources import peak_bytes
    from argosy.open.models import locate_model, open_files

    require_place(output, replaces=force)
    with progress_bar() as progress:
        files = open_files(locate_model(model, progress))
    require_trainable(files.config, model)
    require_memory(files, rank)
    found = read_examples(files, model, texts, min(context_tokens, files.config.context_tokens))
    print_facts(describe(found))
    mixture = checked_mixture(files, model, found, rank, threads)
    print_facts([f"pairs     {parameter_count(mixture.trained().num_values)} values of rank {rank}"])
    lines = trained_lines(mixture, found, steps, learning_rate)
    nbytes = write_peft(output, mixture.trained(), base=model, replaces=force)
    print_facts([*lines, f"memory    {format_bytes(peak_bytes() or 0)} at most"])
    print_facts([f"adapter   {output}, {format_bytes(nbytes)}"])
    print_facts([f'next      argosy run --model {model} --lora {output.name}={output} "..."'])


def require_torch() -> None:
    """Raise UsageError, with the command that installs it, if torch is missing."""
    if importlib.util.find_spec("torch") is None:
        from argosy.installed import command_for_extra

        raise UsageError(
            "training needs torch, which is not installed; running an adapter does not need it",
            hint=f"`{command_for_extra('adapt')}`",
        )


def require_memory(files: ModelFiles, rank: int) -> None:
    """Raise DoesNotFit if training would take more memory than is available; it has no budget."""
    from argosy.adapters.making.weights import num_pair_values, num_values
    from argosy.machine.resources import memory_limit

    # Each value of a pair also needs its gradient and AdamW's two moments.
    needed = 4 * num_values(files) + 16 * num_pair_values(files.config, rank) + _WORKING_BYTES
    limit = memory_limit()
    if needed > limit.free_bytes:
        raise DoesNotFit(
            f"training needs about {format_bytes(needed)} of memory; {limit}",
            hint="train it with PEFT on another machine; `--lora` runs the adapter here",
            needed_bytes=needed,
        )


def read_examples(files: ModelFiles, model: str, texts: Path, context_tokens: int) -> Examples:
    """Read the rows, as token ids of the model. Raises UsageError for a malformed row."""
    from argosy.adapters.making.rows import encode_rows, read_rows
    from argosy.prompt.builder import PromptBuilder
    from argosy.prompt.tokenizer import Tokenizer

    rows = read_rows(texts)
    tokenizer = Tokenizer.open(files.path, files.header)
    if tokenizer is None:
        raise UsageError(f"{model} has no tokenizer, so it cannot learn texts")
    builder = PromptBuilder(tokenizer, vocab_size=files.config.vocab_size)
    try:
        return encode_rows(texts, rows, tokenizer, builder, context_tokens=context_tokens)
    finally:
        builder.close()


def describe(found: Examples) -> list[str]:
    """Lines about the rows."""
    num_tokens = sum(len(one.ids) for one in found.examples)
    num_learned = sum(int(one.is_learned.sum()) for one in found.examples)
    lines = [
        f"rows      {len(found.examples):,}: {num_tokens:,} tokens, of which {num_learned:,} are learned"
    ]
    for count, what in (
        (found.num_same, "repeated, and used once"),
        (found.num_cut, "cut to the context; see `--context`"),
        (found.num_left_out, "left out: nothing to learn within the context"),
    ):
        if count:
            lines.append(f"          {count:,} {what}")
    return lines


def checked_mixture(
    files: ModelFiles, model: str, found: Examples, rank: int, threads: int | None
) -> Mixture:
    """Open the model in torch, and prove that it computes what the engine computes.

    Raises:
        ArgosyError: their logits differ.
    """
    # Threads of OpenMP that wait spin: on a busy machine they would take a step's time from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from argosy.adapters.making.checking import divergence
    from argosy.adapters.making.mixture import Mixture
    from argosy.adapters.making.weights import read_weights
    from argosy.engine.engine import Engine
    from argosy.machine.resources import usable_cores
    from argosy.open.models import configure

    ids = found.examples[0].ids[:_CHECKED_TOKENS].tolist()
    with progress_bar() as progress:
        options = configure(
            model, files, kv_dtype="f32", context=len(ids) + 1, prefix_reuse=False, media=False
        )
        with Engine(files, options, progress=progress) as engine:
            expected = engine.logits(ids)
        weights = read_weights(files, progress)
    torch.set_num_threads(threads or usable_cores())
    mixture = Mixture(files.config, weights, rank=rank, alpha=2 * rank, seed=0)
    nats = divergence(expected, mixture.logits(ids))
    if not nats <= _MOST_NATS:
        raise ArgosyError(
            f"torch computes other logits than the engine, so nothing was trained: needs a KL divergence of at most "
            f"{_MOST_NATS:g} nats a token, found {nats:.3g} on {len(ids)} tokens",
            hint="please report this, with the name of the model",
        )
    print_facts([f"check     torch and the engine agree on {len(ids)} tokens (KL {nats:.1e} nats)"])
    return mixture


def trained_lines(mixture: Mixture, found: Examples, steps: int, learning_rate: float) -> list[str]:
    """Train, telling the loss on stderr; return lines about the outcome."""
    from argosy.adapters.making.training import split, train

    learned, held_out = split(found.examples, seed=0)

    def tell(step: int, loss: float, seconds: float) -> None:
        if step % _TOLD_STEPS == 0 or step in (1, steps):
            left = seconds / step * (steps - step)
            print(f"step {step} of {steps}  loss {loss:.3f}  {left:.0f} s left", file=sys.stderr, flush=True)

    outcome = train(mixture, learned, held_out, steps=steps, learning_rate=learning_rate, seed=0, tell=tell)
    said = "no row was held out"
    if outcome.held_out_before is not None:
        said = (
            f"loss {outcome.held_out_before:.3f} -> {outcome.held_out_after:.3f} nats a token "
            f"on {counted(len(held_out), 'row')} that it did not see"
        )
    return [f"trained   {steps} steps in {outcome.seconds:.0f} s", f"held out  {said}"]
