"""Every error Argosy raises on purpose, as one small tree.

    ArgosyError                      exit code   HTTP status
    ├── UsageError                           2           400   a setting, option or request is invalid
    │   ├── PromptTooLong                    2           400   prompt and answer do not fit the context
    │   ├── GrammarError                     2           400   a grammar cannot be compiled or followed within bounds
    │   └── BadMedia                         2           400   a picture or sound cannot be decoded within its limits
    ├── Overloaded                           1           503   no room for another request now; retry later
    ├── Revoked                              1           401   the key of the request was revoked
    ├── DoesNotFit                           3           503   the memory budget is below the floor
    ├── CheckpointError                      4           500   a file is missing, damaged or inconsistent
    │   ├── UnsupportedModel                 4           500   the model needs mathematics that is not built in
    │   └── CorruptRecord                    4           500   bytes changed since the pack was written
    ├── ReadFailed                           4           500   the drive or file system refused a read
    ├── RunnerFailed                         4           503   no process or machine could run an expert
    ├── DiskFull                             5           507   no room for the data to write
    ├── FetchFailed                          1           502   a download failed
    ├── ServerNotUsable                      1           502   no answer, the key refused, or not an Argosy server
    └── PeerNotUsable                        1           503   a machine of a group does not answer
        └── PeerRefused                      1           503   it refuses, or has another key, model or version

Each error carries its facts as attributes, so the command line and the server say the same sentence. `hint`, if set,
says what to do next. `assert` is for conditions that only our own mistake can break.
"""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class ArgosyError(Exception):
    """Base of every error raised on purpose; `str()` is one sentence for a person."""

    exit_code = 1
    http_status = 500

    def __init__(self, message: str, *, hint: str | None = None, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(ArgosyError):
    """A setting, option or request is invalid."""

    exit_code = 2
    http_status = 400


class PromptTooLong(UsageError):
    """Prompt and answer do not fit the context.

    Facts: `needed` and `available`, in tokens. `for_answer` says how many of the needed tokens are for the answer, if
    not one. With `is_at_least` the prompt was not counted to its end, and `needed` is a lower bound. The server
    rewords the message for the clients of each dialect (`serve/http/failures.py`).
    """

    @classmethod
    def of(
        cls, num_tokens: int, context_tokens: int, *, for_answer: int = 1, is_all: bool = True
    ) -> PromptTooLong:
        """Refuse a prompt of `num_tokens`; with `is_all` false it was not counted to its end."""
        counted = "" if is_all else "at least "
        room = (
            ""
            if not for_answer
            else f", including at least {'one' if for_answer == 1 else for_answer} for the answer"
        )
        return cls(
            f"the prompt has {counted}{num_tokens} tokens, and the context holds {context_tokens}{room}",
            hint="shorten the prompt, or raise --context up to the model's limit (this needs more memory)",
            needed=num_tokens + for_answer,
            available=context_tokens,
            **({"for_answer": for_answer} if for_answer != 1 else {}),
            **({} if is_all else {"is_at_least": True}),
        )


class GrammarError(UsageError):
    """The grammar for an answer cannot be compiled or followed within its bounds."""


class BadMedia(UsageError):
    """A picture, sound or video is too large, damaged, or in no format that is read.

    Facts: `kind` ("picture", "sound" or "video"), and `needed` and `found` if a limit is exceeded.
    """


class Overloaded(ArgosyError):
    """There is no room for another request now.

    Attributes:
        retry_after_s: when to try again, in whole seconds.
    """

    http_status = 503

    def __init__(self, message: str, *, retry_after_s: int, hint: str | None = None, **facts: object) -> None:
        super().__init__(message, hint=hint, retry_after_s=retry_after_s, **facts)
        self.retry_after_s = retry_after_s


class Revoked(ArgosyError):
    """The key of the request was revoked, so the request ends."""

    http_status = 401


class DoesNotFit(ArgosyError):
    """The memory budget is below the floor, or the process may not map as much memory as the budget needs.

    Facts: `needed_bytes`, `budget_bytes`.
    """

    exit_code = 3
    http_status = 503


class CheckpointError(ArgosyError):
    """A file is missing, damaged or inconsistent; facts: `path`, and `tensor` if the error concerns one."""

    exit_code = 4


class UnsupportedModel(CheckpointError):
    """The checkpoint needs mathematics that is not built in; facts: `key`, `value`, `supported`."""


class CorruptRecord(CheckpointError):
    """Bytes changed since the pack was written; facts: `path`, `layer`, `expert`."""


class ReadFailed(ArgosyError):
    """The drive or file system refused a read; facts: `path`, `offset`, `nbytes`."""

    exit_code = 4


class RunnerFailed(ArgosyError):
    """No process or machine could run an expert; facts: `layer`, and `expert` and `shard` if it concerns one."""

    exit_code = 4
    http_status = 503


class DiskFull(ArgosyError):
    """There is no room for the data to write; facts: `path`, `needed_bytes`, `free_bytes`."""

    exit_code = 5
    http_status = 507


def is_disk_full(error: OSError) -> bool:
    """Whether `error` says that a file system is full, or a quota or file size limit is reached."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def as_exception(error: BaseException) -> Exception:
    """Return a failure as an Exception, so that the handlers of failed requests see it.

    A panic in a Rust library (tokenizers, llguidance) arrives as pyo3's PanicException, a bare BaseException.
    """
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"{type(error).__name__} in a library")
    failure.__cause__ = error
    return failure


def did_you_mean(
    name: str, known: Iterable[str], *, most: int = 1, quote: str = "'", cutoff: float = 0.6
) -> str:
    """Return a question that names the known names nearest to an unknown one, at most `most`; empty if none is near."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(quote + one + quote for one in near)}?" if near else ""


def refused_by_system(error: BaseException) -> Overloaded | None:
    """Return the error to tell if the system refused memory, a file descriptor or a thread; None for other failures."""
    number = error.errno if isinstance(error, OSError) else None
    says = str(error)
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "failed to map segment" in says:
        what, hint = "memory", "lift `ulimit -v` or the limit of its control group"
    elif number in (errno.EMFILE, errno.ENFILE):
        what, hint = "files", "raise `ulimit -n`"
    elif "can't start new thread" in says:
        what, hint = (
            "threads",
            "raise `pids.max` of its control group, `ulimit -u`, or TasksMax of its service",
        )
    else:
        return None
    return Overloaded(f"the system gives this process no more {what}", retry_after_s=5, hint=hint)


@contextmanager
def room_for(what: str, directory: Path, *, hint: str) -> Iterator[None]:
    """Turn an error that says `directory` is full into `DiskFull`: "no room for WHAT in DIRECTORY", and the hint.

    Raises:
        DiskFull: the body of the context found no room.   OSError: any other error of the body, unchanged.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"no room for {what} in {directory}", hint=hint, path=directory) from error
        raise


class FetchFailed(ArgosyError):
    """A download failed; facts: `what`, and `is_absent` if no server could be asked."""

    http_status = 502


class ServerNotUsable(ArgosyError):
    """Nothing answers there, the key is refused, or it is not an Argosy server; facts: `url`, `status`, `is_absent`."""

    http_status = 502


class PeerNotUsable(ArgosyError):
    """A worker or coordinator is gone, is too slow, or does not speak the protocol of a group; facts: `host`."""

    http_status = 503


class PeerRefused(PeerNotUsable):
    """A worker and a coordinator cannot work together; facts: `host`, and `reason`, the name of a `hello.Refusal`."""
