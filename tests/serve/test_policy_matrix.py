"""Every route, for every kind of key and state: nobody gets an answer that their scope, quota or policy does not allow.

    ROUTES x (no key, a wrong one, each scope, a used-up quota, a stopped key)  ->  the status that the table promises
    ROUTES that screen  x  a text that the policy does not allow  ->  refused
    every text of every body  ->  judged, or no model gets it, for a reason that is listed here

A new route is in the table by itself, and so is a new field. Without a declared policy, or without a body here, it
fails. `python -m tests.serve.test_policy_matrix` prints what becomes of each text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest import mock

import httpx
import pytest
from pydantic import TypeAdapter

from argosy.errors import ArgosyError
from argosy.guard.guard_models import Question
from argosy.guard.keys import SCOPES, KeyFile, KeyRing
from argosy.guard.verdict import Verdict
from argosy.open.engine import Engine
from argosy.prompt.builder import Filling
from argosy.prompt.formats.events import (
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallBegin,
    ToolCallEnd,
)
from argosy.prompt.prompt import Prompt
from argosy.prompt.reranking import RerankForm, Reranking
from argosy.serve.answer.service import Service
from argosy.serve.app import ROUTES, make_app
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.route import Route
from tests.serve.bodies import BODIES
from tests.serve.conftest import only, serving, start
from tests.serve.speaking import write_speaking_model

NOT_ALLOWED = "a blue moon"
WITHOUT = ("/v1/rerank", "/rerank", "/infill")  # this model cannot; tests below have those that can
STREAMS = ("/v1/engine/events",)  # it never ends
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.rule.method} {r.rule.path}")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("matrix") / "keys.json")


@pytest.fixture(scope="module")
def secrets(keys: KeyFile) -> dict[str, str]:
    made = {scope: keys.add(scope, scopes=(scope,))[1] for scope in SCOPES}
    made["used up"] = keys.add("used-up", scopes=("admin", "infer"), requests_per_minute=1)[1]
    made["stopped"] = keys.add("stopped", scopes=("admin", "infer"))[1]
    return made


@pytest.fixture(scope="module")
def matrix(
    service: Service, keys: KeyFile, secrets: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.with_name("words.txt").write_text(f"{NOT_ALLOWED}\n")
    path.write_text('default = "a"\n[policies.a]\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n')
    guarding = Guarding(path)
    guarding.stops.set("key", "stopped", is_stopped=True)
    app = make_app(
        only(service),
        KeyRing(keys),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=guarding),
    )
    for url in start(app):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


def send(client: httpx.Client, route: Route, secret: str | None, text: str = "fine") -> httpx.Response:
    rule = route.rule
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    path = rule.path.replace("{id}", "tiny").replace("{name}", "app.js").replace("{key}", "nobody")
    given: dict[str, Any] = {}
    if rule.takes_form:
        given = {"files": {"file": ("a.wav", b"RIFF")}, "data": {"model": "whisper-1"}}
    elif rule.method == "POST":
        given = {"json": BODIES[rule.path](text)}
    with client.stream(rule.method, path, headers=headers, **given) as answer:
        if rule.path not in STREAMS or answer.status_code != 200:
            answer.read()
    return answer


@every_route
def test_every_route_declares_what_it_screens_and_has_a_body_here(route: Route) -> None:
    rule = route.rule
    assert rule.screens is not None, "say what the content policy is applied to: screens="
    if rule.method == "POST":
        assert (rule.path in BODIES) == (not rule.takes_form)
    if rule.screens != "nothing":
        assert (rule.method, rule.scope) == ("POST", "infer")
        assert route.body is not None


@every_route
def test_only_a_key_with_the_scope_of_a_route_gets_an_answer(
    matrix: httpx.Client, secrets: dict[str, str], route: Route
) -> None:
    needed = route.rule.scope
    for name, secret in (
        ("none", None),
        ("wrong", "ak-wrong"),
        *((scope, secrets[scope]) for scope in SCOPES),
    ):
        status = send(matrix, route, secret).status_code
        if needed is None:
            assert status == 200, name
        elif name in ("none", "wrong"):
            assert status == 401, name
        elif name in (needed, "admin"):
            assert status in (200, 400, 404, 409, 415), (name, status)  # its scope lets it in
            assert status != 403
        else:
            assert status == 403, name


@every_route
def test_a_stopped_key_gets_no_answer_and_a_used_up_one_none_that_counts(
    matrix: httpx.Client, secrets: dict[str, str], route: Route
) -> None:
    if route.rule.scope is None:
        return
    stopped = send(matrix, route, secrets["stopped"])
    assert stopped.status_code == 403
    used_up = [send(matrix, route, secrets["used up"]).status_code for _ in range(2)]
    if route.rule.is_counted:
        assert used_up[1] == 429
    else:
        assert 429 not in used_up


@every_route
def test_a_text_that_the_policy_does_not_allow_is_refused_where_a_route_screens(
    matrix: httpx.Client, secrets: dict[str, str], route: Route
) -> None:
    rule = route.rule
    if rule.screens in (None, "nothing") or rule.path in WITHOUT or rule.takes_form:
        return
    fine, refused = (send(matrix, route, secrets["infer"], text) for text in ("fine", NOT_ALLOWED))
    assert fine.status_code == 200, fine.text
    if rule.path == "/v1/moderations":  # it says so
        assert refused.json()["results"][0]["flagged"] is True
        return
    assert refused.status_code == 400
    assert "not allowed by the policy" in refused.text


def test_a_route_without_a_policy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from argosy.serve.dialects.openai_embeddings import Embeddings, embeddings
    from argosy.serve.http.access import RouteRule
    from argosy.serve.http.route import post_route

    with pytest.raises(TypeError, match="screens"):
        post_route("/new", embeddings, Embeddings)  # type: ignore[call-arg]
    rule = RouteRule(method="POST", path="/new", scope="infer")
    with pytest.raises(AssertionError, match="say what the content policy"):
        test_every_route_declares_what_it_screens_and_has_a_body_here(
            Route(rule=rule, handler=embeddings, answer=Embeddings)
        )


def test_rerank_screens_query_and_documents(service: Service, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(f"{NOT_ALLOWED}\n")
    path = tmp_path / "policy.toml"
    path.write_text('default = "a"\n[policies.a]\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n')
    form = RerankForm(before="", between="\n", after="\n", yes="a", no="b")
    ranking = Service(
        service.loop, service.prompts, service.tokenizer, service.model,
        reranking=Reranking(form, service.tokenizer, context_tokens=service.model.context_tokens),
    )  # fmt: skip
    app = make_app(
        only(ranking),
        KeyRing(None),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=Guarding(path)),
    )
    for url in start(app):
        for query, document, status in (("q", "d", 200), (NOT_ALLOWED, "d", 400), ("q", NOT_ALLOWED, 400)):
            body = {"query": query, "documents": ["x", document]}
            assert httpx.post(f"{url}/v1/rerank", json=body, timeout=60).status_code == status


# Every text of every body: judged, or not shown to any model
WORD = "zebrafish"  # in a list of words; it fits the pattern of every name
NO_EFFECT, UNKNOWN = "accepted, and has no effect", "an unknown field, which has no effect"
MEDIA = "a file, or where it is: it is decoded, and no text of it is read"
# Texts that no model and no grammar gets, by the end of their place or by a part of it, and the reason. Beside them
# there are fields without effect and unknown fields, which the bodies themselves declare as such.
HIDDEN = {
    ".model": "names a model of the server, or a check",
    ".logit_bias.*": "ids of tokens, and numbers",
    ".stop": "is compared with the answer",
    ".stop[]": "is compared with the answer",
    ".stop_sequences[]": "is compared with the answer",
    ".stopping_strings[]": "is compared with the answer",
    ".parsed.*": "a client's copy, which is dropped",
    ".parsed_arguments.*": "a client's copy, which is dropped",
    "<FunctionTurn>.name": "finds the call, whose own name is in the prompt",
    "Item>.id": "names an item of the server; what is kept of it is judged again",
    "Item>.status": "is dropped",
    ".previous_response_id": "names a response of the server; what is kept of it is judged again",
    "<SchemaForm>.name": "is dropped: only the schema itself becomes a grammar",
    "<SchemaForm>.description": "is dropped: only the schema itself becomes a grammar",
    "<FlatSchemaForm>.name": "is dropped: only the schema itself becomes a grammar",
    "<FlatSchemaForm>.description": "is dropped: only the schema itself becomes a grammar",
    "<TextOptions>.verbosity": NO_EFFECT,
    "<ReasoningOptions>.summary": NO_EFFECT,
    "<ReasoningOptions>.generate_summary": NO_EFFECT,
    ".include[]": "chooses parts of the answer",
    "<HostedTool>.type": "a tool that is not offered to the model",
    "<HostedTool>.*": "a tool that is not offered to the model",
    "<AnthropicTool>.type": "a tool that is not offered to the model",
    "<AnthropicTool>.name": "a tool that is not offered to the model",
    "<AnthropicTool>.*": "a tool that is not offered to the model",
    ".signature": "of another server's thoughts, which is dropped",
    ".language": "is the code of a language, or refused",
    ".file": "the sound",
    ".template": "is refused unless it is empty",
    **dict.fromkeys((
        "<PicturePart>", "<SoundPart>", "<VideoPart>", "<PictureInput>", "<VideoInput>", "<ImageBlock>", "<VideoBlock>",
        ".images[]",
    ), MEDIA),
}  # fmt: skip


class Place(NamedTuple):
    """A place for a text in a route's body, and a body with WORD there; `reason`: why the body says it is not shown."""

    name: str
    body: Any
    reason: str = ""


class Places:
    """All places of a route's body, from the model that checks it."""

    def __init__(self, body: Any) -> None:
        self._schema = TypeAdapter(body).json_schema(mode="validation")

    def __iter__(self) -> Iterator[Place]:
        return self._places(self._schema, "")

    def _resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            found = self._schema["$defs"][schema["$ref"].rpartition("/")[2]]
            schema = {**found, **{name: value for name, value in schema.items() if name != "$ref"}}
        return schema

    def _least(self, schema: dict[str, Any]) -> Any:
        schema = self._resolved(schema)
        if "const" in schema or "enum" in schema:
            return schema.get("const", schema.get("enum", [None])[0])
        if branches := schema.get("anyOf", schema.get("oneOf")):
            return self._least(branches[0])
        match schema.get("type"):
            case "string":
                return "web_search_fine" if "web_search_" in schema.get("pattern", "") else "fine"
            case "integer" | "number":
                return max(schema.get("minimum", 0), 1)
            case "array":
                return [self._least(schema["items"])] if schema.get("minItems") else []
            case "object":
                return {name: self._least(schema["properties"][name]) for name in schema.get("required", ())}
        return schema.get("type") == "boolean"

    def _places(self, schema: dict[str, Any], where: str) -> Iterator[Place]:
        schema = self._resolved(schema)
        branches = schema.get("anyOf", schema.get("oneOf"))
        kind = schema.get("type")
        if "const" in schema or "enum" in schema or schema.get("maxItems") == 0:
            return
        if branches:
            for branch in branches:
                yield from self._places(branch, where)
        elif kind == "string":
            yield Place(where, ("web_search_" if "web_search_" in schema.get("pattern", "") else "") + WORD)
        elif kind == "array":
            for place in self._places(schema["items"], f"{where}[]"):
                yield place._replace(body=[place.body])
        elif kind == "object":
            yield from self._inside(schema, where)
        elif kind is None:  # any value
            yield Place(f"{where}.*", {"more": WORD, WORD: 1})

    def _inside(self, schema: dict[str, Any], where: str) -> Iterator[Place]:
        known, least = schema.get("properties", {}), self._least(schema)
        where += f"<{schema['title']}>" if known and where else ""
        for name, one in known.items():
            has_effect = "has no effect" not in one.get("description", "")
            for place in self._places(one, f"{where}.{name}"):
                yield place._replace(
                    body={**least, name: place.body}, reason=place.reason if has_effect else NO_EFFECT
                )
        more = schema.get("additionalProperties", not known)
        if more in (False, {"type": "null"}):
            return
        # A schema is the caller's own, with any keyword.
        reason = UNKNOWN if known and schema["title"] != "ObjectSchema" else ""
        names = schema.get("propertyNames", {}).get("enum", ["more"])
        for name in names:
            yield Place(f"{where}.*", {**least, name: WORD}, reason)
        if not known and names == ["more"]:
            yield Place(f"{where}.*", {**least, WORD: 1}, reason)


def completed(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body with what makes a conversation of it: calls before their results, and a user's turn at the end."""
    body = json.loads(json.dumps(body))
    for holder in (body, body.get("structured_outputs") or {}):
        for name, text in (("json", f'{{"enum": ["{WORD}"]}}'), ("grammar", f'start: "{WORD}"')):
            for spelled in (name, f"guided_{name}"):
                if holder.get(spelled) == WORD:
                    holder[spelled] = text
    match path:
        case "/api/generate" | "/api/embeddings":
            body = {"prompt": "fine"} | body
        case "/api/embed":
            body = {"input": "fine"} | body
        case "/infill":
            body["input_prefix"] += " "
    for name in ("tools", "functions"):
        choice = body.get("tool_choice" if name == "tools" else "function_call")
        if isinstance(choice, dict) and f'"name": "{WORD}"' in json.dumps(choice):
            tool = {"name": WORD, "input_schema": {}} if path == "/v1/messages" else {"name": WORD}
            if name == "tools" and path != "/v1/messages":
                tool = {"type": "function", **(tool if path == "/v1/responses" else {"function": tool})}
            body[name] = [tool]
    if path == "/v1/responses" and isinstance(body["input"], list):
        calls = [
            {"type": "function_call", "call_id": item["call_id"], "name": "f", "arguments": "{}"}
            for item in body["input"]
            if item.get("type") == "function_call_output"
        ]
        body["input"] = [*calls, *body["input"], {"role": "user", "content": "fine"}]
    turns = body.get("messages") or []
    before: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "assistant" and path == "/v1/chat/completions":
            turn.setdefault("content", "fine")
        elif turn["role"] == "tool" and path == "/api/chat":
            named = turn.get("tool_name", turn.get("name", "f"))
            call = {"id": turn.get("tool_call_id", "c"), "function": {"name": named}}
            before += [{"role": "assistant", "tool_calls": [call]}]
        elif turn["role"] == "tool":
            call = {"id": turn["tool_call_id"], "function": {"name": "f", "arguments": "{}"}}
            before += [{"role": "assistant", "tool_calls": [call]}]
        elif turn["role"] == "function":
            before += [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]
        for block in turn.get("content", ()) if path == "/v1/messages" else ():
            if isinstance(block, dict) and block["type"] == "tool_result":
                used = {"type": "tool_use", "id": block["tool_use_id"], "name": "f", "input": {}}
                before += [{"role": "assistant", "content": [used]}]
    if turns or path == "/api/chat":
        body["messages"] = [*before, *turns, {"role": "user", "content": "fine"}]
    return body


class Seen(ArgosyError):
    """What a model would get was noted; it answers nothing."""


@contextmanager
def shown_words(service: Service, path: Path) -> Iterator[tuple[httpx.Client, list[str]]]:
    """A client of a server whose list has WORD, and what its model would get."""
    path.with_name("words.txt").write_text(f"{WORD}\n")
    path.write_text('default = "a"\n[policies.a]\ninput = ["w"]\n[checks.w]\nwords = "words.txt"\n')
    shown: list[str] = []

    def submit(prompt: Any, params: Any = None, *more: Any, **named: Any) -> None:
        text = prompt if isinstance(prompt, str) else service.prompts.detokenize(prompt.token_ids)
        shown.append(f"{text} {getattr(params, 'grammar', '')}")
        raise Seen("seen")

    def infill(before: str, after: str, *, snippets: Sequence[Any], reserved_tokens: int) -> Filling:
        text = " ".join((before, after, *(part for one in snippets for part in one if part)))
        return Filling(Prompt(tuple(service.prompts.tokenize(text)), text), (), 0)

    class Ears:
        name = "tiny.en"

        def transcribe(self, content: Any, options: Any, *, report: Any) -> None:
            shown.append(options.prompt)
            raise Seen("seen")

    form = RerankForm(before="", between="\n", after="\n", yes="a", no="b")
    reranking = Reranking(form, service.tokenizer, context_tokens=service.model.context_tokens)
    ears: Any = Ears()
    own = Service(
        service.loop, service.prompts, service.tokenizer, service.model, reranking=reranking, ears=ears
    )
    app = make_app(
        only(own),
        KeyRing(None),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=Guarding(path)),
    )
    with (
        mock.patch.multiple(service.loop, submit=submit, submit_embedding=submit),
        mock.patch.object(service.prompts, "infill", infill),
        closing(start(app)) as urls,
        httpx.Client(base_url=next(urls), timeout=60) as client,
    ):
        yield client, shown


def outcome(client: httpx.Client, shown: list[str], route: Route, place: Place) -> str:
    """What becomes of WORD at a place: judged, shown, hidden or refused."""
    shown.clear()
    path, body = route.rule.path, place.body
    if route.rule.takes_form:
        form = {name: value for name, value in body.items() if (name, value) != ("model", "fine")}
        data = form.pop("file", "") if place.name == ".file" else "RIFF"
        form.pop("file", None)
        answer = client.post(path, data={"model": "tiny.en", **form}, files={"file": ("a.wav", data)})
    else:
        answer = client.post(path, json=completed(path, body))
    if "not allowed by the policy" in answer.text or '"flagged":true' in answer.text:
        return "judged"
    if shown:
        return "shown" if WORD in " ".join(shown) else "hidden"
    return f"refused: {answer.status_code} {answer.text[:200]}"


def reason_of(place: Place) -> str:
    """Why no model gets the text at a place; empty: one does."""
    listed = (
        reason
        for part, reason in HIDDEN.items()
        if place.name.endswith(part) or (part in place.name and reason is MEDIA)
    )
    return place.reason or next(listed, "")


SCREENED = [route for route in ROUTES if route.rule.screens in ("answers", "texts")]


@pytest.fixture(scope="module")
def words(
    speaking_service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, list[str]]]:
    with shown_words(speaking_service, tmp_path_factory.mktemp("words") / "policy.toml") as found:
        yield found


@pytest.mark.parametrize("route", SCREENED, ids=lambda r: r.rule.path)
def test_every_text_of_a_body_is_judged_or_no_model_gets_it(
    words: tuple[httpx.Client, list[str]], route: Route
) -> None:
    client, shown = words
    for place in Places(route.body):
        found, reason = outcome(client, shown, route, place), reason_of(place)
        if reason:
            assert found == "hidden" or found.startswith("refused"), (place, found)
        else:
            assert found == "judged", (place, found)


def test_no_reason_is_listed_for_a_text_that_no_body_has() -> None:
    names = {place.name for route in SCREENED for place in Places(route.body)}
    for part in HIDDEN:
        assert any(part in name for name in names), part


# Of an answer
SAID = f"{WORD}@example.com"
ANSWERED: dict[str, list[Event]] = {
    "TextDelta.text": [TextDelta(SAID)],
    "ReasoningDelta.text": [ReasoningDelta(SAID)],
    "ToolCallBegin.name": [ToolCallBegin(0, "id", SAID), ToolCallEnd(0)],
    "ToolCallArguments.json_fragment": [
        ToolCallBegin(0, "id", "f"), ToolCallArguments(0, f'{{"{SAID[:3]}'), ToolCallArguments(0, f'{SAID[3:]}": 1}}'),
        ToolCallEnd(0),
    ],
    "ToolCallArguments.json_fragment, escaped": [
        ToolCallBegin(0, "id", "f"), ToolCallArguments(0, '{"a": "\\u007aebrafish\\u0040example.com"}'), ToolCallEnd(0),
    ],
    "ToolCallArguments.json_fragment, cut off": [
        ToolCallBegin(0, "id", "f"), ToolCallArguments(0, '{"a": "\\u007aebrafish\\u0040example.com\\u00'),
    ],
}  # fmt: skip
HIDDEN_ANSWERS = {
    "ToolCallBegin.id": "the server makes it",
    "ToolCallBegin.own_id": "it stays in the server",
}


@pytest.mark.parametrize("said", ANSWERED)
@pytest.mark.parametrize("rule", ['output = ["w"]', 'output = ["x"]', 'pii-output = "block"'])
def test_every_text_of_an_answer_is_judged(tmp_path: Path, said: str, rule: str) -> None:
    (tmp_path / "words.txt").write_text(f"{WORD}\n")
    path = tmp_path / "policy.toml"
    path.write_text(
        f'default = "a"\n[policies.a]\n{rule}\n[checks.w]\nwords = "words.txt"\n'
        '[checks.x]\nurl = "http://127.0.0.1:9/"\n'
    )
    guarding = Guarding(path)

    async def verdict(check: Any, question: Question, *more: Any) -> Verdict:
        return Verdict(WORD in question.text)

    async def answered() -> tuple[list[Event], bool]:
        screening = guarding.screening(None, None, mock.Mock())
        assert screening is not None
        answer = screening.answer()
        sent = [event for event in ANSWERED[said] for event in await answer.take([event])]
        sent += await answer.finish()
        return sent, answer.is_blocked

    with mock.patch.object(guarding.checks, "verdict", verdict):
        assert asyncio.run(answered()) == ([], True)


def test_every_kind_of_text_of_an_answer_is_in_the_table() -> None:
    fields = {
        f"{kind.__name__}.{one.name}"
        for kind in get_args(Event)
        for one in dataclasses.fields(kind)
        if "str" in one.type
    }
    assert fields == {name.partition(",")[0] for name in ANSWERED} | HIDDEN_ANSWERS.keys()


def matrix_lines(client: httpx.Client, shown: list[str]) -> Iterator[str]:
    for route in SCREENED:
        judged, hidden = list[str](), dict[str, int]()
        for place in Places(route.body):
            found = outcome(client, shown, route, place)
            if found == "judged":
                judged.append(re.sub(r"<\w+>", "", place.name))
            else:
                name = reason_of(place) or f"NOT JUDGED: {place.name} {found}"
                hidden[name] = hidden.get(name, 0) + 1
        yield f"{route.rule.path}"
        yield f"  judged ({len(judged)}): {' '.join(dict.fromkeys(judged))}"
        yield from (f"  {number} of no model: {reason}" for reason, number in hidden.items())
    yield f"answers\n  judged: {' '.join(ANSWERED)}"
    yield from (f"  {name}: {reason}" for name, reason in HIDDEN_ANSWERS.items())


def main() -> None:
    """Print what becomes of each text of each body."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_speaking_model(Path(folder) / "model")
        with (
            Engine.open(model, memory="1GiB", threads=1, grammars=True) as engine,
            serving(engine) as service,
            shown_words(service, Path(folder) / "policy.toml") as (client, shown),
        ):
            print(*matrix_lines(client, shown), sep="\n")


if __name__ == "__main__":
    main()
