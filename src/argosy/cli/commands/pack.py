"""`argosy pack`: write a model in packed form, or verify a pack."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from argosy.cli.shared.declared import choices
from argosy.cli.shared.numbers import WholeNumber
from argosy.cli.shared.settings import Settings, for_engine, read_settings
from argosy.config import counted, format_bytes
from argosy.errors import ArgosyError, UsageError

if TYPE_CHECKING:
    from argosy.evaluate.measure import DriftReport

FORMATS = ("bf16", "q8", "q4", "source")

Progress = Callable[[str, float], None]


@click.command("pack")
@click.argument("source", metavar="SRC", required=False)
@click.argument("destination", metavar="DST", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    type=click.Choice(FORMATS),
    help="Format of the experts; q8 and q4 lose a little precision.",
)
@click.option(
    "--shards",
    "num_shares",
    type=WholeNumber(1, 64),
    metavar="N",
    help="Divide the experts into N files, one for each `argosy worker --share K/N`.",
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
@click.option(
    "--report", is_flag=True, help="Then compare both as `argosy eval drift` does, in DST/drift.json."
)
@choices(Settings, "memory", into="flags", memory={"help": "Budget of that comparison: 8GiB, 8GB, 75%."})
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def pack(
    source: str | None,
    destination: Path | None,
    format_name: str | None,
    num_shares: int | None,
    mmproj: str | None,
    pack_directory: Path | None,
    report: bool,
    as_json: bool,
    flags: Settings,
) -> None:
    """Write the model SRC, a name or a path, as a pack in DST, where each expert is one aligned read.

    A pack is optional; models also run from their own files. `source` keeps every weight bit for bit, bf16
    rounds float32 and float16, q8 and q4 quantise. Weights in FP8, MXFP4, NVFP4, or compressed-tensors' INT4 in
    groups of 32, can be packed in any of these formats, other quantised weights only as `source`. Encoders of
    pictures and sound keep every bit in every format. After an interruption the same command continues.
    --report measures what packing changed, with both models one after the other.

    \b
    Examples:
      argosy pack ./mixtral-8x7b ./mixtral-q4 --format q4
      argosy pack --verify ./mixtral-q4
    """
    if pack_directory is not None:
        if report or any(given is not None for given in (source, format_name, num_shares, mmproj)):
            raise UsageError(
                "--verify takes one directory, without SRC, --format, --shards, --mmproj or --report"
            )
        _verify(pack_directory, as_json)
        return
    if source is None or destination is None or format_name is None:
        raise UsageError(
            "pack needs SRC, DST and --format", hint="argosy pack ./model ./model-q4 --format q4"
        )
    if flags and not report:
        raise UsageError("--memory is the budget of --report; packing itself needs little")
    drift = partial(_drift, source, destination, flags) if report else None
    _pack(source, destination, format_name, num_shares or 1, mmproj, as_json, drift)


def _pack(
    source: str, destination: Path, format_name: str, num_shares: int, mmproj: str | None, as_json: bool,
    compare: Callable[[], DriftReport] | None,
) -> None:  # fmt: skip
    from argosy.checkpoint.pack import pack as write_pack
    from argosy.cli.shared.output import progress_bar
    from argosy.model.encoders.reading import find_encoders, tensor_names
    from argosy.open.models import locate_model, open_files

    files = open_files(locate_model(source), mmproj=mmproj)
    encoders = find_encoders(files)
    for kind, fault in encoders.items():
        if isinstance(fault, ArgosyError):
            print(f"the pack will not take {kind}s: {fault.message}", file=sys.stderr)
    with progress_bar() as progress:
        report = write_pack(
            files, destination, format=format_name, num_shares=num_shares, encoder_tensors=tensor_names(encoders),
            progress=progress,
        )  # fmt: skip
    if report.restarted_because is not None:
        print(f"started over: {report.restarted_because}", file=sys.stderr)
    if as_json:
        facts = {
            "directory": str(report.directory),
            "format": report.format,
            "source_bytes": report.source_bytes,
            "packed_bytes": report.packed_bytes,
            "num_shards": num_shares,
            "seconds": round(report.seconds, 3),
            "resumed_bytes": report.resumed_bytes,
            "restarted_because": report.restarted_because,
        }
        if compare is not None:
            facts["drift"] = compare().as_dict()
        print(json.dumps(facts, ensure_ascii=False))
        return
    share = report.packed_bytes / report.source_bytes
    print(f"packed   {report.directory} as {report.format} in {report.seconds:.1f} s")
    print(f"  before   {format_bytes(report.source_bytes):>10}")
    print(f"  after    {format_bytes(report.packed_bytes):>10}   {share:.0%} of the original")
    if num_shares > 1:
        print(f"  shards   experts-K-of-{num_shares}.bin, for `argosy worker --share K/{num_shares}`")
    if report.resumed_bytes:
        print(f"  resumed  {format_bytes(report.resumed_bytes):>10}   written by an earlier run")
    if compare is not None:
        from argosy.cli.commands.eval import lines

        sys.stdout.flush()  # the comparison takes minutes
        print("", *lines(compare()), sep="\n")


def _drift(source: str, destination: Path, flags: Settings) -> DriftReport:
    """Compare the pack with its source and store the report in the pack, where `argosy card` finds it."""
    from argosy.cli.commands.eval import REPORT_FILE, write_report
    from argosy.cli.shared.output import progress_bar
    from argosy.evaluate.material import read_material
    from argosy.evaluate.measure import measure_drift

    settings = read_settings(**flags)
    try:
        with progress_bar() as progress:
            report = measure_drift(
                source, destination, read_material(),
                options=for_engine(settings), candidate_settings={}, progress=progress,
            )  # fmt: skip
    except ArgosyError:
        again = f"argosy eval drift {source} {destination} --save {destination / REPORT_FILE}"
        print(f"the pack is complete, and `{again}` compares it later", file=sys.stderr)
        raise
    write_report(report, destination / REPORT_FILE)
    return report


def _verify(directory: Path, as_json: bool) -> None:
    from argosy.checkpoint.manifest import verify_pack
    from argosy.cli.shared.output import progress_bar

    with progress_bar() as progress:
        report = verify_pack(directory, progress)
    if as_json:
        print(
            json.dumps({"directory": str(directory), "num_files": report.num_files, "nbytes": report.nbytes})
        )
        return
    print(
        f"intact   {directory}: {counted(report.num_files, 'file')}, {format_bytes(report.nbytes)}, "
        "every BLAKE3 hash matches"
    )
