"""Answers that follow a grammar: which tokens may come next.

    Grammar -> GrammarCompiler.compile -> Constraint, one for each answer
    logits -> allowed -> sampler -> accept -> allowed -> ... -> is_finished

A grammar is a JSON schema, any JSON object, a regular expression or a Lark grammar; `llguidance` parses it together
with the vocabulary and gives a bit for each token that may come next. A control token never comes as text: only where a
Lark grammar names it. The end token may come when the grammar is complete, and only then.

A grammar is a caller's text, so its size, nesting and repetition, and the work and memory of each step are bounded.
What is beyond a bound fails with its request, alone. The memory plan has room for all of them
(`memory_plan.GRAMMAR_BYTES`).

Elsewhere: masked logits become a token in `sampler.py`; bytes of tokens come from `prompt/tokenizer.py`.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection

import llguidance
import numpy as np
from numpy.typing import NDArray

from argosy.config import Grammar
from argosy.errors import GrammarError, UsageError
from argosy.prompt.tokenizer import Tokenizer

MAX_GRAMMAR_CHARACTERS = 1 << 17
MAX_REGEX_CHARACTERS = 1 << 10  # of an expression, also inside a schema
MAX_NESTING = 64
_MOST_COMPILED = 16

# Forced text is not looked for: an expression can force more of it than memory holds, `(a{1000}){1000}`.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
# A model that has nothing to say writes blank lines for ever where it may; indented JSON has less in one place.
_SCHEMA_OPTIONS = {"whitespace_pattern": r"[ \n\t]{1,40}"}
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,  # 7 ms
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,  # what was generated stays out of messages
)


class Constraint:
    """One answer on its way through a grammar.

    Args:
        matcher: of the grammar, at its beginning.
        vocabulary: what its tokens write.
        trigger: the answer is free until this token id or these bytes are complete; None: it never is.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: _Vocabulary, trigger: int | bytes | None
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._trigger = trigger
        self._tail = b""  # the last bytes of the answer, where the trigger may have begun

    @property
    def is_finished(self) -> bool:
        """Nothing may come any more."""
        return self._trigger is None and bool(self._matcher.is_stopped())

    def allowed(self) -> NDArray[np.bool_] | None:
        """Whether each token of the vocabulary may come next; None while any may.

        Raises:
            GrammarError: the grammar asks for more work than a step may take.
        """
        if self._trigger is not None:
            return None
        num_tokens = len(self._vocabulary.tokens)
        bits = np.zeros(-(-num_tokens // 32), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        _require_sound(self._matcher)
        return np.unpackbits(bits.view(np.uint8), count=num_tokens, bitorder="little").view(np.bool_)

    def accept(self, token_id: int) -> bool:
        """Take the next token of the answer.

        Returns:
            False: the token completes the trigger, and what it writes behind it breaks the grammar. Nothing is taken.

        Raises:
            GrammarError: as `allowed`.
        """
        trigger = self._trigger
        if trigger is None:
            self._matcher.consume_token(token_id)
            _require_sound(self._matcher)
        elif isinstance(trigger, int):
            if token_id == trigger:
                self._trigger = None
        else:
            text = self._tail + self._vocabulary.tokens[token_id]
            before, found, behind = text.partition(trigger)
            if not found:
                self._tail = (
                    before[len(before) - len(trigger) + 1 :] if len(before) >= len(trigger) else before
                )
            elif behind and not self._accept_bytes(behind):
                return False
            else:
                self._trigger = None
        return True

    def _accept_bytes(self, text: bytes) -> bool:
        """Take bytes at the beginning of the grammar, which are the end of a token."""
        ids = [self._vocabulary.id_of_byte.get(byte) for byte in text]
        known = [token_id for token_id in ids if token_id is not None]
        tried = self._matcher.deep_copy()
        if len(known) < len(text) or tried.try_consume_tokens(known) < len(text):
            return False
        self._matcher = tried
        return True


class GrammarCompiler:
    """Compiles grammars for one model, and keeps those used last. Any thread may call it.

    Args:
        vocab_size: of the model: ids beyond the tokenizer's never come.
        end_ids: tokens that end an answer.

    Raises:
        UsageError: no grammar can guide this tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, end_ids: Collection[int]) -> None:
        if not end_ids:
            raise UsageError("this model names no token that ends an answer, so no grammar can guide it")
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, end_ids)
        wrapper = llguidance.TokenizerWrapper(self._vocabulary)
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=sorted(end_ids))
        self._compiled: OrderedDict[tuple[str, str, str], llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar, tenant: str = "") -> Constraint:
        """A grammar at its beginning. Tenants do not share what is kept, so none learns what another asked for.

        Raises:
            GrammarError: it cannot be parsed, is beyond a bound, names a token that is not there, or matches nothing.
        """
        trigger = grammar.trigger
        if isinstance(trigger, int) and not 0 <= trigger < len(self._vocabulary.tokens):
            raise GrammarError(
                f"the trigger is token {trigger}; the vocabulary is 0 to {len(self._vocabulary.tokens) - 1}"
            )
        key = (tenant, grammar.kind, grammar.text)
        with self._lock:
            matcher = self._compiled.get(key)
        if matcher is None:
            matcher = self._start(_lark(grammar))
        with self._lock:
            self._compiled[key] = matcher
            self._compiled.move_to_end(key)
            if len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
        start = trigger.encode() if isinstance(trigger, str) else trigger
        return Constraint(matcher.deep_copy(), self._vocabulary, start)

    def _start(self, lark: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer, _OPTIONS + lark, log_level=0, limits=_LIMITS)
        _require_sound(matcher)
        # The first tokens show what compiling does not: that it is too large to be followed, or matches nothing.
        first = Constraint(matcher.deep_copy(), self._vocabulary, None).allowed()
        if first is None or not first.any():
            raise GrammarError("nothing this model can write follows the grammar")
        return matcher


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        self.tokens = tokenizer.token_bytes(vocab_size)
        self.id_of_byte = {written[0]: at for at, written in enumerate(self.tokens) if len(written) == 1}
        self.eos_token_id = min(end_ids)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(
            token_id for token_id in tokenizer.control_ids | set(end_ids) if token_id < vocab_size
        )

    def __call__(self, text: str) -> list[int]:
        raise AssertionError("nothing is forced, so nothing is tokenized")


def _lark(grammar: Grammar) -> str:
    _require_size(grammar.text)
    if grammar.kind == "json_object":
        return "start: " + _schema_rule({"type": "object"})
    if grammar.kind == "json_schema":
        return f"start: {_parse_schema(grammar.text)}"
    if grammar.kind == "regex":
        _require_expression(grammar.text)
        return f"start: /{llguidance.regex_to_lark(grammar.text)}/"
    if "%llguidance" in grammar.text:
        raise GrammarError("a grammar cannot set options of its own (%llguidance)")
    return _bound_schemas(grammar.text)


def _parse_schema(text: str) -> str:
    try:
        return _schema_rule(json.loads(text))
    except ValueError:
        raise GrammarError("the schema is not JSON") from None
    except RecursionError:
        raise _too_deep() from None


def _schema_rule(schema: object) -> str:
    """A JSON schema as a part of a Lark grammar, within bounds and with our options."""
    if not isinstance(schema, dict | bool):
        raise GrammarError(f"the schema is a {type(schema).__name__}, expected an object")
    _require_bounds(schema)
    options = {"x-guidance": _SCHEMA_OPTIONS}
    return f"%json {json.dumps(schema | options if isinstance(schema, dict) else schema)}"


def _bound_schemas(lark: str) -> str:
    """A Lark grammar, the schemas in it within bounds and with our options."""
    parts, at = [], 0
    for found in re.finditer(r"%json\s*", lark):
        if found.start() < at:
            continue  # text inside a schema
        try:
            schema, end = json.JSONDecoder().raw_decode(lark, found.end())
        except ValueError:
            raise GrammarError("a schema in the grammar is not JSON") from None
        except RecursionError:
            raise _too_deep() from None
        parts += [lark[at : found.start()], _schema_rule(schema)]
        at = end
    return "".join([*parts, lark[at:]])


def _require_size(text: str) -> None:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise GrammarError(
            f"the grammar has {len(text)} characters, and {MAX_GRAMMAR_CHARACTERS} are allowed"
        )


def _require_expression(text: str) -> None:
    if len(text) > MAX_REGEX_CHARACTERS:
        raise GrammarError(
            f"a regular expression has {len(text)} characters, and {MAX_REGEX_CHARACTERS} are allowed"
        )


def _require_bounds(schema: object) -> None:
    """Refuse deep nesting, and long expressions wherever they stand."""
    level: list[object] = [schema]
    for _ in range(MAX_NESTING):
        following: list[object] = []
        for item in level:
            if isinstance(item, dict):
                named = item.get("patternProperties")
                expressions = [item.get("pattern"), *(named if isinstance(named, dict) else ())]
                for expression in expressions:
                    if isinstance(expression, str):
                        _require_expression(expression)
                following += item.values()
            elif isinstance(item, list):
                following += item
        if not following:
            return
        level = following
    raise _too_deep()


def _too_deep() -> GrammarError:
    return GrammarError(f"the schema is nested more than {MAX_NESTING} deep")


def _require_sound(matcher: llguidance.LLMatcher) -> None:
    if matcher.is_error():
        first = (matcher.get_error().splitlines() or ["no reason given"])[0]
        raise GrammarError(f"the grammar cannot be followed: {first[:300]}")
