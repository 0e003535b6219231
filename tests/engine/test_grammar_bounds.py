"""A caller's grammar may describe text, but not tokens, options or anything outside itself."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest

from argosy.config import Grammar
from argosy.engine.grammar.constraint import GrammarCompiler
from argosy.engine.grammar.grammar_bounds import (
    MAX_CALLERS_CHARACTERS,
    MAX_REGEX_CHARACTERS,
    read_lark,
    require_plain,
)
from argosy.errors import GrammarError
from argosy.prompt.tokenizer import Tokenizer
from tests.engine.test_constraint import VOCAB, byte_level, run_on_a_small_stack, text_of, walk

TAKEN = {
    "words": 'start: "a" | "b"i',
    "rules": "start: sum\n?sum: part (\"+\" part)*\n!part: /[0-9]{1,3}/ | \"(\" sum \")\" -> nested\n",
    "terminals": "start: WORD~2..3\nWORD: /[a-z]+/ & /.{1,4}/ # no more\n",
    "imports": "%import common.INT // a number\n%ignore / {1,3}/\nstart: INT+ \";\"",
    "a look of something else": 'start: "<|im_end|>" /%json \\{|~|@a|\\(/ "\\"%llguidance" "//" "#"',
    "over lines": 'start: "a"\n     | "b"\n\n     | ("c" "d")?  "e"{2,3}',
}  # fmt: skip
REFUSED = {
    "a token by name": ('start: <|im_end|> "x"', "line 1 of the grammar: '<|im_end|>' names a token"),
    "a token by id": ('start: "x"\n  | <[1-7]>', "line 2 of the grammar: '<[1-7]>' names a token"),
    "any token": ("start: <[*]>", "names a token"),
    "what is no text": ("start: A\nA: ~/x/", "'~' may match bytes that are not text"),
    "a schema": ('start: %json {"type": "string"}', "'%json' is not allowed here"),
    "a broken schema": ("start: %json {", "a schema in the grammar is not JSON"),
    "a structured expression": ('start: %regex {"substring_chars": "abc"}', "'%regex' is not allowed here"),
    "options": ('%llguidance {"no_forcing": false}\nstart: "x"', "'%llguidance' is not allowed here"),
    "a grammar inside": ('start: %lark {\nstart: "x"\n}', "'%lark' is not allowed here"),
    "a grammar elsewhere": ("start: @other", "'@other' refers to another grammar"),
    "a file": ("%import .files.secret (start)\nstart: start", "'%import' is not allowed here"),
    "an address": ("%import http.example\nstart: example", "'%import' is not allowed here"),
    "what is declared": ('%declare A\nstart: "x"', "'%declare' is not allowed here"),
    "a condition": ('start: a::0\na::_: "x"', "'::' gives a rule a parameter"),
    "options of a rule": ('start[stop="x"]: /.*/', "'start' is followed by options"),
    "a priority": ('start.2: "x"', "'start' is followed by options"),
    "an end too early": ('start: "x"\n}\nr: "y"', "'}' closes a bracket that is not open"),
    "no end": ('start: ("x"', "an unclosed bracket"),
    "half a text": ('start: "x', "'\"' is not valid Lark"),
    "half an expression": ("start: /x", "'/' is not valid Lark"),
    "another language": ('root ::= "x"', "'root' is followed by options"),
    "no start": ('begin: "x"', "the grammar has no rule 'start'"),
    "a long expression": (f"start: /{'a' * (MAX_REGEX_CHARACTERS + 1)}/", "1024 are allowed"),
    "a long text": ("#" * (MAX_CALLERS_CHARACTERS + 1), "32768 are allowed"),
    "deep brackets": ("start: " + "(" * 16_000 + '"a"' + ")" * 16_000, "400 are allowed"),
    "a chain of rules": (
        "start: a0\n" + "".join(f"a{at}: a{at + 1}\n" for at in range(2400)) + 'a2400: "x"', "400 are allowed",
    ),
    "a chain of terminals": (
        "start: A0\n" + "".join(f"A{at}: A{at + 1}\n" for at in range(2400)) + 'A2400: "x"', "400 are allowed",
    ),
    "a chain that is named from its end": (
        "start: " + " | ".join(f"A{at}" for at in range(900, -1, -1)) + "\n"
        + "".join(f'A{at}: "b" A{at + 1}?\n' for at in range(900)) + 'A900: "x"', "400 are allowed",
    ),
}  # fmt: skip
# These pass the bounds on the text; their cost is bounded when they are compiled and followed.
BOMBS = {
    "repetition": 'start: a{2000000000}\na: "x"',
    "repetition of repetition": "start: (a{1000}){1000}\na: b{1000}\nb: /(c{1000}){1000}/",
    "repeated terminals": "start: A{1000}\nA: B{1000}\nB: C{1000}\nC: /c/",
    "doubled terminals": "start: A0\n" + "".join(f"A{at}: A{at + 1} A{at + 1}\n" for at in range(40)) + 'A40: "x"',
    "doubled rules": "start: a0\n" + "".join(f"a{at}: a{at + 1} a{at + 1}\n" for at in range(40)) + 'a40: "x"',
    "an expression that goes back": "start: /" + "(a+)+b" * 150 + "/",
    "expressions at the same time": "start: A\nA: /(.*a.{30}){30}/ & /(.*b.{30}){30}/ & /(.*c.{30}){30}/",
    "ambiguity": 'start: start start | "a" |',
    "nothing for ever": "start: a*\na: b*\nb: /x*/",
    "many words": "start: A\nA: " + " | ".join(f'"{at}"' for at in range(3_000)),
    "many rules": "start: " + " | ".join(f"a{at}" for at in range(4000)) + "\n"
    + "".join(f"a{at}: /[a-{'abcdefgh'[at % 8]}]+{at}/\n" for at in range(4000)),
    "one character each": 'start: "a"' + " +" * 65_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=VOCAB, end_ids=tokenizer.eos_ids)


def nested(text: str) -> Grammar:
    """Put the text after thoughts, as a format does."""
    return Grammar(kind="lark", text=f"start: answer\nanswer: %lark {{\n{text}\n}}\n")


@pytest.mark.parametrize("what", TAKEN)
def test_a_grammar_of_text_is_accepted_alone_and_after_thoughts(
    compiler: GrammarCompiler, tokenizer: Tokenizer, what: str
) -> None:
    require_plain(TAKEN[what])
    for grammar in (Grammar(kind="lark", text=TAKEN[what]), nested(TAKEN[what])):
        ids = walk(compiler.compile(grammar), 3, end_ids=tokenizer.eos_ids, longest=60)
        assert ids
        assert not tokenizer.control_ids & set(ids)
        assert text_of(tokenizer, ids)


@pytest.mark.parametrize("what", REFUSED)
def test_a_callers_grammar_with_a_forbidden_part_is_refused_by_name(what: str) -> None:
    text, sentence = REFUSED[what]
    began = time.process_time()
    with pytest.raises(GrammarError) as refused:
        require_plain(text)
    assert sentence in refused.value.message
    assert len(refused.value.message) < 200
    assert time.process_time() - began < 2


def test_the_complement_of_an_expression_would_let_control_tokens_through(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    """This is why `~` is refused: llguidance lets it match bytes that are not text, and so control tokens."""
    allowed = compiler.compile(Grammar(kind="lark", text="start: ~/x/")).allowed()
    assert allowed is not None
    assert tokenizer.control_ids & set(np.flatnonzero(allowed).tolist())


@pytest.mark.parametrize("what", BOMBS)
def test_a_callers_grammar_is_followed_or_refused_soon(
    compiler: GrammarCompiler, tokenizer: Tokenizer, what: str
) -> None:
    """It runs in a thread with a small stack, as a worker's may be."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: list[float] = []

    def ask() -> None:
        for grammar in (Grammar(kind="lark", text=BOMBS[what]), nested(BOMBS[what])):
            began = time.thread_time()
            try:
                require_plain(BOMBS[what])
                walk(compiler.compile(grammar), 1, end_ids=tokenizer.eos_ids, longest=20)
            except GrammarError:
                pass
            found.append(time.thread_time() - began)

    run_on_a_small_stack(ask)
    assert len(found) == 2
    assert max(found) < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < 96 << 10


def test_a_grammar_is_split_into_the_parts_that_llguidance_sees() -> None:
    text = 'a: "//" /"#/i <[1]> // "no"\n# /no/\n  | %json {"a": "%json }"} b~2'
    found = [(part.kind, part.text) for part in read_lark(text)]
    assert found == [
        ("name", "a"), ("sign", ":"), ("string", '"//"'), ("regex", '/"#/i'), ("token", "<[1]>"), ("newline", "\n"),
        ("newline", "\n  "), ("sign", "|"), ("statement", "%json"), ("name", "b"), ("sign", "~"), ("number", "2"),
    ]  # fmt: skip
