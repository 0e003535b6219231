"""Converts text to token ids and back, using the files of a model directory or a GGUF's metadata.

    caller's text   ->  encode           ->  ids, never a control token
    segments        ->  encode_segments  ->  ids, control tokens only where the template wrote them
    one id at a time -> StreamDecoder    ->  text, in whole characters

A control token is an added token (`<|im_end|>`, `<think>`, special or not), BOS, EOS or padding. A caller's text
that spells one is encoded with ordinary tokens that spell the same. Text that spells none gets the ids that
`tokenizers` gives for the whole, across segment boundaries, so the model sees the ids it was trained on.

`tokenizers` takes hundreds of bytes of memory per byte of text. A long text is therefore encoded piece by piece,
one long text at a time, and no further than `max_tokens`.

Elsewhere: segments come from `chat.py`; `text_pieces.py` finds where to cut a text; stop strings are in `stop.py`.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from argosy.checkpoint.gguf import GgufFile, read_gguf
from argosy.checkpoint.gguf_names import GGUF_METADATA_FILE, find_gguf
from argosy.checkpoint.untrusted_file import read_object
from argosy.errors import CheckpointError, PromptTooLong, UsageError
from argosy.prompt.folding import fold_tokens
from argosy.prompt.own_templates import own_template, with_pictures
from argosy.prompt.stream_decoder import Pieces, StreamDecoder, pieces_of
from argosy.prompt.text_pieces import PIECE_CHARACTERS, Cutter, LongestToken

TOKENIZER_FILE = "tokenizer.json"
TIKTOKEN_FILES = ("tiktoken.model", "hy.tiktoken")  # Kimi's, Hunyuan's
TEKKEN_FILE = "tekken.json"

_MAX_FILE_BYTES = 256 << 20
_MAX_TEMPLATE_CHARACTERS = 1 << 20
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_one_large_text = threading.Lock()

Segment = tuple[bool, str]
"""(is the caller's, text): a part of a rendered conversation and its author."""


def text_of(segments: Iterable[Segment]) -> str:
    """The full text of `segments`."""
    return "".join(text for _, text in segments)


class Control(NamedTuple):
    """A control token found in a text, with its id and position."""

    token_id: int
    start: int
    stop: int


class Tokenizer:
    """One model's tokenizer; `Tokenizer.open` makes it.

    Attributes:
        vocab_size: ids range from 0 to `vocab_size - 1`; a model's own vocabulary may be padded beyond that.
        eos_ids: ids that end an answer.
        bos_id: id that starts a text, or None.
        unk_id: id for text without any other id, or None; a text may contain it but cannot spell it.
        prefix_ids: ids before a raw text: BOS where the model's files ask for it.
        suffix_ids: ids after a whole text, which nothing continues: EOS where the model's files ask for it.
        control_ids: ids that only a template may produce.
        special_tokens: `bos_token`, `eos_token` and others as the model's files spell them, for templates.
        chat_template: source of the chat template, or None.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        config: Mapping[str, Any] | None = None,
        generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> None:
        config = config or {}
        self._core = core
        core.no_truncation()
        core.no_padding()
        self._added = dict(core.get_added_tokens_decoder())
        self._content = {token_id: str(token.content) for token_id, token in self._added.items()}
        self.vocab_size = max(core.get_vocab_size(with_added_tokens=True), max(self._added, default=-1) + 1)
        self.special_tokens = {
            name: text for name in _NAMED if (text := _token_text(config.get(name))) is not None
        }
        self.bos_id = self._id_of("bos_token")
        self.unk_id = self._find_unk()
        self.eos_ids = self._eos_ids(generation_config or {})
        named = {self.bos_id, self._id_of("pad_token"), *self.eos_ids} - {None, self.unk_id}
        # An added token of only white space (runs of spaces, in code) cannot be mistaken for a marker, nor can one
        # character: DeepSeek-LLM's vocabulary has letters such as "ö" only there.
        written = {
            i for i, token in self._added.items()
            if token.special or (self._content[i].strip() and len(self._content[i]) > 1)
        }  # fmt: skip
        self.control_ids: frozenset[int] = frozenset(named | written)  # type: ignore[arg-type]
        self.hidden_ids = frozenset(i for i, token in self._added.items() if token.special) | set(
            self.eos_ids
        )
        self.chat_template = chat_template
        self.prefix_ids, self.suffix_ids = self._affixes(config)
        self._template_controls = functools.lru_cache(maxsize=1024)(self._find_template_controls)

    @classmethod
    def open(cls, path: Path | str, header: GgufFile | None = None) -> Tokenizer | None:
        """Read the tokenizer and its accompanying files from a directory, or from a GGUF's metadata; None if there
        is none.

        Args:
            path: a `.gguf` file, or a model's directory.
            header: an already parsed GGUF header, used if it belongs to the same file.

        Raises:
            CheckpointError: a file cannot be parsed, or is larger than any tokenizer.
            UnsupportedModel: a GGUF or a `tiktoken.model` describes an unsupported kind of tokenizer.
        """
        path = Path(path)
        if not path.is_dir():
            return cls._of_gguf(path, header)
        if (path / GGUF_METADATA_FILE).is_file():
            return cls._of_gguf(path / GGUF_METADATA_FILE, header)
        if _has_tokenizer(path):
            return cls._of_directory(path)
        gguf = find_gguf(path)
        return None if gguf is None else cls._of_gguf(gguf, header)

    @classmethod
    def _of_gguf(cls, path: Path, header: GgufFile | None) -> Tokenizer | None:
        # Imported here, because rebuilding a tokenizer needs more modules than reading tokenizer.json.
        from argosy.checkpoint.vocabulary.gguf_tokenizer import read_tokenizer

        file = header if header is not None and header.path == path else read_gguf(path)
        read = read_tokenizer(file)
        if read is None:
            return None
        return cls(
            read.core,
            config=read.config,
            generation_config={"eos_token_id": list(read.eos_ids)},
            chat_template=_checked_template(read.chat_template, path),
        )

    @classmethod
    def _of_directory(cls, directory: Path) -> Tokenizer:
        core, config = _read_core(directory, _read_optional(directory / "tokenizer_config.json"))
        try:
            return cls(
                core,
                config=config,
                generation_config=_read_optional(directory / "generation_config.json"),
                chat_template=_read_template(directory, config),
            )
        except _BadField as error:
            raise CheckpointError(f"{directory}: {error}", path=directory) from None

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._core.token_to_id(text)

    def _find_unk(self) -> int | None:
        """The id for text without any other id, found by encoding a character that does not exist."""
        tokens = self._core.model.tokenize("\U000e0fff")
        found = tokens[0].id if len(tokens) == 1 else None
        return found if found in self._added else self._id_of("unk_token")

    def _eos_ids(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        listed = generation_config.get("eos_token_id")
        listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in listed):
            raise _BadField(f"generation_config.json: eos_token_id is {listed}, expected ids")
        own = self._id_of("eos_token")
        return tuple(sorted({*listed, *([] if own is None else [own])}))

    def _affixes(self, config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        bare = self._core.encode("a", add_special_tokens=False).ids
        full = self._core.encode("a", add_special_tokens=True).ids
        added = next((at for at in range(len(full)) if full[at : at + len(bare)] == bare), 0)
        prefix, suffix = tuple(full[:added]), tuple(full[added + len(bare) :])
        if (asked := config.get("add_bos_token")) is not None:
            prefix = (self.bos_id,) if asked and self.bos_id is not None else ()
        if (
            config.get("add_eos_token") is True
            and not suffix
            and (eos := self._id_of("eos_token")) is not None
        ):
            suffix = (eos,)
        return prefix, suffix

    def encode(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """The ids of a caller's text, never including a control token, whatever the text spells.

        Raises:
            PromptTooLong: there are more than `max_tokens`.
            UsageError: the text contains a lone surrogate, a character that this tokenizer can only write as a
                control token, or a run longer than any word without a place to cut.
        """
        return self.encode_segments([(True, text)], max_tokens=max_tokens)

    def encode_start(self, text: str, num_tokens: int) -> list[int]:
        """The first `num_tokens` ids of a caller's text, or all of them; the rest of a long text is not encoded.

        Raises what `encode` raises for that part, except PromptTooLong.
        """
        if len(text) > PIECE_CHARACTERS:
            with _one_large_text:
                end = num_found = 0
                for start, piece in self._cutter.pieces(text, self._bare_ids):
                    end = start + len(piece)
                    num_found += len(self._bare_ids(piece))
                    if num_found >= num_tokens:
                        break
            text = text[:end]
        return self.encode(text)[:num_tokens]

    def encode_later(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """The ids of a caller's text without the space that SentencePiece puts before a text. Raises what `encode`
        raises.

        As in mistral-common, the text is encoded after a symbol whose ids are then dropped.
        """
        if not self.token_text(self.encode("a")[0]).startswith("▁"):
            return self.encode(text, max_tokens=max_tokens)
        symbol = self.encode("☺")
        most = None if max_tokens is None else max_tokens + len(symbol)
        return self.encode("☺" + text, max_tokens=most)[len(symbol) :]

    def encode_segments(self, segments: Sequence[Segment], *, max_tokens: int | None = None) -> list[int]:
        """The ids of a rendered conversation as one text; only the template's own text produces control tokens.

        A control token counts only if the template's text between two caller texts has it at that place when
        encoded alone. A caller therefore can neither add a control token (not even by completing one that the
        template began) nor break one. Raises what `encode` raises.
        """
        whole = text_of(segments)
        if len(whole) <= PIECE_CHARACTERS:
            return self._encode_segments(segments, whole, max_tokens)
        self._require_possible(whole, max_tokens)
        with _one_large_text:
            return self._encode_segments(segments, whole, max_tokens)

    def _require_possible(self, text: str, max_tokens: int | None) -> None:
        """Refuse a text that is bound to exceed `max_tokens`, before encoding any of it."""
        longest = self._longest_token
        if max_tokens is None or longest is None or not longest.holds_for(text):
            return
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError:
            raise _half_a_character() from None
        at_least = -(-num_bytes // longest.num_bytes)
        if at_least > max_tokens:
            raise PromptTooLong.of(at_least, max_tokens + 1, is_all=False)

    @functools.cached_property
    def _longest_token(self) -> LongestToken | None:
        return LongestToken.of(self._core)

    @functools.cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self._core)

    def _encode_segments(self, segments: Sequence[Segment], whole: str, max_tokens: int | None) -> list[int]:
        wanted = self.template_controls(segments)
        ids: list[int] = []
        found: list[Control] = []
        end = 0
        for start, piece in self._cutter.pieces(whole, self._bare_ids):
            more, controls = self._encode_all(piece)
            ids += more
            found += (Control(token_id, start + a, start + b) for token_id, a, b in controls)
            end = start + len(piece)
            if max_tokens is not None and len(ids) > max_tokens:
                break
        if self._cores(found, whole) == self._cores((c for c in wanted if c.start < end), whole):
            _require_at_most(max_tokens, ids, is_all=end == len(whole))
            return ids
        ids, at = [], 0
        for token_id, start, stop in wanted:
            for more in self._encode_plain(whole[at:start], is_start=at == 0):
                ids += more
                _require_at_most(max_tokens, ids, is_all=False)
            ids.append(token_id)
            at = stop
        for more in self._encode_plain(whole[at:], is_start=at == 0):
            ids += more
            _require_at_most(max_tokens, ids, is_all=False)
        return ids

    def template_controls(self, segments: Sequence[Segment]) -> list[Control]:
        """The control tokens that the template wrote, with their positions in the whole text."""
        wanted: list[Control] = []
        at = 0
        for is_callers, run in groupby(segments, key=lambda segment: segment[0]):
            text = "".join(part for _, part in run)
            if not is_callers:
                own = self._template_controls(text)
                wanted += [Control(token_id, at + start, at + stop) for token_id, start, stop in own]
            at += len(text)
        return wanted

    def _encode_all(self, text: str) -> tuple[list[int], list[Control]]:
        """The ids with control tokens allowed everywhere, and the positions of the control tokens."""
        encoding = self._encoding(text)
        ids: list[int] = encoding.ids
        if self.control_ids.isdisjoint(ids):
            return ids, []
        spans = zip(ids, encoding.offsets, strict=True)
        controls = [Control(token_id, *span) for token_id, span in spans if token_id in self.control_ids]
        # The unknown token stands for any text without a token; it is a marker only if the text spells it.
        return ids, [
            c
            for c in controls
            if c[0] != self.unk_id or self._content.get(c[0], "") in text[c.start : c.stop]
        ]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            # A batch of one, because `encode` holds the GIL throughout and `encode_batch` does not.
            return self._core.encode_batch([text], add_special_tokens=False)[0]
        except TypeError:  # raised for a string that is not valid Unicode
            raise _half_a_character() from None

    def _bare_ids(self, text: str) -> list[int]:
        ids: list[int] = self._encoding(text).ids
        return ids

    def _find_template_controls(self, text: str) -> tuple[Control, ...]:
        return tuple(self._encode_all(text)[1])

    @staticmethod
    def _cores(controls: Iterable[Control], text: str) -> list[Control]:
        """The same controls without the white space that a token may absorb on either side."""
        cores = []
        for token_id, start, stop in controls:
            span = text[start:stop]
            first = start + len(span) - len(span.lstrip())
            cores.append(Control(token_id, first, first + len(span.strip())))
        return cores

    def _encode_plain(self, text: str, *, is_start: bool) -> Iterator[list[int]]:
        """Ids of a text that contains no markers, piece by piece."""
        for start, piece in self._cutter.pieces(text, self._plain_ids):
            yield self._plain_ids(piece, is_start=is_start or start > 0)

    def _plain_ids(self, text: str, is_start: bool = True) -> list[int]:
        """Perform the steps of `tokenizers` without its added tokens."""
        if not text:
            return []
        core = self._core
        if core.normalizer is not None:
            text = core.normalizer.normalize_str(text)
        splitter = core.pre_tokenizer if is_start else self._later_pre_tokenizer
        words = [text] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
        return [token_id for word in words for token_id in self._encode_word(word)]

    @functools.cached_property
    def _later_pre_tokenizer(self) -> Any:
        """The pre-tokenizer after the start of a text, where `prepend_scheme: first` no longer applies."""
        own = self._core.pre_tokenizer
        if own is None:
            return None
        state = own.__getstate__()
        later = state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"')
        if later == state:
            return own
        # Copied through a tokenizer without a vocabulary; the state has the structure of tokenizer.json.
        empty = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
        return tokenizers.Tokenizer.from_str(
            json.dumps({**empty, "pre_tokenizer": json.loads(later)})
        ).pre_tokenizer

    def _encode_word(self, word: str) -> list[int]:
        """The ids of one pre-tokenizer word. A vocabulary may contain a marker as a word, so the word is cut there."""
        ids = [token.id for token in self._core.model.tokenize(word)]
        markers = {self.token_text(token_id) for token_id in self.control_ids.intersection(ids)}
        if self.unk_id is not None and (unknown := self.token_text(self.unk_id)) not in word:
            markers.discard(unknown)
        if not markers:
            return ids
        starts = re.finditer("|".join(f"(?={re.escape(marker)})" for marker in markers), word)
        cuts = [0, *sorted({start.start() + 1 for start in starts} - {len(word)}), len(word)]
        if len(cuts) == 2:
            shown = "', '".join(sorted(markers))
            raise UsageError(f"the text holds '{shown}', which this model can only read as a control token")
        pieces = (word[start:stop] for start, stop in pairwise(cuts))
        return [token_id for piece in pieces for token_id in self._encode_word(piece)]

    def decode(self, token_ids: Iterable[int], *, keep_special: bool = False) -> str:
        """The text of `token_ids`; special tokens are omitted unless `keep_special`."""
        stream = self.stream(keep_special=keep_special)
        return "".join([*map(stream.push, token_ids), stream.finish()])

    def control_id(self, text: str) -> int | None:
        """The id of the control token spelled `text`, or None."""
        return self._control_by_text.get(text)

    @property
    def control_texts(self) -> Iterable[str]:
        """How the control tokens are spelled."""
        return self._control_by_text

    @functools.cached_property
    def _control_by_text(self) -> dict[str, int]:
        return {self._content.get(i, self.token_text(i)): i for i in self.control_ids}

    def token_text(self, token_id: int) -> str:
        """The vocabulary's spelling of a token, or '' if the id has none."""
        return self._core.id_to_token(token_id) or ""

    def fold(self) -> NDArray[np.int32]:
        """Return the folded id of each token (`folding.py`); it takes three seconds for 130,000 tokens."""
        return fold_tokens(self._core)

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes in the vocabulary, perhaps only part of a character; b"" if the id has none.

        The bytes of a text's tokens add up to the text, apart from the space that SentencePiece puts before it.

        Raises:
            UsageError: the bytes of a token depend on its neighbours.
        """
        literal = self._content.get(token_id)
        if literal is not None:
            return literal.encode()
        token = self._core.id_to_token(token_id)
        return b"" if token is None else self._pieces.bytes_of(token)

    @functools.cached_property
    def _pieces(self) -> Pieces:
        return pieces_of(self._core)

    def stream(self, *, keep_special: bool = False, is_start: bool = True) -> StreamDecoder:
        """A decoder for one id at a time; `is_start`: at the start of a text, not in its continuation."""
        added = dict(self._content)
        hidden = frozenset() if keep_special else self.hidden_ids
        return StreamDecoder(self._core, added, hidden, is_start=is_start)


def _require_at_most(max_tokens: int | None, ids: Sequence[int], *, is_all: bool) -> None:
    if max_tokens is not None and len(ids) > max_tokens:
        raise PromptTooLong.of(len(ids), max_tokens + 1, is_all=is_all)  # plus one token for the answer


def _half_a_character() -> UsageError:
    return UsageError("the text holds half a character (a lone surrogate)")


class _BadField(ValueError):
    """An invalid field in a tokenizer's files."""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _token_text(value: Any) -> str | None:
    """A special token's spelling, which the files give as a string or an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise _BadField(f"tokenizer_config.json: a special token is {value!r}, expected text")
    return value


def _read_optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (TOKENIZER_FILE, *TIKTOKEN_FILES, TEKKEN_FILE))


def _read_core(directory: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Read a directory's tokenizer, and complete the contents of its tokenizer_config.json.

    Mistral's own file takes precedence over `tokenizer.json`, and that over `TIKTOKEN_FILES`.
    """
    if (directory / TEKKEN_FILE).is_file():
        from argosy.checkpoint.vocabulary.tekken import read_tekken

        core, named = read_tekken(directory / TEKKEN_FILE)
        return core, named | config
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        from argosy.checkpoint.vocabulary.tiktoken_model import read_tiktoken

        ranks = next(path for name in TIKTOKEN_FILES if (path := directory / name).is_file())
        return read_tiktoken(ranks, config), config
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes, more than {_MAX_FILE_BYTES}", path=path)
    try:
        return tokenizers.Tokenizer.from_buffer(path.read_bytes()), config  # the path need not be UTF-8
    except Exception as error:  # the package raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer: {_first_line(error)}", path=path) from None


def has_chat_template(directory: Path) -> bool:
    """Whether a directory has a chat template for its tokenizer. Unlike opening the tokenizer (0.1 s), this is
    cheap.

    A GGUF may still have a template, because its metadata is read with its tokenizer.
    """
    if not _has_tokenizer(directory):
        return False
    return _read_template(directory, _read_optional(directory / "tokenizer_config.json")) is not None


def _read_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template, from its own file or from a field of tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    try:
        template = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8", path=path) from None
    if isinstance(template, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    if template is None:
        template = own_template(
            _read_optional(directory / "config.json").get("model_type"), _added_tokens(config)
        )
    return _checked_template(template, directory)


def _added_tokens(config: Mapping[str, Any]) -> set[str]:
    added = config.get("added_tokens_decoder")
    tokens = added.values() if isinstance(added, Mapping) else ()
    return {str(token.get("content")) for token in tokens if isinstance(token, Mapping)}


def _checked_template(template: object, path: Path) -> str | None:
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{path}: chat_template is not text", path=path)
    if template is not None and len(template) > _MAX_TEMPLATE_CHARACTERS:
        raise CheckpointError(
            f"{path}: the chat template has {len(template)} characters, more than {_MAX_TEMPLATE_CHARACTERS}",
            path=path,
        )
    return None if template is None else with_pictures(template)
