"""Ollama's API over a real socket: names, options, calls and their results, pictures, and what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from argosy import Engine
from argosy.guard.keys import KeyRing
from argosy.serve.answer.service import Service
from argosy.serve.app import make_app
from argosy.serve.dialects.ollama import HINTS
from tests.media.samples import pattern, png
from tests.serve.conftest import alive_at_once, only, serving, start
from tests.serve.dialects import TOOLS
from tests.serve.record import read_lines
from tests.serve.seeing_model import write_seeing_model

GREEDY = {"temperature": 0, "num_predict": 200}


def ask(speaker: httpx.Client, said: str, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": said}], "options": GREEDY, "stream": False}
    answer = speaker.post("/api/chat", json=body | more)
    assert answer.status_code == 200, answer.text
    return answer


def refusal(answer: httpx.Response) -> str:
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert isinstance(error, str)
    return error


@pytest.mark.parametrize("name", ["tiny", "tiny:latest", None])
def test_a_name_means_the_same_model_with_and_without_its_tag(
    speaker: httpx.Client, name: str | None
) -> None:
    assert ask(speaker, "#plain", model=name).json()["model"] == "tiny"
    if name is not None:
        for field in ("model", "name"):
            assert speaker.post("/api/show", json={field: name}).status_code == 200
    assert speaker.post("/api/chat", json={"model": "tiny:30b", "messages": []}).status_code == 404


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_json_of_any_content_type_is_read_unless_a_browser_sends_it(
    speaker: httpx.Client, content_type: str | None
) -> None:
    """`curl -d` of Ollama's documentation and LiteLLM send JSON like this."""
    content = json.dumps(
        {"model": "tiny", "messages": [{"role": "user", "content": "#plain"}], "stream": False}
    )
    headers = {} if content_type is None else {"content-type": content_type}
    answer = speaker.post("/api/chat", content=content, headers=headers)
    assert answer.status_code == 200
    assert answer.json()["message"]["content"] == "It is well, thank you."
    own = f"{speaker.base_url}".rstrip("/")
    for more in ({"origin": own}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        assert speaker.post("/api/chat", content=content, headers=headers | more).status_code == 415
    for more in ({"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
        assert speaker.post("/api/chat", content=content, headers=headers | more).status_code == 403
    assert speaker.post("/v1/chat/completions", content=content, headers=headers).status_code == 415


def test_a_stream_is_the_default_and_null_means_the_default(speaker: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "#plain"}], "options": GREEDY}
    for more in ({}, {"stream": None}, {"stream": True}):
        answer = speaker.post("/api/chat", json=body | more)
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in read_lines(answer.text)]
        assert len(lines) > 3
        assert "".join(line["message"]["content"] for line in lines) == "It is well, thank you."
        assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


def test_options_choose_tokens_as_fields_of_other_dialects_do(client: httpx.Client) -> None:
    said = [{"role": "user", "content": "Hi"}]
    chosen = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 7, "repeat_penalty": 1.2,
              "presence_penalty": 0.5, "frequency_penalty": 0.5}  # fmt: skip
    ours = client.post(
        "/api/chat", json={"messages": said, "options": chosen | {"num_predict": 24}, "stream": False}
    ).json()
    theirs = client.post("/v1/chat/completions", json={"messages": said, "max_tokens": 24} | chosen).json()
    assert ours["message"]["content"] == theirs["choices"][0]["message"]["content"]
    assert ours["eval_count"] == theirs["usage"]["completion_tokens"]
    greedy = client.post(
        "/api/chat",
        json={"messages": said, "options": {"temperature": 0, "num_predict": 24}, "stream": False},
    ).json()
    assert greedy["message"]["content"] != ours["message"]["content"]  # otherwise the options prove nothing


def test_options_without_effect_are_named_and_wrong_values_refused(speaker: httpx.Client) -> None:
    options = GREEDY | {"num_ctx": 65536, "num_gpu": 99, "mirostat": 1, "no such name!": 1}
    answer = ask(speaker, "#plain", options=options, keep_alive=-1, shift=True)
    assert answer.headers["x-ignored-params"] == (
        "options.num_ctx, keep_alive, shift, options.mirostat, options.num_gpu"
    )
    for wrong in ({"temperature": "0"}, {"top_k": 1.5}, {"num_predict": -3}, {"stop": [""]}, {"seed": -2}):
        body = {"messages": [{"role": "user", "content": "Hi"}], "options": wrong}
        name = next(iter(wrong))
        assert refusal(speaker.post("/api/chat", json=body)).startswith(f"options.{name}")


def test_results_belong_to_calls_by_id_by_name_or_in_order(speaker: httpx.Client) -> None:
    def conversation(calls: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": "#weather"},
            {"role": "assistant", "tool_calls": calls},
            *({"role": "tool", "content": "#sunny", **result} for result in results),
        ]

    one = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    text = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    two = {"id": "b", "type": "function", "function": {"index": 1, "name": "get_time"}}
    for calls, results in (
        ([one, two], [{}, {}]),
        ([one, text], [{"tool_name": "get_weather"}, {"name": "get_weather"}]),
        ([one, two], [{"tool_call_id": "b"}, {"tool_name": "get_weather"}]),
        ([one, two], [{"tool_name": "get_time"}, {"tool_call_id": "unknown"}]),
    ):
        answer = ask(speaker, "", messages=conversation(calls, results), tools=TOOLS["chat"])
        assert answer.json()["message"]["content"] == "It is sunny in both."
    for calls, results in (
        ([], [{}]),
        ([one], [{}, {}]),
        ([one], [{"tool_name": "get_time"}]),
    ):
        messages = conversation(calls, results) if calls else [{"role": "tool", "content": "a"}]
        assert "a tool result, but no earlier call" in refusal(
            speaker.post("/api/chat", json={"messages": messages})
        )


def test_an_answer_is_recognised_when_it_is_sent_back(speaker: httpx.Client) -> None:
    """The client sends the calls back as it got them; the prompt then holds the tokens that the model sampled."""
    first = [{"role": "user", "content": "#thoughtful"}]
    said = ask(speaker, "", messages=first, tools=TOOLS["chat"]).json()
    assert said["message"]["thinking"] == "Two cities."
    results = [{"role": "tool", "tool_name": "get_weather", "content": "#sunny"}] * 2
    again = ask(speaker, "", messages=[*first, said["message"], *results], tools=TOOLS["chat"]).json()
    assert again["message"]["content"] == "It is sunny in both."
    assert again["prompt_eval_count"] > said["prompt_eval_count"] + said["eval_count"]


def test_thinking_is_switched_if_the_model_can_and_named_otherwise(
    speaker: httpx.Client, client: httpx.Client
) -> None:
    thought = ask(speaker, "#think", think=True)
    assert thought.json()["message"] == {
        "role": "assistant", "content": "It is well.", "thinking": "Let me see."
    }  # fmt: skip
    assert "x-ignored-params" not in thought.headers
    for think in (True, "high"):
        assert ask(client, "Hi", think=think).headers["x-ignored-params"] == "think"
    assert "think: expected" in refusal(
        speaker.post("/api/chat", json={"messages": [{"role": "user", "content": "Hi"}], "think": "a lot"})
    )


@pytest.mark.parametrize("form", ["json", "", None])
def test_a_form_may_be_json_or_absent(speaker: httpx.Client, form: str | None) -> None:
    assert ask(speaker, "#json", format=form).json()["message"]["content"] == '{"answer": 42}'


def test_a_raw_prompt_is_continued_as_a_completion_is(client: httpx.Client) -> None:
    options = {"temperature": 0, "num_predict": 12}
    raw = {"prompt": "The quick brown fox", "raw": True, "options": options, "stream": False, "think": True}
    ours = client.post("/api/generate", json=raw)
    body = {"prompt": "The quick brown fox", "temperature": 0, "max_tokens": 12}
    theirs = client.post("/v1/completions", json=body).json()
    assert ours.json()["response"] == theirs["choices"][0]["text"]
    assert ours.json()["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]
    assert ours.headers["x-ignored-params"] == "think"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"template": "{{ .Prompt }}"},
            "template: expected nothing, because a request cannot bring a template",
        ),
        ({"suffix": "}"}, "this model cannot fill in a text: its vocabulary has no tokens for that"),
        ({"suffix": "}", "system": "Be brief."}, "suffix: a prompt with a suffix has no place for system"),
        ({"context": [1, 2]}, "context: expected nothing, because /api/chat takes a conversation"),
        ({"raw": True, "system": "Be brief."}, "raw: a raw prompt has no place for system or images"),
        ({"width": 512}, "unknown field 'width'"),
        ({"images": [7]}, "images.0: expected a valid string"),
        ({"images": ["https://example.org/a.png"]}, "images.0: this model reads text only"),
    ],
)
def test_what_a_prompt_cannot_have_is_refused_by_name(
    client: httpx.Client, more: dict[str, Any], told: str
) -> None:
    assert refusal(client.post("/api/generate", json={"prompt": "Hi"} | more)).startswith(told)
    empty = {name: type(value)() for name, value in more.items() if name in ("template", "suffix", "context")}
    small = {"prompt": "Hi", "options": {"num_predict": 1}, "stream": False}
    assert client.post("/api/generate", json=small | empty).status_code == 200


@pytest.mark.parametrize("kept", [0, 0.0, "0", "0s", "0.0m"])
def test_a_servers_only_model_stays_and_says_so(client: httpx.Client, kept: Any) -> None:
    for path, said in (
        ("/api/generate", {"response": ""}),
        ("/api/chat", {"message": {"role": "assistant", "content": ""}}),
    ):
        answer = client.post(path, json={"model": "tiny", "keep_alive": kept})
        assert answer.json().items() >= ({"model": "tiny", "done_reason": "load"} | said).items()
        assert answer.headers["x-ignored-params"] == "keep_alive"
    assert client.get("/api/ps").json()["models"]


def test_lists_and_facts_have_what_clients_read(client: httpx.Client, service: Service) -> None:
    (listed,) = client.get("/api/tags").json()["models"]
    (loaded,) = client.get("/api/ps").json()["models"]
    assert listed["name"] == listed["model"] == loaded["name"] == "tiny:latest"
    assert listed["digest"] == loaded["digest"]
    assert len(bytes.fromhex(listed["digest"])) == 32
    assert listed["details"]["family"] == service.model.family
    assert loaded["context_length"] == service.model.context_tokens
    shown = client.post("/api/show", json={"model": "tiny"}).json()
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] == service.model.context_tokens
    assert shown["model_info"][f"{family}.expert_used_count"] == service.model.experts_per_token
    assert shown["capabilities"] == ["completion", "tools"]
    assert refusal(client.post("/api/show", json={})) == "model: expected a name, found nothing"
    assert int(client.get("/api/version").json()["version"].split(".")[1]) >= 13
    assert (client.head("/").status_code, client.head("/").content) == (200, b"")


@pytest.mark.parametrize("path", [*HINTS, "/api/blobs/sha256:0"])
@pytest.mark.parametrize("method", ["POST", "DELETE", "HEAD"])
def test_what_changes_models_is_refused_with_the_command_to_use(
    client: httpx.Client, path: str, method: str
) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 404
    if method != "HEAD":
        hint = HINTS["/".join(path.split("/")[:3])]
        assert answer.json() == {"error": f"there is no such path\nhint: {hint}"}


def test_a_silent_stream_sends_lines_that_say_nothing(
    speaker: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive_at_once(monkeypatch)
    body = {"messages": [{"role": "user", "content": "#plain"}], "options": GREEDY}
    lines = [json.loads(line) for line in read_lines(speaker.post("/api/chat", json=body).text)]
    silent = [line for line in lines if not line["message"]["content"] and not line["done"]]
    assert [line["message"] for line in silent] == [{"role": "assistant", "content": ""}]
    assert "".join(line["message"]["content"] for line in lines) == "It is well, thank you."


# Pictures


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model: Path = write_seeing_model(tmp_path_factory.mktemp("seeing") / "model")
    with (
        Engine.open(model, memory="4GiB", media=True, threads=2, grammars=True) as engine,
        serving(engine) as service,
    ):
        for url in start(make_app(only(service), KeyRing(None), block_tokens=16, max_sequences=8)):
            with httpx.Client(base_url=url, timeout=60) as client:
                yield client


def test_pictures_are_seen_and_are_the_same_as_in_other_dialects(seeing: httpx.Client) -> None:
    data = base64.b64encode(png(pattern(64, 48))).decode()
    options = {"temperature": 0, "num_predict": 6}
    body = {"prompt": "What is it?", "images": [data], "options": options, "stream": False}
    ours = seeing.post("/api/generate", json=body)
    assert ours.status_code == 200, ours.text
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What is it?"},
    ]
    asked = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 6}
    theirs = seeing.post("/v1/chat/completions", json=asked).json()
    assert ours.json()["response"] == theirs["choices"][0]["message"]["content"]
    assert ours.json()["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]
    assert "vision" in seeing.post("/api/show", json={"model": "tiny"}).json()["capabilities"]
    wrong = seeing.post("/api/generate", json=body | {"images": ["not base64!"]})
    assert refusal(wrong).startswith("images.0: the data of the picture is not base64")
    earlier = [
        {"role": "user", "content": "Look", "images": ["bm90IGEgcGljdHVyZQ=="]},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "Again"},
    ]
    told = seeing.post("/api/chat", json={"messages": earlier, "options": options, "stream": False})
    assert (told.status_code, told.headers["x-replaced-blocks"]) == (200, "1 image")
