"""`argosy pack`: write a model in packed form, or verify a pack."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click

from argosy.config import format_bytes
from argosy.errors import ArgosyError, UsageError

FORMATS = ("bf16", "q8", "q4", "source")

Progress = Callable[[str, float], None]


@click.command("pack")
@click.argument("source", metavar="SRC", required=False, type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    type=click.Choice(FORMATS),
    help="Format of the experts; q8 and q4 lose a little precision.",
)
@click.option(
    "--mmproj",
    metavar="FILE",
    help="GGUF file with the vision tower; default: the one beside SRC.",
)
@click.option(
    "--verify",
    "pack_directory",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Verify the BLAKE3 hashes of a pack.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def pack(
    source: Path | None,
    destination: Path | None,
    format_name: str | None,
    mmproj: str | None,
    pack_directory: Path | None,
    as_json: bool,
) -> None:
    """Write the model in SRC as a pack in DST, where each expert is one aligned read.

    A pack is optional; models also run from their own files. `source` keeps every weight bit for bit, bf16
    rounds float32 and float16, q8 and q4 quantise. Checkpoints in FP8, INT4 or MXFP4 can be packed in any of
    these formats, a quantised GGUF only as `source`. Encoders of pictures and sound keep every bit in every
    format. After an interruption the same command continues.

    \b
    Examples:
      argosy pack ./mixtral-8x7b ./mixtral-q4 --format q4
      argosy pack --verify ./mixtral-q4
    """
    if pack_directory is not None:
        if source is not None or format_name is not None or mmproj is not None:
            raise UsageError("--verify takes one directory, without SRC, --format or --mmproj")
        _verify(pack_directory, as_json)
        return
    if source is None or destination is None or format_name is None:
        raise UsageError(
            "pack needs SRC, DST and --format", hint="argosy pack ./model ./model-q4 --format q4"
        )
    _pack(source, destination, format_name, mmproj, as_json)


def _pack(source: Path, destination: Path, format_name: str, mmproj: str | None, as_json: bool) -> None:
    from argosy.checkpoint.pack import pack as write_pack
    from argosy.cli.output import progress_bar
    from argosy.engine.options import open_files
    from argosy.model.encoders.reading import find_encoders, tensor_names

    files = open_files(source, mmproj=mmproj)
    encoders = find_encoders(files)
    for kind, fault in encoders.items():
        if isinstance(fault, ArgosyError):
            print(f"the pack will not take {kind}s: {fault.message}", file=sys.stderr)
    with progress_bar() as progress:
        report = write_pack(
            files, destination, format=format_name, encoder_tensors=tensor_names(encoders), progress=progress
        )
    if report.restarted_because is not None:
        print(f"started over: {report.restarted_because}", file=sys.stderr)
    if as_json:
        facts = {
            "directory": str(report.directory),
            "format": report.format,
            "source_bytes": report.source_bytes,
            "packed_bytes": report.packed_bytes,
            "seconds": round(report.seconds, 3),
            "resumed_bytes": report.resumed_bytes,
            "restarted_because": report.restarted_because,
        }
        print(json.dumps(facts))
        return
    share = report.packed_bytes / report.source_bytes
    print(f"packed   {report.directory}, {report.format}, in {report.seconds:.1f} s")
    print(f"  before   {format_bytes(report.source_bytes):>10}")
    print(f"  after    {format_bytes(report.packed_bytes):>10}   {share:.0%} of the original")
    if report.resumed_bytes:
        print(f"  resumed  {format_bytes(report.resumed_bytes):>10}   written by an earlier run")


def _verify(directory: Path, as_json: bool) -> None:
    from argosy.checkpoint.manifest import verify_pack
    from argosy.cli.output import progress_bar

    with progress_bar() as progress:
        report = verify_pack(directory, progress)
    if as_json:
        print(
            json.dumps({"directory": str(directory), "num_files": report.num_files, "nbytes": report.nbytes})
        )
        return
    print(
        f"intact   {directory}: {report.num_files} files, {format_bytes(report.nbytes)}, "
        "every BLAKE3 hash matches"
    )
