"""Answers follow their grammar with any tokenizer; a grammar that cannot be followed fails alone, within bounds."""

from __future__ import annotations

import itertools
import json
import re
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from argosy import Engine, SamplingParams
from argosy.config import Grammar, Trigger
from argosy.engine.grammar.constraint import Constraint, GrammarCompiler
from argosy.engine.grammar.grammar_bounds import MAX_GRAMMAR_CHARACTERS, MAX_REGEX_CHARACTERS
from argosy.engine.loop import AnswerEnd, EngineLoop
from argosy.engine.sampler import Sampler, SamplerState
from argosy.errors import GrammarError, UsageError
from argosy.prompt.formats import find_format
from argosy.prompt.tokenizer import Tokenizer
from argosy.prompt.tools import check_tools
from tests.models.tiny import qwen3_moe, write_model
from tests.prompt.families import EVERY_FAMILY as FAMILIES
from tests.prompt.families import TOOLS
from tests.prompt.test_grammars import ONE
from tests.prompt.tokenizers_for_tests import byte_level_json, llama_json, unigram_json, word_piece_json

VOCAB = 640  # of the model; larger than every tokenizer's
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "tags": {"type": "array", "items": {"enum": ["a", "b<|im_end|>"]}, "maxItems": 3},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def byte_level() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(byte_level_json()), config={"eos_token": "<|im_end|>"})


def sentence_piece() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(llama_json()), config={"eos_token": "</s>"})


def unigram() -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(unigram_json()), config={"eos_token": "</s>"})


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=["bytes", "sentence piece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.param()
    return found


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=VOCAB, end_ids=tokenizer.eos_ids)


def id_of(tokenizer: Tokenizer, text: str) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == text)


def walk(constraint: Constraint, seed: int, *, end_ids: tuple[int, ...], longest: int = 400) -> list[int]:
    """Return an answer of random allowed tokens; after a while, prefer those that close something."""
    rng, ids = np.random.default_rng(seed), list[int]()
    closing = np.array([written in (b'"', b"}") for written in constraint._vocabulary.tokens])
    while not constraint.is_finished and len(ids) < longest:
        allowed = constraint.allowed()
        assert allowed is not None
        assert allowed.shape == (VOCAB,)
        wanted = allowed & closing
        candidates = np.flatnonzero(wanted if len(ids) > 20 and wanted.any() else allowed)
        end = [i for i in end_ids if allowed[i]]
        token_id = int(end[0] if end else rng.choice(candidates))
        assert constraint.accept(token_id)
        if token_id in end_ids:
            break
        ids.append(token_id)
    return ids


def written_by(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that each token of the model stands for."""
    return [tokenizer.token_bytes(token_id) for token_id in range(VOCAB)]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(written_by(tokenizer)[i] for i in ids).decode()


def test_white_space_between_the_parts_of_an_object_is_bounded(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    blank = np.array([bool(w) and not w.strip() for w in written_by(tokenizer)])
    constraint = compiler.compile(Grammar(kind="json_object"))
    feed(constraint, tokenizer, "{")
    num_blank = 0
    while (wanted := constraint.allowed() & blank).any():
        constraint.accept(int(np.flatnonzero(wanted)[0]))
        num_blank += 1
    assert 1 <= num_blank <= 21


@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"separators": (",", ":")}, {"indent": "\t"}], ids=str)
def test_json_may_be_compact_or_indented_ten_levels_deep(
    compiler: GrammarCompiler, tokenizer: Tokenizer, layout: dict[str, object]
) -> None:
    value: object = [1, {"a": 2}]
    for _ in range(8):
        value = {"a": value}
    constraint = compiler.compile(Grammar(kind="json_object"))
    written = written_by(tokenizer)
    for byte in json.dumps(value, **layout).encode():  # type: ignore[arg-type]
        token_id = written.index(bytes([byte]))
        allowed = constraint.allowed()
        assert allowed is not None
        assert allowed[token_id]
        constraint.accept(token_id)


@pytest.mark.parametrize("seed", range(8))
def test_an_answer_is_an_instance_of_its_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    grammar = Grammar(kind="json_schema", text=json.dumps(SCHEMA))
    ids = walk(compiler.compile(grammar), seed, end_ids=tokenizer.eos_ids)
    found = json.loads(text_of(tokenizer, ids))
    assert found.keys() <= SCHEMA["properties"].keys()  # type: ignore[attr-defined]
    assert isinstance(found["name"], str)
    assert len(found["name"]) <= 5
    assert 0 <= found["size"] <= 99
    assert set(found.get("tags", [])) <= {"a", "b<|im_end|>"}
    assert not tokenizer.control_ids & set(ids)  # text that spells a marker comes from ordinary tokens


def write(constraint: Constraint, text: str, *, most: int) -> str:
    """Write `text` again and again, a byte at a time, until that is no longer allowed; then finish the answer."""
    vocabulary, written = constraint._vocabulary, b""
    wanted = itertools.cycle(text.encode())
    while not constraint.is_finished and len(written) < most:
        allowed = constraint.allowed()
        assert allowed is not None
        token_id = vocabulary.id_of_byte[next(wanted)]
        if not allowed[token_id]:
            wanted = itertools.repeat(ord("]"))
            token_id = int(np.flatnonzero(allowed)[0])
        assert constraint.accept(token_id)
        written += vocabulary.tokens[token_id]
    return written.decode()


NAMES: dict[str, object] = {"type": "array", "items": {"type": "string"}}
GRID: dict[str, object] = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
OBJECTS: dict[str, object] = {
    "type": "array",
    "items": {"type": "object", "properties": {"a": NAMES, "b": {"type": "string"}}},
}


@pytest.mark.parametrize(
    ("schema", "items", "num_bytes"),
    [
        (NAMES, '"red","blue",', 512),
        (NAMES, '"red, or [blue]", ', 512),
        (NAMES, '"red" , ', 512),
        (OBJECTS, '{"a":["x","y"],"b":"z"},', 512),
        (GRID, "[0,0],[0,0],[0,1],", 2048),
        (NAMES, '"12","",', 2048),
    ],
)
def test_an_array_whose_items_repeat_for_long_ends_after_an_item(
    compiler: GrammarCompiler, schema: dict[str, object], items: str, num_bytes: int
) -> None:
    constraint = compiler.compile(Grammar(kind="json_schema", text=json.dumps(schema)))
    begin = compiler._vocabulary.id_of_byte[ord("[")]
    assert constraint.accept(begin)
    written = write(constraint, items, most=3000)
    whole, piece = json.loads("[" + written), json.loads(f"[{items.rstrip(', ')}]")
    assert whole == (piece * 3000)[: len(whole)]
    assert num_bytes < len(written) < num_bytes + 3 * len(items)


def test_a_string_that_repeats_itself_for_long_ends(compiler: GrammarCompiler) -> None:
    constraint = compiler.compile(
        Grammar(kind="json_schema", text='{"type": "string", "pattern": "^[^#]*$"}')
    )
    assert constraint.accept(compiler._vocabulary.id_of_byte[ord('"')])
    written = write(constraint, "8x = -23, ", most=3000)
    assert json.loads('"' + written) == ("8x = -23, " * 99)[: len(written) - 1]
    assert 512 < len(written) < 530


def test_an_array_of_strings_that_repeat_themselves_ends(compiler: GrammarCompiler) -> None:
    """Each ends sooner than the first, and the array after a few equal ones."""
    constraint = compiler.compile(Grammar(kind="json_schema", text=json.dumps(NAMES)))
    id_of_byte, written = compiler._vocabulary.id_of_byte, "["
    assert constraint.accept(id_of_byte[ord("[")])
    while not constraint.is_finished:
        allowed = constraint.allowed()
        assert allowed is not None
        # Strings of "a" without end, and a comma behind each.
        wanted = [id_of_byte[byte] for byte in (b',"]' if written.endswith('a"') else b'a",]')]
        token_id = next(token_id for token_id in wanted if allowed[token_id])
        assert constraint.accept(token_id)
        written += compiler._vocabulary.tokens[token_id].decode()
    first, *more = (len(text) for text in json.loads(written))
    assert 512 < first < 520
    assert {64 < length < 70 for length in more} == {True}
    assert 4 <= len(more) <= 6


@pytest.mark.parametrize("added", [['",'], ['",', '"]']])
def test_an_array_ends_where_one_token_would_end_its_item_and_begin_the_next(added: list[str]) -> None:
    written_as = json.loads(byte_level_json())
    for token in written_as["added_tokens"]:
        token["id"] += 100 * (token["id"] > 2)
    known = len(written_as["model"]["vocab"])
    written_as["model"]["vocab"] |= {text: known + at for at, text in enumerate(added)}
    written_as["model"]["merges"] += [list(text) for text in added]
    tokenizer = Tokenizer(
        tokenizers.Tokenizer.from_str(json.dumps(written_as)), config={"eos_token": "<|im_end|>"}
    )
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB, end_ids=tokenizer.eos_ids)
    constraint = compiler.compile(Grammar(kind="json_schema", text=json.dumps(NAMES)))
    assert constraint.accept(id_of(tokenizer, "["))
    written, cycle = "[", itertools.cycle(id_of(tokenizer, text) for text in ('"', "a", '",'))
    while not constraint.is_finished:
        allowed, token_id = constraint.allowed(), next(cycle)
        assert allowed is not None
        token_id = token_id if allowed[token_id] else int(np.flatnonzero(allowed)[0])
        assert constraint.accept(token_id)
        written += compiler._vocabulary.tokens[token_id].decode()
    assert json.loads(written) == ["a"] * 172


@pytest.mark.parametrize(
    ("schema", "items"),
    [
        (NAMES | {"minItems": 300}, '"red","blue",'),
        (NAMES, "".join(f'"{number}",' for number in range(99))),
        ({"type": "array", "items": {"type": "integer"}}, "0,"),
    ],
)
def test_an_array_goes_on_that_is_too_short_or_repeats_itself_late_or_has_fewer_numbers(
    compiler: GrammarCompiler, schema: dict[str, object], items: str
) -> None:
    constraint = compiler.compile(Grammar(kind="json_schema", text=json.dumps(schema)))
    assert constraint.accept(compiler._vocabulary.id_of_byte[ord("[")])
    assert write(constraint, items, most=1000) == (items * 1000)[:1000]


def test_answers_follow_each_kind_of_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for seed in range(4):
        for grammar, holds in (
            (Grammar(kind="json_object"), lambda text: isinstance(json.loads(text), dict)),
            (Grammar(kind="regex", text=r"[ab]{3,9}/[0-9]+\."), re.compile(r"[ab]{3,9}/[0-9]+\.").fullmatch),
            (
                Grammar(kind="lark", text='start: "x" y+\ny: "yes" | "no"'),
                re.compile(r"x(yes|no)+").fullmatch,
            ),
        ):
            text = text_of(tokenizer, walk(compiler.compile(grammar), seed, end_ids=tokenizer.eos_ids))
            assert holds(text), text


def test_an_answer_may_end_when_its_grammar_is_complete_and_not_before(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    constraint = compiler.compile(Grammar(kind="regex", text="a(b?)"))
    (end,) = tokenizer.eos_ids
    steps = []
    for letter in "ab":
        allowed = constraint.allowed()
        assert allowed is not None
        steps.append((bool(allowed[end]), constraint.is_finished))
        constraint.accept(
            int(np.flatnonzero(allowed & np.array([w == letter.encode() for w in written_by(tokenizer)]))[0])
        )
    assert steps == [(False, False), (True, False)]
    assert constraint.is_finished


def test_ids_without_a_token_are_never_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    allowed = compiler.compile(Grammar(kind="regex", text="(?s:.)*")).allowed()
    assert allowed is not None
    assert allowed.sum() > 200
    assert not allowed[tokenizer.vocab_size :].any()


def test_control_tokens_are_allowed_only_where_a_grammar_names_them() -> None:
    tokenizer = byte_level()
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB, end_ids=tokenizer.eos_ids)
    call, think = id_of(tokenizer, "<tool_call>"), id_of(tokenizer, "<think>")
    for name in ("<tool_call>", f"<[{call}]>"):
        constraint = compiler.compile(Grammar(kind="lark", text=f'start: {name} "go" <think>'))
        assert np.flatnonzero(constraint.allowed()).tolist() == [call]
        ids = walk(constraint, 0, end_ids=tokenizer.eos_ids)
        assert (ids[0], ids[-1]) == (call, think)
    constraint = compiler.compile(Grammar(kind="lark", text='start: "<tool_call>"'))
    allowed = constraint.allowed()
    assert allowed is not None
    assert not allowed[call]
    with pytest.raises(GrammarError, match="unknown special token"):
        compiler.compile(Grammar(kind="lark", text='start: <nobody> "x"'))
    body = f"start: <tool_call> body\nbody: %json {json.dumps(SCHEMA)}"
    constraint = compiler.compile(Grammar(kind="lark", text=body))
    ids = walk(constraint, 1, end_ids=tokenizer.eos_ids)
    assert json.loads(text_of(tokenizer, ids[1:])).keys() >= {"name", "size"}


# ── triggers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def feed(constraint: Constraint, tokenizer: Tokenizer, *texts: str) -> list[bool]:
    """Return whether each token was accepted; each text is one token."""
    written = written_by(tokenizer)
    return [constraint.accept(written.index(text.encode())) for text in texts]


def test_an_answer_is_free_until_its_trigger_token() -> None:
    tokenizer = byte_level()
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB, end_ids=tokenizer.eos_ids)
    call = id_of(tokenizer, "<tool_call>")
    constraint = compiler.compile(Grammar(kind="regex", text="[0-9]+", trigger=Trigger((call,))))
    assert constraint.allowed() is None
    assert all(feed(constraint, tokenizer, "a", "1", "<think>"))
    assert constraint.allowed() is None
    assert constraint.accept(call)
    allowed = constraint.allowed()
    assert allowed is not None
    assert {written_by(tokenizer)[i][:1] for i in np.flatnonzero(allowed)} <= {
        bytes([c]) for c in b"0123456789"
    }


def test_a_trigger_may_span_tokens_and_its_last_token_may_begin_the_grammar(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    words = [w for w in written_by(tokenizer) if len(w) == 2 and w.isalpha() and w.isascii()]
    two = words[0].decode()  # a token of two letters; the first ends the trigger
    for pattern, taken in ((f"{two[1]}z", True), ("z", False)):
        constraint = compiler.compile(Grammar(kind="regex", text=pattern, trigger=Trigger((f"<<{two[0]}",))))
        assert all(feed(constraint, tokenizer, "<", "<", "<"))
        assert constraint.allowed() is None
        assert feed(constraint, tokenizer, two) == [taken]
        assert (constraint.allowed() is not None) == taken
        if taken:
            following = {written_by(tokenizer)[i] for i in np.flatnonzero(constraint.allowed())}
            assert following == {b"z"}
        else:
            assert feed(constraint, tokenizer, two[0], "z") == [True, True]
            assert constraint.is_finished


def test_the_sampler_chooses_again_when_a_token_breaks_the_grammar_after_the_trigger() -> None:
    tokenizer = byte_level()
    compiler = GrammarCompiler(tokenizer, vocab_size=VOCAB, end_ids=tokenizer.eos_ids)
    written = written_by(tokenizer)
    two = next(w for w in written if len(w) == 2 and w.isalpha() and w.isascii())
    constraint = compiler.compile(Grammar(kind="regex", text="z", trigger=Trigger((two[:1].decode(),))))
    logits = np.zeros(VOCAB, np.float32)
    logits[written.index(two)], logits[written.index(two[:1])] = 9.0, 8.0
    sampler, state = Sampler(), SamplerState([1], 0)
    chosen = [sampler.sample(logits, SamplingParams(), state, constraint).token_id for _ in range(2)]
    assert [written[i] for i in chosen] == [two[:1], b"z"]
    assert state.step == 2


# ── the sampler ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(logit_bias={5: 100.0}, repetition_penalty=0.5),
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=2.0, seed=3, top_k=3),
        SamplingParams(temperature=2.0, seed=3, top_p=0.1, min_p=0.2),
    ],
    ids=["greedy", "penalties", "sampled", "top_k", "top_p"],
)
def test_no_setting_lets_a_forbidden_token_through(
    compiler: GrammarCompiler, tokenizer: Tokenizer, params: SamplingParams
) -> None:
    for seed in range(20):
        constraint = compiler.compile(Grammar(kind="regex", text="[a-z]{5}"))
        state, rng, ids = SamplerState([1, 2, 3], 0), np.random.default_rng(seed), list[int]()
        while not constraint.is_finished:
            logits = (5 * rng.standard_normal(VOCAB)).astype(np.float32)
            allowed = constraint.allowed()
            assert allowed is not None
            sampled = Sampler().sample(logits, params, state, constraint)
            assert allowed[sampled.token_id]
            ids.append(sampled.token_id)
        assert re.fullmatch("[a-z]{5}", text_of(tokenizer, ids))


def test_log_probabilities_are_the_models_own_and_greedy_takes_the_best_allowed_token(
    compiler: GrammarCompiler,
) -> None:
    logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32)
    constraint = compiler.compile(Grammar(kind="regex", text="[a-m]+"))
    allowed = constraint.allowed()
    assert allowed is not None
    logits[np.flatnonzero(~allowed)[0]] = 9.0
    params = SamplingParams(logprobs=3)
    sampled = Sampler().sample(logits, params, SamplerState([1], 0), constraint)
    plain = Sampler().sample(logits, params, SamplerState([1], 0))
    assert sampled.token_id == int(np.where(allowed, logits, -np.inf).argmax()) != plain.token_id
    assert sampled.top_logprobs == plain.top_logprobs
    assert sampled.logprob is not None
    assert plain.logprob is not None
    assert sampled.logprob - plain.logprob == pytest.approx(
        logits[sampled.token_id] - logits[plain.token_id], abs=1e-5
    )


# ── bounds ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


BOMBS = {
    "nested repeats": Grammar(kind="regex", text="((a{1000}){1000}){1000}"),
    "forced text": Grammar(kind="regex", text="(ab{1000}){1000}"),
    "ambiguous": Grammar(kind="regex", text="(a+)+b"),
    "optional": Grammar(kind="regex", text="a?" * 250 + "a" * 250),
    "automaton": Grammar(kind="regex", text="(a|b)*a(a|b){200}"),
    "automaton of automata": Grammar(kind="regex", text="(.*a.{30}){30}"),
    "deep groups": Grammar(kind="regex", text="(" * 500 + ")" * 500),
    "unicode": Grammar(kind="regex", text=r"(?i)[a-z\p{L}]{0,50}" * 20),
    "look-ahead": Grammar(kind="regex", text="(?=a)b"),
    "open bracket": Grammar(kind="regex", text="[a"),
    "long expression": Grammar(kind="regex", text="a" * (MAX_REGEX_CHARACTERS + 1)),
    "deep text": Grammar(kind="json_schema", text="[" * 60_000),
    "deep schema": Grammar(kind="json_schema", text=nested(2_000)),
    "too deep": Grammar(kind="json_schema", text=nested(40)),
    "deep enough": Grammar(kind="json_schema", text=nested(20)),
    "long pattern": Grammar(kind="json_schema", text=json.dumps({"items": [{"pattern": "a" * 5000}]})),
    "names that are none": Grammar(kind="json_schema", text='{"patternProperties": 5}'),
    "long name": Grammar(kind="json_schema", text=json.dumps({"patternProperties": {"a" * 5000: {}}})),
    "pattern": Grammar(
        kind="json_schema", text=json.dumps({"type": "string", "pattern": "^((a{999}){999}){999}$"})
    ),
    "many names": Grammar(
        kind="json_schema",
        text=json.dumps({"properties": {f"p{i}": {"type": "string"} for i in range(2500)}}),
    ),
    "many values": Grammar(kind="json_schema", text=json.dumps({"enum": [f"v{i}" for i in range(10_000)]})),
    "any of": Grammar(
        kind="json_schema", text=json.dumps({"anyOf": [{"pattern": f"^a.*b{i}$"} for i in range(400)]})
    ),
    "counted arrays": Grammar(
        kind="json_schema",
        text=json.dumps({"type": "array", "minItems": 10**5, "items": {"type": "array", "minItems": 10**6}}),
    ),
    "long strings": Grammar(kind="json_schema", text=json.dumps({"type": "string", "minLength": 10**6})),
    "recursion": Grammar(kind="json_schema", text='{"$defs":{"a":{"$ref":"#/$defs/a"}},"$ref":"#/$defs/a"}'),
    "elsewhere": Grammar(kind="json_schema", text='{"$ref": "http://localhost:1/schema.json"}'),
    "file": Grammar(kind="json_schema", text='{"$ref": "file:///etc/passwd"}'),
    "no schema": Grammar(kind="json_schema", text="[1]"),
    "nothing matches": Grammar(kind="json_schema", text="false"),
    "rules": Grammar(kind="lark", text='start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"'),
    "terminals": Grammar(kind="lark", text='start: A\nA: B{1000}\nB: C{1000}\nC: D{1000}\nD: "x"'),
    "left and right": Grammar(kind="lark", text='start: start start | "a" |'),
    "deep schema inside": Grammar(kind="lark", text="start: %json " + nested(100)),
    "long pattern inside": Grammar(kind="lark", text='start: %json {"pattern": "' + "a" * 2000 + '"}'),
    "broken schema inside": Grammar(kind="lark", text='start: %json {"type": '),
    "options": Grammar(kind="lark", text='%llguidance {"no_forcing": false}\nstart: /(a{1000}){1000}/'),
    "no start": Grammar(kind="lark", text='begin: "a"'),
    "long": Grammar(kind="lark", text='start: "' + "a" * MAX_GRAMMAR_CHARACTERS + '"'),
    "longer than all room": Grammar(kind="lark", text='start: "' + "a" * 3 * MAX_GRAMMAR_CHARACTERS + '"'),
}


def run_on_a_small_stack(work: Callable[[], None]) -> None:
    """Run `work` in a thread with a 2 MiB stack, as a worker's may be."""
    before = threading.stack_size(2 << 20)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()


def chained(what: str, depth: int) -> Grammar:
    """Make rules or schemas that each lead to the next."""
    if what in LINKS:
        parts = {str(at): LINKS[what]({"$ref": f"#/$defs/{at + 1}"}) for at in range(depth)}
        schema = {"$defs": parts | {str(depth): {"type": "string"}}, "$ref": "#/$defs/0"}
        return Grammar(kind="json_schema", text=json.dumps(schema, separators=(",", ":")))
    rules = [RULES[what].replace("@", f"{what[0]}{at + 1}") for at in range(depth)]
    rules = [f"{what[0]}{at}: {rule}" for at, rule in enumerate([*rules, '"x"'])]
    return Grammar(kind="lark", text="\n".join([f"start: {what[0]}0", *rules]))


LINKS: dict[str, Callable[[object], object]] = {
    "items": lambda to: {"items": to},
    "any of": lambda to: {"anyOf": [to, {"type": "null"}]},
    "all of": lambda to: {"allOf": [to]},
    "other properties": lambda to: {"additionalProperties": to},
    "properties": lambda to: {"properties": {"a": to}, "required": ["a"]},
}
RULES = {
    "rules": '"b" @ "c" | "d"',
    "rules that may follow": '"b" (@ "c")?',
    "rules of rules": '("b" (("c" (@)*)? "d")*)?',
    "Terminals": '"b" @ "c" | "d"',
    "Terminals that may follow": '"b" (("c" (@)*)? "d")*',
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("what", [*LINKS, *RULES])
def test_a_chain_of_references_is_followed_on_a_small_stack_or_refused_with_the_number(
    compiler: GrammarCompiler, what: str
) -> None:
    """llguidance recurses for each link: without a bound, 2000 links ended the process."""
    found: list[str] = []

    def ask() -> None:
        for depth in (5, 20, 40, 60, 80, 120, 180, 390, 1500):
            try:
                compiler.compile(chained(what, depth)).allowed()
            except GrammarError as error:
                found.append(str(error))
            else:
                found.append("followed")

    run_on_a_small_stack(ask)
    assert found[0] == found[1] == found[2] == found[3] == "followed"
    assert re.fullmatch(r"references in the grammar go \d+ levels deep; at most 400 are allowed", found[-1])
    assert {text[:28] for text in found} == {"followed", found[-1][:28]}


def test_a_tool_whose_schema_is_a_long_chain_is_unconstrained_in_a_lenient_grammar(
    compiler: GrammarCompiler,
) -> None:
    text = f"start: %json {chained('items', 1500).text}"
    with pytest.raises(GrammarError, match="levels deep"):
        compiler.compile(Grammar(kind="lark", text=text))
    assert compiler.compile(Grammar(kind="lark", text=text, is_lenient=True)).allowed() is not None


def test_circular_and_parallel_rules_and_schemas_do_not_count_as_a_chain(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    side = "start: (" + " | ".join(f"a{at}" for at in range(600)) + ")\n"
    wide = Grammar(kind="lark", text=side + "\n".join(f'a{at}: "{at}"' for at in range(600)))
    parts = {f"a{at}": {"const": at} for at in range(600)}
    branches = {"$defs": parts, "anyOf": [{"$ref": f"#/$defs/{name}"} for name in parts]}
    tree = {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"}
    circle = Grammar(kind="lark", text='start: sum\nsum: part ("+" part)*\npart: /[0-9]/ | "(" sum ")"')
    for grammar in (
        wide,
        circle,
        *(Grammar(kind="json_schema", text=json.dumps(s)) for s in (branches, tree)),
    ):
        ids = walk(compiler.compile(grammar), 1, end_ids=tokenizer.eos_ids, longest=30)
        assert ids


@pytest.mark.parametrize(
    ("schema", "sentence"),
    [
        ({"$ref": "other.json#/a"}, "a reference in a schema must be a path like '#/$defs/name'"),
        ({"$ref": "#name"}, "a reference in a schema must be a path like"),
        (
            {"items": {"$id": "http://x/y", "$defs": {"a": {}}, "$ref": "#/$defs/a"}},
            "a schema with references has a subschema with its own '$id'",
        ),
    ],
)
def test_a_reference_with_an_unknown_target_is_refused(
    compiler: GrammarCompiler, schema: object, sentence: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(sentence)):
        compiler.compile(Grammar(kind="json_schema", text=json.dumps(schema)))


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_is_followed_or_refused_within_bounds(
    compiler: GrammarCompiler, tokenizer: Tokenizer, name: str
) -> None:
    """The worst takes 0.3 s and 30 MiB here, most take a millisecond; the bounds leave room for slower machines."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    steps = 0
    longest = compiled_s = 0.0
    with suppress(GrammarError):
        constraint = compiler.compile(BOMBS[name])
        compiled_s = time.process_time() - begin
        rng = np.random.default_rng(0)
        while not constraint.is_finished and steps < 100:
            step_at = time.process_time()
            allowed = constraint.allowed()
            longest = max(longest, time.process_time() - step_at)
            assert allowed is not None
            constraint.accept(int(rng.choice(np.flatnonzero(allowed))))
            steps += 1
    compiled_s = compiled_s or time.process_time() - begin
    assert compiled_s < 5
    assert longest < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 96 << 10


def test_a_grammar_whose_lexer_takes_long_to_build_is_refused(compiler: GrammarCompiler) -> None:
    """The automaton of terminals that double is refused before it takes 0.2 s; half of it is followed."""

    def doubled(depth: int) -> Grammar:
        rules = "".join(f"A{at}: A{at + 1} A{at + 1}\n" for at in range(depth))
        return Grammar(kind="lark", text=f'start: A0\n{rules}A{depth}: "x"')

    assert compiler.compile(doubled(21)).allowed() is not None
    with pytest.raises(GrammarError, match="cannot be followed"):
        compiler.compile(doubled(23))


def test_the_cache_of_compiled_grammars_is_bounded_and_separate_for_each_tenant(
    compiler: GrammarCompiler,
) -> None:
    for number in range(40):
        compiler.compile(Grammar(kind="regex", text=f"a{number}"), tenant=str(number % 2))
    assert len(compiler._compiled) == 16
    before = dict(compiler._compiled)
    compiler.compile(Grammar(kind="regex", text="a39"), tenant="1")
    assert compiler._compiled == before
    compiler.compile(Grammar(kind="regex", text="a39"), tenant="0")
    assert compiler._compiled != before


def test_a_tokenizer_whose_tokens_depend_on_their_neighbours_is_refused() -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(word_piece_json()), config={"eos_token": "[SEP]"})
    with pytest.raises(UsageError, match="it cannot follow a grammar"):
        GrammarCompiler(tokenizer, vocab_size=20, end_ids=tokenizer.eos_ids)
    with pytest.raises(UsageError, match="has no end token"):
        GrammarCompiler(unigram(), vocab_size=VOCAB, end_ids=[])
    GrammarCompiler(unigram(), vocab_size=VOCAB, end_ids=[2]).compile(Grammar(kind="regex", text="a+"))


# ── in an engine ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grammar")
    tokenizer = byte_level()
    config = qwen3_moe(vocab_size=VOCAB, max_position_embeddings=1024, eos_token_id=tokenizer.eos_ids[0])
    write_model(root, config, seed=2)
    (root / "tokenizer.json").write_text(byte_level_json())
    return root


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[Engine]:
    with Engine.open(directory, memory="2GiB", threads=1, grammars=True) as engine:
        yield engine


GRAMMAR = Grammar(kind="json_schema", text=json.dumps(SCHEMA))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_answers_in_the_requested_form(engine: Engine, temperature: float) -> None:
    params = SamplingParams(max_tokens=900, temperature=temperature, seed=1, grammar=GRAMMAR)
    result = engine.generate([3, 4, 5], params)
    assert json.loads(result.text).keys() >= {"name", "size"}
    assert result.finish_reason == "stop"
    assert result.stopped_by in (None, *engine.config.eos_ids)
    assert [event.token_id for event in engine.stream([3, 4, 5], params)] == result.token_ids


def test_an_answer_ends_where_its_grammar_ends_without_another_step(engine: Engine) -> None:
    result = engine.generate([3, 4, 5], SamplingParams(grammar=Grammar(kind="regex", text="[0-9]{4}")))
    assert re.fullmatch("[0-9]{4}", result.text)
    assert (result.finish_reason, result.stopped_by) == ("stop", None)
    assert engine.config.eos_ids[0] not in result.token_ids


def test_a_constrained_answer_is_the_same_beside_others_and_when_preempted(
    directory: Path, engine: Engine
) -> None:
    params = [
        SamplingParams(
            max_tokens=40, temperature=1.0, seed=seed, grammar=None if seed == 2 else GRAMMAR, logprobs=1
        )
        for seed in range(5)
    ]
    prompts = [[3 + seed, 4, 5] * 3 for seed in range(5)]
    alone = [engine.generate(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    with Engine.open(directory, memory="2GiB", threads=1, grammars=True, context=160) as small:
        together = small.generate_batch(prompts, params)
        assert small.facts().num_preempted > 0
    for ours, theirs in zip(together, alone, strict=True):
        assert (ours.token_ids, ours.logprobs, ours.text) == (theirs.token_ids, theirs.logprobs, theirs.text)


def test_an_answer_whose_grammar_fails_ends_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = engine.generate([9, 8, 7], free).token_ids
    allowed = Constraint.allowed
    calls = 0

    def fails(constraint: Constraint) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise GrammarError("too much work")
        return allowed(constraint)

    one = engine.submit([3, 4, 5], SamplingParams(max_tokens=50, grammar=GRAMMAR))
    other = engine.submit([9, 8, 7], free)
    monkeypatch.setattr(Constraint, "allowed", fails)
    while one.result is None or other.result is None:
        engine.step()
    assert one.result.finish_reason == "error"
    assert isinstance(one.result.error, GrammarError)
    assert len(one.result.token_ids) == 2
    assert other.result.token_ids == expected
    assert engine.facts().kv_blocks_held == 0
    calls = 0
    with pytest.raises(GrammarError, match="too much work"):
        engine.generate([3, 4, 5], SamplingParams(max_tokens=50, grammar=GRAMMAR))


def test_an_engine_opened_without_grammars_refuses_them(directory: Path) -> None:
    with Engine.open(directory, memory="2GiB", threads=1) as engine:
        with pytest.raises(UsageError, match="does not support grammars"):
            engine.generate([1], SamplingParams(grammar=GRAMMAR))
        plain = engine.plan.process_bytes
    with Engine.open(directory, memory="2GiB", threads=1, grammars=True) as engine:
        assert engine.plan.process_bytes > plain + (60 << 20)
        with pytest.raises(GrammarError, match="the trigger is token 640"):
            engine.generate(
                [1], SamplingParams(grammar=Grammar(kind="json_object", trigger=Trigger((VOCAB,))))
            )


def test_an_invalid_grammar_is_refused_by_name() -> None:
    for values, sentence in (
        ({"kind": "ebnf", "text": "x"}, "unknown kind of grammar 'ebnf'"),
        ({"kind": "regex"}, "kind 'regex' needs a text"),
        ({"kind": "json_object", "text": "x"}, "kind 'json_object' needs no text"),
    ):
        with pytest.raises(UsageError, match=sentence):
            Grammar(**values)
    with pytest.raises(UsageError, match="ignore_eos cannot be used with a grammar"):
        SamplingParams(ignore_eos=True, grammar=Grammar(kind="json_object"))


def test_a_schema_that_is_nested_too_deeply_is_refused_with_the_limit(compiler: GrammarCompiler) -> None:
    for depth in (40, 2_000):
        with pytest.raises(GrammarError, match="nested more than 64 levels deep"):
            compiler.compile(Grammar(kind="json_schema", text=nested(depth)))
    compiler.compile(Grammar(kind="json_schema", text=nested(20)))


def test_grammars_are_compiled_in_any_thread_while_another_thread_follows_them(engine: Engine) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=5, grammar=GRAMMAR)
    expected = engine.generate([3, 4, 5], params).token_ids
    found: list[list[int]] = []

    def ask(loop: EngineLoop, number: int) -> None:
        for at in range(6):
            loop.submit(
                [9, at],
                SamplingParams(
                    max_tokens=9, grammar=Grammar(kind="regex", text=f"[a-z]{{{at + 1}}}{number}")
                ),
                ignore,
            )
            ended = threading.Event()

            def hear(event: object, ended: threading.Event = ended) -> None:
                if isinstance(event, AnswerEnd):
                    found.append(event.result.token_ids)
                    ended.set()

            loop.submit([3, 4, 5], params, hear)
            assert ended.wait(20)

    def ignore(event: object) -> None:
        pass

    with EngineLoop(engine) as loop:
        threads = [threading.Thread(target=ask, args=(loop, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected] * 24


@pytest.mark.parametrize("name", sorted(ONE))
def test_the_calls_that_families_write_follow_their_grammars(name: str) -> None:
    """The grammars are those of `prompt/formats`, with schemas that bound white space."""
    family = FAMILIES[name]
    end_ids = list(family.tokenizer.eos_ids) or [0]
    compiler = GrammarCompiler(family.tokenizer, vocab_size=family.tokenizer.vocab_size, end_ids=end_ids)
    text = find_format(family.tokenizer, family.template).grammar(check_tools(TOOLS))
    constraint = compiler.compile(Grammar(kind="lark", text=text))
    for token_id in family.tokenizer.encode_segments([(False, ONE[name])]):
        allowed = constraint.allowed()
        assert allowed is not None
        assert allowed[token_id]
        assert constraint.accept(token_id)
    allowed = constraint.allowed()
    assert allowed is not None
    assert constraint.is_finished or allowed[end_ids[0]]
