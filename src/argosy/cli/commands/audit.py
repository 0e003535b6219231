"""`argosy audit`: verify, show and export the audit written by `argosy serve --audit DIR`."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from argosy.cli.shared.numbers import WholeNumber
from argosy.config import counted
from argosy.errors import UsageError

if TYPE_CHECKING:
    from argosy.guard.chain import ChainReport, Line
    from argosy.guard.sealed import SealedContents

Command = TypeVar("Command", bound=Callable[..., Any])

_SHOWN = 50


def audit_options(command: Command) -> Command:
    """DIR and --audit-key-file."""
    command = click.option(
        "--audit-key-file", "key_file", type=click.Path(path_type=Path), metavar="FILE",
        help="Key of the audit; default: in its directory.",
    )(command)  # fmt: skip
    return click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))(command)


@click.group("audit")
def audit() -> None:
    """Verify, show and export an audit. A server may be writing to it.

    \b
    Examples:
      argosy audit verify ./audit --anchor 1042:9f2c...
      argosy audit show ./audit --key key-1a2b3c4d
    """


@audit.command("verify")
@audit_options
@click.option(
    "--anchor",
    "anchors",
    multiple=True,
    metavar="SEQ:SHA256",
    help="A line from the server's log; repeatable.",
)
@click.option(
    "--no-key", is_flag=True, help="Check hashes only; anyone who can write the files can forge them."
)
@click.option("--json", "as_json", is_flag=True, help="Print the same facts as JSON.")
def verify(
    directory: Path, key_file: Path | None, anchors: tuple[str, ...], no_key: bool, as_json: bool
) -> None:
    """Check that no line of the audit in DIR was changed, removed, added or moved. Exit code 4: one was.

    The directory itself cannot show that all of it was replaced by an older copy: an anchor, which the server's log has
    once an hour, can.
    """
    from argosy.guard import chain

    wanted = [chain.Head.parse(text) for text in anchors]
    key = None if no_key else read_key(directory, key_file)
    contents = None if key is None else _contents(directory, key)
    check = None if contents is None else contents.is_same
    with _progress(directory, key) as see:
        report = chain.verify(directory, key, anchors=wanted, check_object=check, see=see)
    if as_json:
        print(json.dumps(_as_dict(report)))
    else:
        print(*_lines(report), sep="\n")
    _require_valid(report)


@audit.command("show")
@audit_options
@click.option("--key", "key_id", metavar="ID", help="Only requests of this key.")
@click.option("--request", "request_id", metavar="ID", help="One request, with all fields.")
@click.option("--content", "with_content", is_flag=True, help="With --request: the texts, if they were kept.")
@click.option("--last", default=_SHOWN, show_default=True, type=WholeNumber(1), metavar="N", help="How many.")
def show(
    directory: Path, key_file: Path | None, key_id: str | None, request_id: str | None, with_content: bool,
    last: int,
) -> None:  # fmt: skip
    """Show the last requests in the audit in DIR, as far as their lines are valid."""
    from argosy.cli.shared.output import table_lines, write_text
    from argosy.guard import chain

    if with_content and request_id is None:
        raise UsageError(
            "--content needs --request ID", hint="`argosy audit export --content` has all of them"
        )
    key = read_key(directory, key_file)
    found: deque[Line] = deque(maxlen=last)

    def see(line: Line) -> None:
        tell(line)
        facts = line.facts
        if request_id is not None:
            is_wanted = facts.get("request_id") == request_id
        else:
            is_wanted = key_id in (None, facts.get("key"))
        if is_wanted:
            found.append(line)

    with _progress(directory, key) as tell:
        report = chain.verify(directory, key, see=see)
    if request_id is not None:
        for line in found:
            print(json.dumps(line.facts, indent=1))
            if with_content:
                said = _said(_contents(directory, key), line)
                print("the content is not kept, or was erased" if said is None else "", file=sys.stderr)
                for name, text in (said or {}).items():
                    write_text(f"── {name}\n{text}\n")
    else:
        header = ("TIME", "KIND", "KEY", "ROUTE", "STATUS", "TOKENS", "FINISH")
        print(*table_lines(header, [_row(line) for line in found]), sep="\n")
    _require_valid(report)


@audit.command("export")
@audit_options
@click.option("--key", "key_id", metavar="ID", help="Only lines of this key.")
@click.option("--content", "with_content", is_flag=True, help="Add the texts that were kept.")
def export(directory: Path, key_file: Path | None, key_id: str | None, with_content: bool) -> None:
    """Print the valid lines of the audit in DIR as JSON, one a line, for other programs."""
    from argosy.guard import chain

    key = read_key(directory, key_file)
    contents = _contents(directory, key) if with_content else None

    def see(line: Line) -> None:
        if key_id in (None, line.facts.get("key")):
            said = None if contents is None else _said(contents, line)
            print(json.dumps(line.facts if said is None else {**line.facts, "said": said}))

    _require_valid(chain.verify(directory, key, see=see))


@contextmanager
def _progress(directory: Path, key: bytes | None) -> Iterator[Callable[[Line], None]]:
    """Show the progress of reading an audit; yields a function that takes each line."""
    from argosy.cli.shared import output
    from argosy.guard import chain

    last = 0
    with suppress(UsageError):  # `chain.verify` reports it
        last = chain.read_head(directory, key).seq
    with output.progress_bar() as tell:
        yield lambda line: tell("checking lines", min(1.0, line.head.seq / last) if last > 0 else 0.0)


def read_key(directory: Path, key_file: Path | None) -> bytes:
    """Read the key of an audit, without creating one.

    Raises:
        UsageError: it is missing, others can read it, or it is not a key.
    """
    from argosy.guard.chain import KEY, KEY_BYTES
    from argosy.private_files import read_secret

    if not directory.is_dir():
        raise UsageError(
            f"{directory} is not a directory" if directory.exists() else f"{directory} does not exist"
        )
    path = directory / KEY if key_file is None else key_file
    try:
        return read_secret(
            path, KEY_BYTES, lost_with_it="the audit and contents made with it", may_make=False
        )
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}", hint="--audit-key-file names the key of the audit"
        ) from None


def _contents(directory: Path, key: bytes) -> SealedContents:
    from argosy.guard.sealed import SealedContents

    return SealedContents(directory, key)


def _said(contents: SealedContents, line: Line) -> dict[str, str] | None:
    """The texts of a request and its answer; None if they were not kept.

    Raises:
        UsageError: they were changed.
    """
    key_id, request_id = line.facts.get("key"), line.facts.get("request_id")
    if "content" not in line.facts or not isinstance(key_id, str) or not isinstance(request_id, str):
        return None
    data = contents.get(key_id, request_id)
    if data is None:
        return None
    sizes, _, bodies = data.partition(b"\n")
    asked_bytes = json.loads(sizes)["asked_bytes"]
    parts = {"asked": bodies[:asked_bytes], "answered": bodies[asked_bytes:]}
    return {name: part.decode("utf-8", "replace") for name, part in parts.items()}


def _row(line: Line) -> tuple[str, ...]:
    facts = line.facts
    tokens = "" if "new_tokens" not in facts else f"{facts.get('prompt_tokens')}+{facts['new_tokens']}"
    told = [facts.get("time"), line.kind, facts.get("key"), facts.get("route"), facts.get("status")]
    finish = ",".join(map(str, facts.get("finish") or ()))
    return tuple("" if cell is None else str(cell) for cell in (*told, tokens, finish))


def _lines(report: ChainReport) -> list[str]:
    first, last = report.first, report.last
    lines = ["valid    no line was changed, and none is missing" if report.is_valid else "INVALID"]
    lines += [f"  {fault}" for fault in report.faults]
    if (more := report.num_faults - len(report.faults)) > 0:
        lines.append(f"  and {more} more")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))
    lines.append(
        f"lines    {report.kinds.total()} in {counted(report.num_files, 'file')} ({kinds or 'none'})"
    )
    if first is not None and last is not None:
        lines.append(f"from     line {first.head.seq}, {first.facts.get('time')}")
        lines.append(f"to       line {last.head.seq}, {last.facts.get('time')}")
        lines.append(f"anchor   {last.head}")
    if report.num_lost:
        lines.append(
            f"lost     {counted(report.num_lost, 'request')} not recorded, by the server's own account"
        )
    if report.num_refused:
        lines.append(f"refused  {counted(report.num_refused, 'request')} without a valid key")
    if report.num_unkept:
        lines.append(f"unkept   {counted(report.num_unkept, 'content')} not kept; the lines say why")
    if report.num_objects or report.num_erased or report.num_missing:
        missing = f", {report.num_missing} missing" if report.num_missing else ""
        lines.append(f"content  {report.num_objects} kept, {report.num_erased} erased or expired{missing}")
    return [*lines, *(f"note     {note}" for note in report.notes)]


def _as_dict(report: ChainReport) -> dict[str, Any]:
    last = report.last
    return {
        "is_valid": report.is_valid, "faults": report.faults, "num_faults": report.num_faults,
        "notes": report.notes, "lines": dict(report.kinds), "files": report.num_files, "lost": report.num_lost,
        "refused": report.num_refused, "contents_unkept": report.num_unkept,
        "anchor": None if last is None else str(last.head), "contents": report.num_objects,
        "contents_erased": report.num_erased, "contents_missing": report.num_missing,
    }  # fmt: skip


def _require_valid(report: ChainReport) -> None:
    from argosy.guard.chain import ChainBroken

    if not report.is_valid:
        raise ChainBroken(
            f"the audit is not valid: {counted(report.num_faults, 'fault')}, the first: {report.faults[0]}",
            hint="keep the directory as it is, and compare it with a copy or with anchors in the server's log",
        )
