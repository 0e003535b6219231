"""Answers that follow a grammar: which tokens may come next.

    Grammar -> GrammarCompiler.compile -> Constraint, one for each answer
    logits -> allowed -> sampler -> accept -> allowed -> ... -> is_finished

A grammar is a JSON schema, any JSON object, a regular expression or a Lark grammar. `llguidance` parses it together
with the vocabulary and returns one bit per token that may come next. Text in a grammar never matches a control token;
only a Lark grammar that names the token does. The end token is allowed only when the grammar is complete.

A grammar is a caller's text, so its size, nesting and repetition, and the work and memory of each step are bounded. A
grammar that exceeds a bound fails only its own request. The memory plan has room for all grammars
(`allowances.GRAMMAR_BYTES`).

Small models repeat words or items without end. If the whole answer follows a grammar, a JSON string or array ends
after 512 tokens of exact repetition, later ones after 64; the limits are four times higher for text without letters,
since a grid of numbers legitimately repeats itself. Minimum lengths still hold.

Elsewhere: `grammar_bounds.py` checks the size and nesting of a grammar's text; `engine/sampler.py` turns masked logits
into a token; `prompt/tokenizer.py` provides the bytes of tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from time import monotonic
from weakref import WeakKeyDictionary

import llguidance
import numpy as np
from numpy.typing import NDArray

from argosy.config import LENIENT_SCHEMA, MAX_GRAMMAR_CHARACTERS, Grammar, Trigger, TriggerWord
from argosy.engine.grammar.closed_schema import close_objects
from argosy.engine.grammar.grammar_bounds import (
    read_lark,
    require_expression,
    require_lark_bounds,
    require_schema_bounds,
    require_size,
    too_deep,
)
from argosy.engine.grammar.repeats import Repeats
from argosy.errors import GrammarError, Overloaded, UsageError
from argosy.prompt.formats.lark import expression
from argosy.prompt.tokenizer import Tokenizer

_MOST_COMPILED = 16
# Characters of all kept and running grammars; a character takes at most 250 bytes, measured with agents' tools.
_MOST_CHARACTERS = 2 * MAX_GRAMMAR_CHARACTERS
# Time to find which schemas of a lenient grammar can be enforced; the others are dropped.
_LENIENT_SECONDS = 1.0

# Forced text is not computed: an expression such as `(a{1000}){1000}` can force more text than fits in memory.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# A model with nothing to say writes white space wherever it can. llama.cpp has the same rule, but allows blank lines.
_SCHEMA_OPTIONS: dict[str, object] = {"whitespace_pattern": r" |\n[ \t]{0,20}"}
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=150_000,  # 0.1 s; agents' tools, long lists and Unicode classes need up to a third
    step_lexer_fuel=100_000,  # 7 ms
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,  # keeps generated text out of messages
)

_MOST_REPEATED, _MOST_REPEATED_AGAIN = 512, 64  # tokens; four times as many without letters
_WORDS = re.compile(rb"[A-Za-z\x80-\xff]")

_Key = tuple[str, str, str, bool]  # tenant, kind, text, is_lenient


class Constraint:
    """One answer's position in its grammar.

    Args:
        matcher: the grammar's matcher, at its start.
        vocabulary: the text of each token.
        trigger: the answer is unconstrained until this appears; None: it is constrained from the start.
        is_lenient: a grammar that takes too much work stops constraining its answer instead of failing.
    """

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        vocabulary: _Vocabulary,
        trigger: Trigger | None,
        *,
        is_lenient: bool = False,
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._watch = None if trigger is None else _Watch(trigger)
        self._is_lenient = is_lenient
        self._has_let_go = False
        self._repeats = Repeats() if trigger is None else None
        self._most_repeated = _MOST_REPEATED
        self._ending = b""  # the text that the next tokens must write to end a repetition

    @property
    def is_finished(self) -> bool:
        """Whether the grammar is complete, so that no token may follow."""
        return self._watch is None and not self._has_let_go and bool(self._matcher.is_stopped())

    @property
    def is_waiting(self) -> bool:
        """Whether the trigger has not appeared yet, so that the answer is free text."""
        return self._watch is not None

    def allowed(self) -> NDArray[np.bool_] | None:
        """Return which tokens of the vocabulary may come next, or None while any may.

        Raises:
            GrammarError: the grammar needs more work than one step may take.
        """
        if self._watch is not None or self._has_let_go:
            return None
        num_tokens = len(self._vocabulary.tokens)
        bits = np.zeros(-(-num_tokens // 32), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if not self._is_sound():
            return None
        allowed = np.unpackbits(bits.view(np.uint8), count=num_tokens, bitorder="little").view(np.bool_)
        return self._without_repeats(allowed)

    def _without_repeats(self, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Remove tokens that continue a string or an array that has repeated itself for too long."""
        self._ending = ending = self._ending or self._end_of_repeats()
        if not ending:
            return allowed
        self._most_repeated = _MOST_REPEATED_AGAIN
        tokens = self._vocabulary.tokens
        ids = [
            at for at in np.flatnonzero(allowed)
            if tokens[at].startswith(ending) or (tokens[at] and ending.startswith(tokens[at]))
        ]  # fmt: skip
        narrowed = np.zeros_like(allowed)
        narrowed[ids] = True
        return narrowed

    def _end_of_repeats(self) -> bytes:
        """Return the text that ends a string or an array that has repeated itself for too long; empty if nothing has,
        or if it cannot end within the next token.
        """
        if self._repeats is None or not (ids := self._repeats.cycle(self._most_repeated)):
            return b""
        cycle = [self._vocabulary.tokens[token_id] for token_id in ids]
        text = b"".join(cycle)
        if not _WORDS.search(text) and not self._repeats.cycle(4 * self._most_repeated):
            return b""
        # The grammar shows whether this is inside a string: letters may follow there.
        if (
            b'"' not in text
            and self._may_write(b"z")
            and self._may_write(b'"')
            and not self._may_write(b'"z')
        ):
            return b'"'
        item_end, comma, behind = cycle[0].partition(b",")
        if not comma or not self._may_write(item_end + b"]") or self._may_write(item_end + b"z"):
            return b""
        try:
            json.loads(b"[%b]" % (behind + b"".join(cycle[1:]) + item_end))
        except (ValueError, RecursionError):  # the comma stands inside an item
            return b""
        return item_end + b"]"

    def _may_write(self, text: bytes) -> bool:
        ids = [self._vocabulary.id_of_byte.get(byte) for byte in text]
        known = [token_id for token_id in ids if token_id is not None]
        return len(known) == len(ids) == self._matcher.deep_copy().try_consume_tokens(known)

    def accept(self, token_id: int) -> bool:
        """Take the next token of the answer.

        Returns:
            False if the token completes the trigger but its text breaks the grammar. The token is then not taken.

        Raises:
            GrammarError: as in `allowed`.
        """
        if self._has_let_go:
            return True
        if self._watch is None:
            if self._repeats is not None:
                self._repeats.accept(token_id)
                self._ending = self._ending[len(self._vocabulary.tokens[token_id]) :]
            self._matcher.consume_token(token_id)
            self._is_sound()
            return True
        found = self._watch.find(token_id, self._vocabulary.tokens[token_id])
        if found is not None:
            if not self._begin(token_id, found):
                return False
            self._watch = None
        return True

    def _begin(self, token_id: int, found: _Found) -> bool:
        """Feed the grammar the trigger word, if it includes it, and the text that followed in the same token."""
        written = (found.word if found.is_part else b"") + found.behind
        id_of_byte = self._vocabulary.id_of_byte
        ids = [int(part[1]) if part[1] else id_of_byte.get(part[0][0]) for part in _TOKEN.finditer(written)]
        known = [token_id for token_id in ids if token_id is not None]
        tried = self._matcher.deep_copy()
        if len(known) < len(ids) or tried.try_consume_tokens(known) < len(ids):
            return False
        self._matcher = tried
        return True

    def _is_sound(self) -> bool:
        """Whether the grammar can still be followed."""
        if self._matcher.is_error() and self._is_lenient:
            self._has_let_go = True
            return False
        _require_sound(self._matcher)
        return True


@dataclass(frozen=True, slots=True)
class _Found:
    """A completed trigger word, and the text that its last token wrote after it."""

    word: bytes
    behind: bytes
    is_part: bool


class _Watch:
    """Watches the tokens of an answer for a trigger."""

    def __init__(self, trigger: Trigger) -> None:
        self._trigger = trigger
        self._is_paused = trigger.is_paused
        self._tail = b""  # the last bytes of the answer, in which a word may have begun
        self._starts = {_written(word) for word in trigger.words}
        self._ids = {
            part for word in trigger.all_words for part in trigger.parts_of(word) if isinstance(part, int)
        }
        self._waiting = _Words((*trigger.words, *trigger.pauses))
        self._paused = _Words(trigger.resumes)

    def find(self, token_id: int, text: bytes) -> _Found | None:
        """Return the trigger if this token completes it. The state is then unchanged: the token may be taken back."""
        is_paused = self._is_paused
        words = self._paused if is_paused else self._waiting
        text = self._tail + (_written(token_id) if token_id in self._ids else text)
        while (found := words.search(text)) is not None:
            word, text = found[0], text[found.end() :]
            if not is_paused and word in self._starts:
                return _Found(word, text, self._trigger.is_part)
            is_paused = not is_paused
            words = self._paused if is_paused else self._waiting
        self._is_paused = is_paused
        self._tail = text[len(text) - words.num_held :] if len(text) > words.num_held else text
        return None


# A token in the text that is searched for words, between bytes that occur in no UTF-8; or else any byte
_TOKEN = re.compile(rb"\xff(\d{1,9})\xfe|.", re.DOTALL)


def _written(word: TriggerWord) -> bytes:
    parts = Trigger.parts_of(word)
    return b"".join(part.encode() if isinstance(part, str) else b"\xff%d\xfe" % part for part in parts)


class _Words:
    """Searches for several words at once; if two match at the same place, the longer one wins."""

    def __init__(self, words: Sequence[TriggerWord]) -> None:
        texts = sorted(map(_written, words), key=len, reverse=True)
        self.num_held = len(texts[0]) - 1 if texts else 0  # bytes that may start a word
        self._pattern = re.compile(b"|".join(map(re.escape, texts))) if texts else None

    def search(self, text: bytes) -> re.Match[bytes] | None:
        return None if self._pattern is None else self._pattern.search(text)


class GrammarCompiler:
    """Compiles grammars for one model and keeps the most recently used. Any thread may call it.

    Args:
        vocab_size: the model's vocabulary size; ids beyond the tokenizer's are never allowed.
        end_ids: tokens that end an answer.

    Raises:
        UsageError: this tokenizer cannot be used with grammars.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: Collection[int]) -> None:
        if not end_ids:
            raise UsageError("this model has no end token, so it cannot follow a grammar")
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, end_ids)
        wrapper = llguidance.TokenizerWrapper(self._vocabulary)
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=sorted(end_ids))
        self._compiled: OrderedDict[_Key, llguidance.LLMatcher] = OrderedDict()
        self._followed: WeakKeyDictionary[Constraint, _Key] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar, tenant: str = "") -> Constraint:
        """Compile a grammar and return it at its start. Tenants never share compiled grammars, so none learns about
        another's.

        Raises:
            GrammarError: the grammar cannot be parsed, exceeds a bound, names an unknown token, or matches nothing.
            Overloaded: the grammars of running answers take all the room. A lenient grammar drops its schemas instead.
        """
        for word in () if grammar.trigger is None else grammar.trigger.all_words:
            for part in Trigger.parts_of(word):
                if isinstance(part, int) and not 0 <= part < len(self._vocabulary.tokens):
                    raise GrammarError(
                        f"the trigger is token {part}; the vocabulary is 0 to {len(self._vocabulary.tokens) - 1}"
                    )
        if not grammar.is_lenient:  # a grammar too large for any room must not be told to retry
            require_size(grammar.text)
        key = (tenant, grammar.kind, grammar.text, grammar.is_lenient)
        with self._lock:
            matcher = self._compiled.get(key)
            has_room = matcher is not None or self._make_room(grammar.text)
        if matcher is None:
            matcher = self._compile(grammar) if has_room else self._compile_without_room(grammar)
        constraint = Constraint(
            matcher.deep_copy(), self._vocabulary, grammar.trigger, is_lenient=grammar.is_lenient
        )
        if has_room:
            with self._lock:
                self._compiled[key] = matcher
                self._compiled.move_to_end(key)
                self._followed[constraint] = key
        return constraint

    def _make_room(self, text: str) -> bool:
        """Forget the least recently used grammars that no answer follows, until there is room for one more."""
        followed = set(self._followed.values())
        left = _MOST_CHARACTERS - len(text) - sum(len(key[2]) for key in {*self._compiled, *followed})
        for key in list(self._compiled):
            if left >= 0 and len(self._compiled) < _MOST_COMPILED:
                break
            if key not in followed:
                del self._compiled[key]
                left += len(key[2])
        return left >= 0

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        until = monotonic() + _LENIENT_SECONDS

        def is_bearable(rule: str) -> bool:
            if monotonic() > until:
                return False
            try:
                self._start(f"start: {rule}")
            except GrammarError:
                return False
            return True

        try:
            return self._start(_lark(grammar, _Schemas(is_lenient=grammar.is_lenient)))
        except GrammarError:
            if not (grammar.is_lenient or LENIENT_SCHEMA in grammar.text):
                raise
        try:
            return self._start(_lark(grammar, _Schemas(is_lenient=grammar.is_lenient, is_kept=is_bearable)))
        except GrammarError:
            return self._compile_without_schemas(grammar)

    def _compile_without_room(self, grammar: Grammar) -> llguidance.LLMatcher:
        if not grammar.is_lenient:
            raise Overloaded(
                "the grammars of running answers take all the memory for grammars", retry_after_s=5
            )
        return self._compile_without_schemas(grammar)

    def _compile_without_schemas(self, grammar: Grammar) -> llguidance.LLMatcher:
        """Compile with only those schemas that must not be dropped."""
        return self._start(
            _lark(grammar, _Schemas(is_lenient=grammar.is_lenient, is_kept=lambda rule: False))
        )

    def clear(self) -> None:
        """Forget all grammars."""
        with self._lock:
            self._compiled.clear()

    def forget(self, tenant: str) -> None:
        with self._lock:
            for key in [key for key in self._compiled if key[0] == tenant]:
                del self._compiled[key]

    def _start(self, lark: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, _OPTIONS + lark, log_level=0, limits=_LIMITS)
        _require_sound(matcher)
        # Only the first mask shows whether the grammar takes too much work or matches nothing.
        first = Constraint(matcher.deep_copy(), self._vocabulary, None).allowed()
        if first is None or not first.any():
            raise GrammarError("the grammar matches nothing that this model can write")
        return matcher


class _Vocabulary:
    """The tokenizer interface that llguidance expects."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.id_of_byte = {written[0]: at for at, written in enumerate(self.tokens) if len(written) == 1}
        self.eos_token_id = min(end_ids)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(
            token_id for token_id in tokenizer.control_ids | set(end_ids) if token_id < vocab_size
        )

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("no text is forced, so no text is tokenized")


def _lark(grammar: Grammar, schemas: _Schemas) -> str:
    if grammar.kind == "json_object":
        return "start: " + schemas.rule({"type": "object"})
    if grammar.kind == "json_schema":
        require_size(grammar.text)
        return f"start: {schemas.rule(_parse_schema(grammar.text))}"
    if grammar.kind == "regex":
        require_size(grammar.text)
        require_expression(grammar.text)
        return f"start: {expression(grammar.text)}"
    return schemas.bind(grammar.text)


def _parse_schema(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        raise GrammarError("the schema is not JSON") from None
    except RecursionError:
        raise too_deep() from None


class _Schemas:
    """Writes JSON schemas as parts of a Lark grammar, within bounds and with our options.

    Args:
        is_lenient: drop keywords that cannot be enforced from every schema; otherwise only from schemas marked lenient.
        is_kept: whether a lenient schema, written as a rule, may stay; otherwise a rule for any JSON replaces it.
    """

    def __init__(self, *, is_lenient: bool, is_kept: Callable[[str], bool] = lambda rule: True) -> None:
        self._is_lenient = is_lenient
        self._is_kept = is_kept

    def rule(self, schema: object) -> str:
        if not isinstance(schema, dict | bool):
            raise GrammarError(f"the schema is a {type(schema).__name__}, expected an object")
        is_lenient = self._is_lenient
        if isinstance(schema, dict) and LENIENT_SCHEMA in schema:
            schema = {key: part for key, part in schema.items() if key != LENIENT_SCHEMA}
            is_lenient = True
        try:
            require_schema_bounds(schema)
            schema = close_objects(schema)
            require_schema_bounds(schema)  # closed copies of definitions lengthen the chains
        except GrammarError:
            if not is_lenient:
                raise
        else:
            if not is_lenient or self._is_kept(self._json(schema, is_lenient)):
                return self._json(schema, is_lenient)
        is_object = isinstance(schema, dict) and schema.get("type") == "object"
        return self._json({"type": "object"} if is_object else {}, is_lenient)

    @staticmethod
    def _json(schema: object, is_lenient: bool) -> str:
        options = {"x-guidance": _SCHEMA_OPTIONS | ({"lenient": True} if is_lenient else {})}
        return f"%json {json.dumps(schema | options if isinstance(schema, dict) else schema)}"

    def bind(self, lark: str) -> str:
        """Write a Lark grammar, with the same bounds and options for each schema inside it."""
        lexemes = read_lark(lark)
        require_lark_bounds(lexemes)
        parts, at = [], 0
        for lexeme in lexemes:
            if lexeme.text == "%llguidance":
                raise GrammarError("a grammar cannot set its own options (%llguidance)")
            if lexeme.text == "%json":
                parts += [lark[at : lexeme.at], self.rule(lexeme.schema)]
                at = lexeme.end
        whole = "".join([*parts, lark[at:]])
        require_size(whole)
        return whole


def _require_sound(matcher: llguidance.LLMatcher) -> None:
    if matcher.is_error():
        first = (matcher.get_error().splitlines() or ["no reason given"])[0]
        raise GrammarError(f"the grammar cannot be followed: {first[:300]}")
