"""`argosy upcycle`: make a mixture of experts from a dense model."""

from __future__ import annotations

from pathlib import Path

import click

from argosy.cli.shared.numbers import WholeNumber


@click.command("upcycle")
@click.argument("dense")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--experts", type=WholeNumber(), default=8, show_default=True, help="Routed experts per layer.")
@click.option(
    "--experts-per-token",
    type=WholeNumber(),
    default=2,
    show_default=True,
    help="Routed experts used per token.",
)
@click.option("--width", type=WholeNumber(), default=96, show_default=True, help="Neurons per expert.")
@click.option(
    "--seed",
    type=WholeNumber(),
    default=0,
    show_default=True,
    help="Seed for neurons and the initial router.",
)
def upcycle(
    dense: str, destination: Path, experts: int, experts_per_token: int, width: int, seed: int
) -> None:
    """Make the Qwen2-MoE checkpoint DST from the dense Llama-style model DENSE.

    DENSE is the name or the path of safetensors or of a GGUF file. Its feed-forward network becomes the shared
    expert. Routed experts start from its neurons, with an output of zero, so DST at first generates exactly the
    same text as DENSE; what a GGUF has quantised is stored as float32. Training only its experts and router then
    improves it (sparse upcycling, arXiv:2212.05055).

    \b
    Examples:
      argosy upcycle ./SmolLM2-135M-Instruct ./smol-moe
      argosy upcycle model.gguf ./moe --experts 16 --experts-per-token 4 --width 64
    """
    from argosy.checkpoint.upcycle import upcycle as make
    from argosy.cli.shared.output import progress_bar
    from argosy.open.models import locate_model

    with progress_bar() as progress:
        made = make(
            locate_model(dense),
            destination,
            num_experts=experts,
            experts_per_token=experts_per_token,
            width=width,
            seed=seed,
            progress=progress,
        )
    print(made)
