"""Ollama's Modelfile: read one as a preset, and write one for a preset.

    FROM llama3.2                  name or path of the model, from the Modelfile's directory
    PARAMETER temperature 0.7      a name and a value; `stop` may be repeated
    SYSTEM \"\"\"You are Mario.\"\"\"     "one line or several", \"\"\"the same\"\"\", or the rest of the line
    MESSAGE user Is it raining?    examples

The grammar is that of Ollama's parser/parser.go: a quoted value ends at the first line that ends with the same
quotes, and there are no escapes. Parsing takes time linear in the text.

Elsewhere: `presets.py` keeps presets.
"""

from __future__ import annotations

import codecs
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from argosy.checkpoint.untrusted_file import quote
from argosy.config import CHOOSING, EFFORTS, Preset
from argosy.errors import UsageError
from argosy.library import presets

MOST_BYTES = 1 << 20
_INSTRUCTIONS = (
    "FROM", "PARAMETER", "SYSTEM", "MESSAGE", "TEMPLATE", "LICENSE", "ADAPTER", "DRAFT", "RENDERER", "PARSER",
    "REQUIRES",
)  # fmt: skip
_TRIPLE = '"""'
_SPACES = " \t"
# Ollama's names for the fields of a preset.
_FIELDS = {
    **{name: name for name in CHOOSING if name != "repetition_penalty"}, "repeat_penalty": "repetition_penalty",
    "num_ctx": "context", "num_predict": "max_tokens", "seed": "seed", "stop": "stop", "think": "think",
}  # fmt: skip
# Ollama's parameters that have no meaning here, and why.
_SERVER = "the server plans this for the machine"
_SAMPLER = "Argosy has no such sampler"
_WITHOUT_EFFECT = {
    **dict.fromkeys(
        (
            "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock", "numa", "low_vram", "f16_kv",
            "logits_all", "vocab_only", "num_gqa", "embedding_only", "rope_frequency_base", "rope_frequency_scale",
            "draft_num_predict",
        ),
        _SERVER,
    ),
    **dict.fromkeys(
        ("mirostat", "mirostat_eta", "mirostat_tau", "tfs_z", "typical_p", "penalize_newline"), _SAMPLER
    ),
    "num_keep": "a conversation that does not fit is refused whole, never cut",
    "repeat_last_n": "penalties count the whole prompt and answer",
}  # fmt: skip
_IGNORED = {
    "TEMPLATE": "the model's own chat template is used",
    "RENDERER": "the model's own chat template is used",
    "PARSER": "the model's own format is used",
    "LICENSE": "a preset has no licence of its own",
    "REQUIRES": "it names a version of Ollama",
    "DRAFT": "`--speculate` proposes tokens without a second model",
}


class Imported(NamedTuple):
    """The contents of a Modelfile.

    model: the value of FROM; a path if it exists.
    fields: arguments of `presets.made`.
    notes: a sentence for each instruction without effect.
    """

    model: str
    fields: dict[str, Any]
    notes: list[str]


def read(data: bytes, folder: Path) -> Imported:
    """Read a Modelfile; its relative paths are below `folder`.

    Raises:
        UsageError: it is too large, not text, or says something that a preset cannot express; names the line.
    """
    if len(data) > MOST_BYTES:
        raise UsageError(f"it has more than {MOST_BYTES} bytes, so it is not a Modelfile")
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UsageError(f"it is not UTF-8 text: byte {error.start} is invalid") from None
    reading = _Reading(folder)
    for line, name, value in _instructions(text):
        try:
            reading.take(name, value)
        except UsageError as error:
            raise UsageError(f"line {line}: {error.message}", hint=error.hint) from None
    if reading.model is None:
        raise UsageError("it has no FROM, which names the model")
    return Imported(reading.model, reading.all_fields(), list(reading.notes))


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield the line number, upper-case name and value of each instruction."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    at = 0
    while at < len(lines):
        first, line = at, lines[at].strip(_SPACES)
        at += 1
        if not line or line.startswith("#"):
            continue
        name, rest = _first_word(line)
        if name.upper() not in _INSTRUCTIONS:
            raise UsageError(
                f"line {first + 1}: unknown instruction '{quote(name)}'",
                hint=f"a line begins with {', '.join(_INSTRUCTIONS)}, or with # if it is a comment",
            )
        if not rest:
            raise UsageError(f"line {first + 1}: {name.upper()} needs a value")
        head = ""
        if name.upper() in ("PARAMETER", "MESSAGE"):
            head, rest = _first_word(rest)
        mark = _TRIPLE if rest.startswith(_TRIPLE) else '"' if rest.startswith('"') else ""
        parts, num_characters = [rest], len(rest)
        while mark and not (num_characters >= 2 * len(mark) and parts[-1].endswith(mark)):
            if at == len(lines):
                raise UsageError(f"line {first + 1}: the text that begins with {mark} has no end")
            # Blanks after the closing quotes are not part of the text; all others are.
            part = lines[at].rstrip(_SPACES) if lines[at].rstrip(_SPACES).endswith(mark) else lines[at]
            parts.append(part)
            num_characters += len(part) + 1
            at += 1
        value = "\n".join(parts)
        value = value[len(mark) : len(value) - len(mark)] if mark else value
        yield first + 1, name.upper(), f"{head} {value}" if head else value


def _first_word(text: str) -> tuple[str, str]:
    end = next((at for at, char in enumerate(text) if char in _SPACES), len(text))
    return text[:end], text[end:].strip(_SPACES)


class _Reading:
    """Takes the instructions of a Modelfile, one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._messages: list[dict[str, str]] = []
        self._stops: list[str] = []
        self.model: str | None = None
        self.fields: dict[str, Any] = {}
        self.notes: dict[str, None] = {}  # in order, each once

    def take(self, name: str, value: str) -> None:
        """Apply one instruction; raises UsageError."""
        match name:
            case "FROM":
                self._take_model(value)
            case "PARAMETER":
                self._take_parameter(*value.split(" ", 1))
            case "SYSTEM":
                self.fields["system"] = value or None
            case "MESSAGE":
                role, content = value.split(" ", 1)
                if role.lower() not in presets.ROLES:
                    raise UsageError(f"a message is of {', '.join(presets.ROLES)}, found '{quote(role)}'")
                message = {"role": role.lower(), "content": content}
                self._messages.append(message)
            case "ADAPTER":
                raise UsageError("ADAPTER: adapters are not supported yet")
            case _:
                self.notes[f"{name} has no effect: {_IGNORED[name]}"] = None

    def all_fields(self) -> dict[str, Any]:
        """The arguments of `presets.made` after the last instruction."""
        more = {"stop": tuple(self._stops), "messages": tuple(self._messages)}
        return self.fields | {name: value for name, value in more.items() if value}

    def _take_model(self, value: str) -> None:
        if self.model is not None:
            raise UsageError("a second FROM: a preset has one model")
        path = self._folder / os.path.expanduser(value)
        try:
            self.model = str(path) if "\0" not in value and path.exists() else value
        except OSError:  # too long for a file name
            self.model = value

    def _take_parameter(self, name: str, value: str) -> None:
        name = name.lower()
        if name in _WITHOUT_EFFECT:
            if (name, value) != ("repeat_last_n", "-1"):
                self.notes[f"PARAMETER {name} has no effect: {_WITHOUT_EFFECT[name]}"] = None
            return
        presets.require_known(name, (*_FIELDS, *_WITHOUT_EFFECT))
        field = _FIELDS[name]
        if field == "stop":
            self._stops.append(value)
        elif field == "think":
            self.fields |= _thinking(value)
        elif field in ("max_tokens", "context", "seed", "top_k"):
            # Zero and below mean "to the end of the context", "any seed" and "all tokens".
            number = _whole(name, value)
            least = 1 if field in ("max_tokens", "context") else 0
            self.fields[field] = number if number >= least else 0 if field == "top_k" else None
        else:
            self.fields[field] = _number(name, value)


def _thinking(value: str) -> dict[str, Any]:
    """`PARAMETER think`, which Ollama lacks; it takes the values of `think` in Ollama's requests."""
    if value in EFFORTS:
        return {"thinks": None, "effort": value}
    if value not in ("true", "false"):
        raise UsageError(f"think takes true, false, {', '.join(EFFORTS)}, found '{quote(value)}'")
    return {"thinks": value == "true", "effort": None}


def _whole(name: str, value: str) -> int:
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 20):
        raise UsageError(f"{name} takes a whole number, found '{quote(value)}'")
    return int(value)


def _number(name: str, value: str) -> float:
    try:
        number = float(value) if len(value) <= 64 else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name} takes a number, found '{quote(value)}'")
    return number


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def parameters_of(preset: Preset) -> list[tuple[str, str]]:
    """A preset's settings under Ollama's names; a name may be repeated."""
    facts = presets.facts_of(preset)
    found: list[tuple[str, str]] = []
    for name, field in _FIELDS.items():
        if field == "stop":
            found += [(name, _quoted(stop)) for stop in preset.stop]
        elif field == "think" and (preset.effort is not None or preset.thinks is not None):
            found.append((name, preset.effort or str(preset.thinks).lower()))
        elif field in facts:
            found.append((name, f"{facts[field]}"))
    return found


def written(preset: Preset, model: str) -> str:
    """Write a preset as a Modelfile; `model` is the value of FROM. `read` accepts it if every text `fits`."""
    lines = [f"FROM {model}", *(f"PARAMETER {name} {value}" for name, value in parameters_of(preset))]
    if preset.system is not None:
        lines.append(f"SYSTEM {_quoted(preset.system)}")
    lines += [f"MESSAGE {message['role']} {_quoted(message['content'])}" for message in preset.messages]
    return "\n".join([*lines, ""])


def fits(text: str) -> bool:
    """Whether a Modelfile can hold a text: it has no escapes, and a line that ends with quotes would end the text."""
    try:
        return [value for _, _, value in _instructions(f"SYSTEM {_quoted(text)}")] == [text]
    except UsageError:
        return False


def _quoted(text: str) -> str:
    mark = _TRIPLE if "\n" in text or '"' in text else '"'
    return f"{mark}{text}{mark}"
