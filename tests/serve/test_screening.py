"""Policies over HTTP, in every dialect: redacted, restored, blocked, and asked about."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from argosy.config import SamplingParams
from argosy.errors import UsageError
from argosy.guard.guard_models import Question
from argosy.guard.keys import KeyFile, KeyRing
from argosy.guard.policy import HttpCheck
from argosy.guard.screen import RequestScreen
from argosy.guard.verdict import Blocked, CheckFailed, Verdict
from argosy.guard.view import Shown
from argosy.serve.answer.opening import Opening
from argosy.serve.answer.request import TextRequest
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.guards import check_over_http
from argosy.serve.guards.governing import Governing
from argosy.serve.guards.guarding import Guarding
from argosy.serve.http.caller import Caller
from tests.serve.conftest import only, start
from tests.serve.dialects import TOOLS
from tests.serve.record import read_events

POLICY = """
default = "free"
blocked-users = ["mallory"]
[policies.free]
may-choose = [{names}]
[policies.redact]
pii-input = "redact"
[policies.redact-own]
pii-input = "redact"
pii-output = "redact"
[policies.block-given]
pii-input = "block"
[policies.block-own]
pii-output = "block"
[policies.detect]
pii-input = "detect"
pii-output = "detect"
[policies.words-in]
input = ["words"]
[policies.words-out]
output = ["words"]
[policies.asked-in]
input = ["remote"]
[policies.asked-out]
output = ["remote"]
chunk-characters = 50
overlap-characters = 20
[policies.asked-easy]
input = ["easy"]
output = ["easy"]
[policies.hasty-in]
input = ["hasty"]
[policies.hasty-out]
output = ["hasty"]
[policies.hasty-easy]
input = ["hasty-easy"]
output = ["hasty-easy"]
[policies.judged]
input = ["judge"]
[policies.judged-answers]
output = ["judge"]
[policies.all]
input = ["words", "remote", "judge"]
[policies.limited]
requests-per-minute-per-user = 2
[checks.words]
words = "words.txt"
category = "harassment"
[checks.remote]
url = "{url}/v1/moderations"
timeout-s = 50
[checks.easy]
url = "{url}/v1/moderations"
timeout-s = 50
on-failure = "pass"
[checks.hasty]
url = "{url}/v1/moderations"
timeout-s = 0.1
[checks.hasty-easy]
url = "{url}/v1/moderations"
timeout-s = 0.1
on-failure = "pass"
[checks.judge]
model = "tiny"
form = "llama-guard"
timeout-s = 60
"""


class Moderator(ThreadingHTTPServer):
    """Flags texts with "blue moon". `mode` says how it fails."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode = "works"
        self.texts: list[str] = []
        self.may_answer = threading.Event()  # in the mode "waits"
        self.keys: list[str | None] = []


class _Handler(BaseHTTPRequestHandler):
    server: Moderator

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        text = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
        self.server.texts.append(text)
        self.server.keys.append(self.headers["authorization"])
        flagged = "blue moon" in " ".join(text.lower().split())
        body = json.dumps(
            {"results": [{"flagged": flagged, "category_scores": {"hate": 0.9 if flagged else 0.1}}]}
        )
        status = 200
        match self.server.mode:
            case "garbage":
                body = "<html>"
            case "other":
                body = '{"results": [{"flagged": "no"}]}'
            case "huge":
                body = " " * (1 << 20) + body
            case "error":
                status = 500
            case "moved":
                status = 302
            case "waits":
                self.server.may_answer.wait(50)
        data = body.encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.send_header("location", "http://127.0.0.1:1/")
        with suppress(OSError):  # a hasty check is gone
            self.end_headers()
            self.wfile.write(data)


@pytest.fixture(scope="module")
def moderator() -> Iterator[Moderator]:
    with Moderator() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory, moderator: Moderator) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    names = [line[len("[policies.") : -1] for line in POLICY.splitlines() if line.startswith("[policies.")]
    path.with_name("words.txt").write_text("blue moon\n")
    path.write_text(POLICY.format(
        names=", ".join(f'"{name}"' for name in names if name != "free"), url=f"http://127.0.0.1:{moderator.server_port}"
    ))  # fmt: skip
    return path


@pytest.fixture(scope="module")
def guarding(policy_file: Path) -> Guarding:
    return Guarding(policy_file)


@pytest.fixture(scope="module")
def screened_url(speaking_service: Service, guarding: Guarding) -> Iterator[str]:
    app = make_app(
        only(speaking_service),
        KeyRing(None),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=guarding),
    )
    yield from start(app)


@pytest.fixture
def ask(screened_url: str, moderator: Moderator) -> Iterator[Callable[..., httpx.Response]]:
    moderator.mode = "works"
    moderator.texts.clear()
    moderator.may_answer.clear()
    with httpx.Client(base_url=screened_url, timeout=60) as client:

        def post(policy: str, path: str, body: dict[str, Any]) -> httpx.Response:
            return client.post(path, json=body, headers={"x-argosy-policy": policy})

        yield post


Ask = Callable[..., httpx.Response]
ANSWERING = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate",
)  # fmt: skip
every_dialect = pytest.mark.parametrize("path", ANSWERING)


def body_of(path: str, said: str, **more: Any) -> dict[str, Any]:
    """A request for the greedy answer to `said`."""
    if path.startswith("/api/"):
        asked: dict[str, Any] = {"prompt": said}
        if path == "/api/chat":
            asked = {"messages": [{"role": "user", "content": said}]}
        return {"stream": False, "options": {"temperature": 0, "num_predict": 100}, **asked, **more}
    given: dict[str, Any] = {
        "temperature": 0,
        "max_output_tokens" if "responses" in path else "max_tokens": 100,
    }
    match path:
        case "/v1/completions":
            given["prompt"] = said
        case "/v1/responses":
            given["input"] = said
        case _:
            given["messages"] = [{"role": "user", "content": said}]
    return given | more


def said_and_end(path: str, answer: dict[str, Any]) -> tuple[str, str]:
    """The text of a whole answer, and why it ended."""
    match path:
        case "/v1/chat/completions":
            return answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]
        case "/v1/completions":
            return answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        case "/v1/messages":
            return "".join(block.get("text", "") for block in answer["content"]), answer["stop_reason"]
        case "/v1/responses":
            texts = [part["text"] for item in answer["output"] for part in item.get("content", ())]
            return "".join(texts), (answer["incomplete_details"] or {"reason": answer["status"]})["reason"]
        case "/api/chat":
            return answer["message"]["content"], answer["done_reason"]
    return answer["response"], answer["done_reason"]


def last_of(path: str, stream: httpx.Response) -> dict[str, Any]:
    """The event of a stream that says why the answer ended."""
    if path.startswith("/api/"):
        return dict(json.loads(stream.text.splitlines()[-1]))
    events = [event["data"] for event in read_events(stream.text)]
    match path:
        case "/v1/messages":
            return next(event["delta"] for event in events if event["type"] == "message_delta")
        case "/v1/responses":
            return dict(events[-1]["response"])
    return next(event["choices"][0] for event in reversed(events) if event != "[DONE]" and event["choices"])


FILTERED = dict.fromkeys(ANSWERING, "content_filter") | {"/v1/messages": "refusal"}


def prompts_seen(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen, submit = list[str](), service.loop.submit

    def submitted(prompt: Any, *more: Any, **named: Any) -> Any:
        seen.append(service.prompts.detokenize(prompt.token_ids))
        return submit(prompt, *more, **named)

    monkeypatch.setattr(service.loop, "submit", submitted)
    return seen


@every_dialect
def test_a_model_gets_placeholders_and_the_client_gets_its_values_back(
    ask: Ask, speaking_service: Service, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    seen = prompts_seen(speaking_service, monkeypatch)
    asked = "#greet joe@example.com, +49 30 901820"
    whole = ask("redact", path, body_of(path, asked))
    said, _ = said_and_end(path, whole.json())
    assert said == "I wrote to joe@example.com and called +49 30 901820; <EMAIL_9> is nobody."
    stream = ask("redact", path, body_of(path, asked, stream=True))
    assert "EMAIL_1" not in stream.text
    assert "joe@example.com" in stream.text
    assert len(seen) == 2
    for prompt in seen:
        assert "#greet <EMAIL_1>, <PHONE_1>" in prompt
        assert "joe" not in prompt
        assert "901820" not in prompt


def test_the_next_turn_has_the_same_placeholders_and_reuses_the_prompt(ask: Ask) -> None:
    path, first = "/v1/chat/completions", {"role": "user", "content": "#greet joe@example.com, +49 30 901820"}
    more = {"temperature": 0, "max_tokens": 100}
    answer = ask("redact", path, {"messages": [first], **more}).json()
    turns = [
        first,
        answer["choices"][0]["message"] | {"refusal": None},
        {"role": "user", "content": "again #greet"},
    ]
    turns[1] = {"role": "assistant", "content": turns[1]["content"]}
    again = ask("redact", path, {"messages": turns, **more}).json()
    assert again["choices"][0]["message"]["content"] == answer["choices"][0]["message"]["content"]
    told = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= told - 32  # all but a block or two


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_values_in_the_arguments_of_calls_are_restored(ask: Ask, path: str) -> None:
    dialect = path.rpartition("/")[2].replace("completions", "chat")
    body = body_of(path, "#mail joe@example.com", tools=TOOLS[dialect])
    for stream in (False, True):
        answer = ask("redact", path, body | {"stream": stream}).text
        assert "joe@example.com" in answer
        assert "EMAIL_1" not in answer


@every_dialect
def test_values_that_the_model_writes_are_replaced_or_end_the_answer(ask: Ask, path: str) -> None:
    said, _ = said_and_end(path, ask("redact-own", path, body_of(path, "#own joe@example.com")).json())
    assert said == "Ask <EMAIL_2> or anyone else in the office."
    for stream in (False, True):
        answer = ask("block-own", path, body_of(path, "#own", stream=stream))
        assert "ann@" not in answer.text
        assert FILTERED[path] in answer.text


@every_dialect
def test_an_answer_with_a_listed_phrase_ends_before_it_in_the_dialects_own_words(ask: Ask, path: str) -> None:
    whole = ask("words-out", path, body_of(path, "#moon"))
    said, end = said_and_end(path, whole.json())
    assert end == FILTERED[path]
    assert "Tonight there is a".startswith(said.strip())
    stream = ask("words-out", path, body_of(path, "#moon", stream=True))
    assert "Blue" not in stream.text
    assert "Moon" not in stream.text
    last = last_of(path, stream)
    ends = [last.get(name) for name in ("finish_reason", "stop_reason", "done_reason")]
    ends.append((last.get("incomplete_details") or {}).get("reason"))
    assert FILTERED[path] in ends


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_a_call_with_a_listed_phrase_is_not_sent(ask: Ask, path: str) -> None:
    dialect = path.rpartition("/")[2].replace("completions", "chat")
    body = body_of(path, "#lunar", tools=TOOLS[dialect])
    for stream in (False, True):
        answer = ask("words-out", path, body | {"stream": stream})
        assert "moon" not in answer.text.replace("#lunar", "")
        assert FILTERED[path] in answer.text


@every_dialect
@pytest.mark.parametrize("policy", ["words-in", "asked-in", "block-given"])
def test_a_request_that_is_not_allowed_is_refused_in_the_dialects_own_shape(
    ask: Ask, path: str, policy: str
) -> None:
    said = "is joe@example.com there?" if policy == "block-given" else "a blue moon"
    answer = ask(policy, path, body_of(path, said, stream=True))
    assert answer.status_code == 400
    assert "joe" not in answer.text
    assert "moon" not in answer.text
    message = answer.json()["error"]
    if not path.startswith("/api/"):
        message = message["message"]
    reason = {"words-in": "words", "asked-in": "remote", "block-given": "personal data"}[policy]
    assert message == f"the request is not allowed by the policy of this server ({reason})"
    if path.startswith(("/v1/chat", "/v1/completions", "/v1/responses")):
        assert answer.json()["error"]["code"] == "content_filter"
    assert ask(policy, path, body_of(path, "#plain")).status_code == 200


@pytest.mark.parametrize("mode", ["garbage", "other", "huge", "error", "moved", "waits"])
def test_a_check_that_fails_counts_as_the_policy_says(ask: Ask, moderator: Moderator, mode: str) -> None:
    path = "/v1/chat/completions"
    moderator.mode = mode
    asked = f"#plain {mode}"  # a text that no test asked about before
    kind = "hasty" if mode == "waits" else "asked"
    closed = ask(f"{kind}-in", path, body_of(path, asked))
    assert (closed.status_code, closed.headers["retry-after"]) == (503, "5")
    assert "does not answer, and the policy requires it" in closed.json()["error"]["message"]
    said, end = said_and_end(path, ask(f"{kind}-out", path, body_of(path, asked)).json())
    assert (said, end) == ("", "content_filter")
    said, end = said_and_end(path, ask(f"{kind}-easy", path, body_of(path, asked)).json())
    assert (said, end) == ("It is well, thank you.", "stop")
    moderator.may_answer.set()


def test_a_check_that_nobody_answers_counts_as_the_policy_says(
    tmp_path: Path, speaking_service: Service
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        'default = "a"\n[policies.a]\ninput = ["x"]\n[checks.x]\nurl = "http://127.0.0.1:9/v1/moderations"\n'
    )
    app = make_app(
        only(speaking_service),
        KeyRing(None),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=Guarding(path)),
    )
    for url in start(app):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "#plain"}, timeout=30)
        assert answer.status_code == 503


def test_a_passage_is_asked_about_as_a_whole_and_never_sent_in_part(ask: Ask, moderator: Moderator) -> None:
    path = "/v1/chat/completions"
    answer = ask("asked-out", path, body_of(path, "#moon", stream=True))
    assert "Blue" not in answer.text
    assert '"finish_reason":"content_filter"' in answer.text
    moderator.texts.clear()
    long = ask("asked-out", path, body_of(path, "#long", max_tokens=300))
    assert said_and_end(path, long.json())[1] in ("stop", "length")
    assert len(moderator.texts) > 3
    assert max(map(len, moderator.texts)) < 1500


def test_a_text_that_passed_is_not_asked_about_again(ask: Ask, moderator: Moderator) -> None:
    path, turns = "/v1/chat/completions", [{"role": "user", "content": "#plain once"}]
    body = {"messages": turns, "max_tokens": 2}
    ask("asked-in", path, body)
    turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "#plain twice"}]
    ask("asked-in", path, body)
    assert moderator.texts == ["#plain once", "Yes.\n\n#plain twice"]


def test_a_model_of_the_server_judges_requests_and_answers(ask: Ask) -> None:
    path = "/v1/chat/completions"
    assert ask("judged", path, body_of(path, "#safe")).status_code == 200
    refused = ask("judged", path, body_of(path, "#unsafe"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_filter")
    assert ask("judged", path, body_of(path, "#odd")).status_code == 503  # it answers in no known form


def test_a_model_is_asked_about_an_answer_after_the_turn_that_it_answers(
    ask: Ask, speaking_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, path = prompts_seen(speaking_service, monkeypatch), "/v1/chat/completions"
    for asked, said, end in (("#kind", "Water it every day. #safe", "stop"), ("#harm", "", "content_filter")):
        seen.clear()
        assert said_and_end(path, ask("judged-answers", path, body_of(path, asked)).json()) == (said, end)
        question = seen[1]
        assert f"user\n{asked}<|im_end|>" in question
        assert "safe<|im_end|>" in question  # the answer's turn is over
        assert question.rstrip().endswith("<|im_start|>assistant")


def judged_by(path: Path, verdict: Callable[[HttpCheck, Question], Verdict]) -> Guarding:
    """A server whose one check of the input answers what `verdict` returns or raises."""
    path.write_text(
        'default = "a"\n[policies.a]\ninput = ["x"]\n[checks.x]\non-failure = "pass"\n'
        'url = "http://127.0.0.1:1/lax"\n'
    )
    guarding = Guarding(path)

    async def answered(check: Any, question: Question, *_: Any) -> Verdict:
        return verdict(check, question)

    guarding.checks.verdict = answered  # type: ignore[method-assign]
    return guarding


def require_allowed(guarding: Guarding, *texts: str) -> None:
    screening = guarding.screening(None, None, lambda verdict: None)
    assert screening is not None
    asyncio.run(screening.require_allowed(texts))


def test_a_check_that_failed_is_asked_again_about_the_same_text(tmp_path: Path) -> None:
    fails = True

    def verdict(_: HttpCheck, question: Question) -> Verdict:
        if fails:
            raise CheckFailed("down")
        return Verdict("bad" in question.text)

    guarding = judged_by(tmp_path / "policy.toml", verdict)
    require_allowed(guarding, "a bad text")  # the policy lets it pass while the check is down
    fails = False
    with pytest.raises(Blocked):
        require_allowed(guarding, "a bad text")


def test_a_text_that_passed_in_a_conversation_is_judged_again_in_another(tmp_path: Path) -> None:
    asked: list[str] = []

    def verdict(_: HttpCheck, question: Question) -> Verdict:
        asked.append(question.text)
        return Verdict("bad" in question.text and "in a novel" not in question.text)

    guarding = judged_by(tmp_path / "policy.toml", verdict)
    require_allowed(guarding, "in a novel", "a bad text")
    require_allowed(guarding, "in a novel", "a bad text", "go on")
    assert asked[-1] == "go on"
    for alone in (("a bad text",), ("go on", "a bad text")):
        with pytest.raises(Blocked):
            require_allowed(guarding, *alone)
    require_allowed(guarding, "in a novel")
    assert asked[-1] == "in a novel"  # what passed was longer


def test_a_text_that_passed_before_a_reload_is_judged_by_the_new_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"

    def verdict(check: HttpCheck, _: Question) -> Verdict:
        if check.url.endswith("lax"):  # while it judges, the operator makes it strict
            path.write_text(path.read_text().replace("lax", "strict"))
            judging.reload()
        return Verdict(check.url.endswith("strict"))

    judging = judged_by(path, verdict)
    require_allowed(judging, "a bad text")
    with pytest.raises(Blocked):
        require_allowed(judging, "a bad text")


def test_a_question_whose_time_is_over_leaves_no_answer_running(
    speaking_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read, has_begun, cancelled = threading.Event(), threading.Event(), list[Any]()
    submitted = prompts_seen(speaking_service, monkeypatch)
    cancel = speaking_service.loop.cancel

    def cancelling(request: Any) -> None:
        cancelled.append(request)
        cancel(request)

    def read() -> TextRequest:
        has_begun.set()
        may_read.wait(30)
        return TextRequest(prompt="#long", params=SamplingParams(max_tokens=400))

    async def ask() -> None:
        opening = asyncio.ensure_future(Opening(speaking_service, Caller()).answers([read]))
        await asyncio.to_thread(has_begun.wait, 30)
        opening.cancel()
        await asyncio.wait([opening])
        may_read.set()
        while not submitted:
            await asyncio.sleep(0.01)
        until = time.monotonic() + 10
        while not cancelled and time.monotonic() < until:
            await asyncio.sleep(0.01)

    monkeypatch.setattr(speaking_service.loop, "cancel", cancelling)
    asyncio.run(ask())
    assert len(cancelled) == 1


def test_moderations_cut_long_texts_and_count_the_tokens_of_a_model(
    tmp_path: Path, speaking_service: Service, policy_file: Path, moderator: Moderator
) -> None:
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("a", scopes=("infer",), tokens_per_day=10)[1]
    app = make_app(
        only(speaking_service),
        KeyRing(keys),
        block_tokens=16,
        max_sequences=8,
        governance=Governing(guarding=Guarding(policy_file)),
    )
    moderator.mode = "works"
    moderator.texts.clear()
    for url in start(app):
        with httpx.Client(base_url=url, timeout=60, headers={"authorization": f"Bearer {secret}"}) as client:

            def moderate(policy: str, text: str) -> httpx.Response:
                return client.post(
                    "/v1/moderations", json={"input": text}, headers={"x-argosy-policy": policy}
                )

            long = "fine " * 9000 + "a blue moon"
            assert moderate("asked-in", long).json()["results"][0]["flagged"]
            assert max(map(len, moderator.texts)) < len(long) / 2
            assert moderate("judged", "#safe").json()["results"][0]["flagged"] is False
            assert moderate("judged", "#safe").status_code == 429


@pytest.mark.parametrize("policy", ["block-given", "words-in", "asked-in"])
def test_texts_that_cannot_fit_are_refused_before_they_are_searched(
    ask: Ask, moderator: Moderator, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    searched: list[int] = []
    check = RequestScreen.check

    def checking(self: RequestScreen, shown: Shown, **more: bool) -> Any:
        searched.append(sum(map(len, shown.all_texts())))
        return check(self, shown, **more)

    monkeypatch.setattr(RequestScreen, "check", checking)
    digits = "4111 1111 1111 1112 " * 20_000
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"):
        answer = ask(policy, path, body_of(path, digits))
        assert answer.status_code == 400
        assert "context" in answer.text, answer.text
    assert ask(policy, "/v1/embeddings", {"input": digits}).status_code == 400
    assert not searched
    assert not moderator.texts
    cut = ask(
        "words-in", "/api/embed", {"input": digits}
    )  # its beginning is embedded, and no more of it is read
    assert (cut.status_code, cut.headers["x-truncated-texts"]) == (200, "1")
    assert max(searched) < len(digits) / 4


def test_arguments_with_too_many_values_are_refused_before_they_are_parsed(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argosy.guard.view.parse_json", lambda text: pytest.fail("it was parsed"))
    call = {"name": "f", "arguments": '{"a":[' + "[]," * (1 << 17) + "1]}"}
    messages = [
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "c", "content": "fine"},
    ]
    answer = ask("words-in", "/v1/chat/completions", {"messages": messages})
    assert answer.status_code == 400
    assert "arguments have more than 131072 values" in answer.text


def test_log_probabilities_are_refused_where_they_would_show_what_is_held_back(ask: Ask) -> None:
    for policy, status in (("words-out", 400), ("redact", 400), ("words-in", 200), ("detect", 200)):
        answer = ask(policy, "/v1/completions", {"prompt": "#plain", "logprobs": 1, "max_tokens": 3})
        assert answer.status_code == status, policy
        if status == 200:
            assert answer.json()["choices"][0]["logprobs"]["tokens"]


def test_a_prompt_of_token_ids_is_checked_as_text(ask: Ask, speaking_service: Service) -> None:
    def ids(text: str) -> list[int]:
        return speaking_service.prompts.tokenize(text)

    path = "/v1/completions"
    assert ask("words-in", path, {"prompt": ids("a blue moon"), "max_tokens": 1}).status_code == 400
    assert ask("redact", path, {"prompt": ids("joe@example.com"), "max_tokens": 1}).status_code == 400
    assert ask("redact", path, {"prompt": ids("#plain"), "max_tokens": 1}).status_code == 200


def test_an_echo_has_the_values_that_the_client_sent(ask: Ask) -> None:
    answer = ask(
        "redact", "/v1/completions", {"prompt": "#greet joe@example.com", "echo": True, "max_tokens": 20}
    )
    assert answer.json()["choices"][0]["text"].startswith("#greet joe@example.com")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["fine", "a blue moon"]}),
        ("/api/embed", {"input": "a blue moon"}),
        ("/api/embeddings", {"prompt": "a blue moon"}),
    ],
)
def test_texts_to_embed_are_checked(ask: Ask, path: str, body: dict[str, Any]) -> None:
    for policy in ("words-in", "asked-in"):
        assert ask(policy, path, body).status_code == 400


def test_a_request_may_name_only_a_policy_that_its_own_policy_lists(ask: Ask, screened_url: str) -> None:
    answer = ask("nobody", "/v1/completions", {"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-argosy-policy")
    assert ask("nobody", "/tokenize", {"content": "a"}).status_code == 200  # nothing is checked there


def test_moderations_has_openais_shape_for_its_own_client(ask: Ask, screened_url: str) -> None:
    headers = {"x-argosy-policy": "all"}
    with openai.OpenAI(
        base_url=f"{screened_url}/v1", api_key="-", default_headers=headers, max_retries=0
    ) as client:
        made = client.moderations.create(input=["#safe and fine", "a blue moon #unsafe"])
        fine, bad = made.results
        assert made.model == "words+remote+judge"
        assert (fine.flagged, bad.flagged) == (False, True)
        assert (bad.categories.harassment, bad.categories.violence, bad.categories.hate) == (True, True, True)
        assert (bad.categories.sexual_minors, bad.category_scores.sexual_minors) == (False, 0.0)
        assert bad.category_scores.hate == pytest.approx(0.9)
        assert bad.category_applied_input_types.violence == ["text"]
        one = client.moderations.create(input="a blue moon", model="words")
        assert one.results[0].category_scores.hate == 0.0
        client.moderations.create(input="a #safe one", model="omni-moderation-latest")
        with pytest.raises(
            openai.NotFoundError, match="there is no such check; the policy has: words, remote, judge"
        ):
            client.moderations.create(input="a", model="another")
    assert ask("free", "/v1/moderations", {"input": "a"}).status_code == 404


def test_real_clients_read_a_filtered_answer(screened_url: str) -> None:
    headers = {"x-argosy-policy": "words-out"}
    asked: Any = [{"role": "user", "content": "#moon"}]
    server: Any = {"api_key": "-", "default_headers": headers, "max_retries": 0}
    with openai.OpenAI(base_url=f"{screened_url}/v1", **server) as client:
        chunks = list(
            client.chat.completions.create(model="tiny", messages=asked, temperature=0, stream=True)
        )
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "content_filter"
        response = client.responses.create(model="tiny", input="#moon", temperature=0)
        assert response.incomplete_details is not None
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
    with (
        anthropic.Anthropic(base_url=screened_url, **server) as anthropic_client,
        anthropic_client.messages.stream(
            model="tiny", messages=asked, max_tokens=60, extra_body={"temperature": 0}
        ) as stream,
    ):
        assert stream.get_final_message().stop_reason == "refusal"


def test_each_user_of_a_key_is_limited_and_some_are_blocked(ask: Ask) -> None:
    chat, path = (
        {"messages": [{"role": "user", "content": "#plain"}], "max_tokens": 1},
        "/v1/chat/completions",
    )
    for name in ("safety_identifier", "user"):
        statuses = [ask("limited", path, chat | {name: f"anna-{name}"}).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
    assert ask("limited", path, chat | {"user": "ben"}).status_code == 200
    for policy, ignored in (("free", None), ("words-in", None)):
        assert ask(policy, path, chat | {"user": "ben"}).headers.get("x-ignored-params") == ignored
    messages = chat | {"metadata": {"user_id": "carl"}}
    assert [ask("limited", "/v1/messages", messages).status_code for _ in range(3)] == [200, 200, 429]
    responses = {"input": "#plain", "max_output_tokens": 1, "safety_identifier": "mallory"}
    refused = ask("limited", "/v1/responses", responses)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "user_blocked")
    for where, body in (
        ("/v1/embeddings", {"input": "a", "user": "mallory"}),
        (path, chat | {"safety_identifier": "anna", "user": "mallory"}),
        (path, chat | {"prompt_cache_key": "mallory"}),
        ("/v1/responses/input_tokens", {"input": "a", "user": "mallory"}),
    ):
        refused = ask("free", where, body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "user_blocked"), where


def test_what_is_found_is_counted_and_never_shown(
    ask: Ask, screened_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = httpx.get(f"{screened_url}/metrics").text
    said = "#own canary-5f@example.com"
    answer = ask("detect", "/v1/chat/completions", body_of("/v1/chat/completions", said))
    assert "ann@example.org" in answer.text
    after = httpx.get(f"{screened_url}/metrics").text
    for side in ("input", "output"):
        label = f'argosy_guard_found_total{{found="pii:email",side="{side}"}}'
        assert label in after
        assert after.split(label)[1].split()[0] != before.partition(label)[2].partition("\n")[0].strip()
    assert "canary-5f" not in after + caplog.text


def test_what_was_decided_is_noted_for_a_record_of_the_request(
    ask: Ask, guarding: Guarding, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, of = list[dict[str, None]](), guarding.screening

    def screening(key: Any, chosen: str | None, found: Callable[[str], None]) -> Any:
        verdicts: dict[str, None] = {}
        kept.append(verdicts)
        return of(key, chosen, lambda verdict: verdicts.update({verdict: None}))

    monkeypatch.setattr(guarding, "screening", screening)
    path = "/v1/chat/completions"
    ask("redact-own", path, body_of(path, "#own joe@example.com"))
    ask("words-in", path, body_of(path, "a blue moon"))
    digest = f"policy_sha256 {guarding.digest}"
    assert [list(verdicts) for verdicts in kept] == [
        ["policy redact-own", digest, "input pii:email", "output pii:email"],
        ["policy words-in", digest, "input words"],
    ]


def test_the_key_of_a_check_comes_from_the_environment(
    tmp_path: Path, moderator: Moderator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "policy.toml"
    url = f"http://127.0.0.1:{moderator.server_port}/v1/moderations"
    path.write_text(
        'default = "a"\n[policies.a]\ninput = ["x"]\n[checks.x]\n' + f'url = "{url}"\nkey-env = "THE_KEY"\n'
    )
    monkeypatch.delenv("THE_KEY", raising=False)
    with pytest.raises(UsageError, match=r"checks.x.key-env: the variable THE_KEY is not set"):
        Guarding(path)
    monkeypatch.setenv("THE_KEY", "s3cret")
    screening = Guarding(path).screening(None, None, lambda verdict: None)
    assert screening is not None
    (check,) = screening.screen.asked_checks
    assert isinstance(check, HttpCheck)
    moderator.mode = "works"
    assert not check_over_http.judge(check, "fine").is_flagged
    assert moderator.keys[-1] == "Bearer s3cret"


def test_policies_are_read_again_and_a_mistake_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('default = "a"\n[policies.a]\npii-input = "detect"\n')
    guarding = Guarding(path)
    guarding.require_models(["tiny"])
    digest = guarding.digest
    path.write_text('default = "b"\n')
    with pytest.raises(UsageError, match="no such policy"):
        guarding.reload()
    assert guarding.digest == digest
    path.write_text(
        'default = "b"\n[policies.b]\ninput = ["x"]\n[checks.x]\nmodel = "absent"\nform = "llama-guard"\n'
    )
    with pytest.raises(UsageError, match="asks the model absent, and this server has: tiny"):
        guarding.reload()
    assert guarding.digest == digest
    path.write_text('default = "b"\n[policies.b]\n')
    guarding.reload()
    assert guarding.digest != digest
    verdicts: list[str] = []
    screening = guarding.screening(None, None, verdicts.append)
    assert screening is not None
    assert verdicts == ["policy b", f"policy_sha256 {guarding.digest}"]
    assert screening.policy.name == "b"


def test_a_stopped_model_key_or_user_is_refused_at_once_and_a_running_answer_ends(
    screened_url: str, guarding: Guarding
) -> None:
    def stop(kind: str, name: str, is_stopped: bool = True) -> httpx.Response:
        body = {"kind": kind, "name": name, "is_stopped": is_stopped}
        return httpx.post(f"{screened_url}/v1/engine/stops", json=body)

    chat = {"messages": [{"role": "user", "content": "#long"}], "max_tokens": 400, "temperature": 0}
    try:
        with httpx.stream(
            "POST", f"{screened_url}/v1/chat/completions", json=chat | {"stream": True}
        ) as answer:
            lines = answer.iter_lines()
            for _ in range(6):
                next(lines)
            assert stop("model", "tiny").json()["model"] == ["tiny"]
            rest = "\n".join(lines)
        assert "has stopped this model" in rest
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/embeddings", {"input": "a"}),
            ("/tokenize", {"content": "a"}),
        ):
            refused = httpx.post(screened_url + path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_stopped")
    finally:
        assert stop("model", "tiny", is_stopped=False).json()["model"] == []
    assert httpx.post(f"{screened_url}/tokenize", json={"content": "a"}).status_code == 200
    assert stop("model", "another").status_code == 404
    assert stop("key", "local").status_code == 400  # the key of this very request
    try:
        stop("user", "eve")
        headers = {"x-argosy-policy": "limited"}
        refused = httpx.post(
            f"{screened_url}/v1/chat/completions", json=chat | {"user": "eve"}, headers=headers
        )
        assert refused.status_code == 403
    finally:
        stop("user", "eve", is_stopped=False)
    listed = httpx.get(f"{screened_url}/v1/engine/stops").json()
    assert listed == {"model": [], "key": [], "user": [], "is_saved": True}


def test_other_requests_go_on_while_a_check_is_slow(
    ask: Ask, moderator: Moderator, screened_url: str
) -> None:
    moderator.mode = "waits"
    path = "/v1/chat/completions"
    done: list[int] = []
    waiting = threading.Thread(
        target=lambda: done.append(ask("asked-in", path, body_of(path, "#plain unheard of")).status_code)
    )
    waiting.start()
    until = time.monotonic() + 30
    while not moderator.texts:
        assert time.monotonic() < until
    assert httpx.post(f"{screened_url}/tokenize", json={"content": "a"}, timeout=60).status_code == 200
    assert not done  # the other one was answered first
    moderator.may_answer.set()
    waiting.join()
    assert done == [200]


def test_the_tokens_that_an_answer_begins_with_are_checked_as_its_text_is(
    ask: Ask, speaking_service: Service
) -> None:
    def begun(text: str) -> dict[str, Any]:
        token_ids = speaking_service.prompts.tokenize(text)
        return body_of("/v1/chat/completions", "#plain", continue_token_ids=token_ids)

    path = "/v1/chat/completions"
    for policy, text in (
        ("words-in", "a blue moon"), ("block-given", "joe@example.com"), ("redact", "joe@example.com"),
    ):  # fmt: skip
        answer = ask(policy, path, begun(text))
        assert answer.status_code == 400, policy
        assert "policy of this server" in answer.text
        assert ask(policy, path, begun("fine")).status_code == 200
    for stream in (False, True):
        held = ask("words-out", path, begun("a blue moon") | {"stream": stream})
        assert "moon" not in held.text
        assert FILTERED[path] in held.text


def test_tokens_are_told_only_where_no_policy_may_hold_their_text_back(ask: Ask) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        for stream in (False, True):
            body = body_of(path, "#plain", return_token_ids=True, stream=stream)
            for policy, tells in (("words-in", True), ("words-out", False), ("redact", False)):
                answer = ask(policy, path, body)
                assert answer.status_code == 200
                assert ("token_ids" in answer.text) == tells, (path, stream, policy)
