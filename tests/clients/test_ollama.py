"""The `ollama` packages for Python and for node: models, answers, tools, schemas, vectors, errors, leaving early."""

from __future__ import annotations

import math
from typing import Any

import ollama
import pytest
from pydantic import BaseModel

from tests.clients.conftest import Server
from tests.clients.test_ai_sdk import converse

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def client(server: Server) -> ollama.Client:
    return ollama.Client(host=server.url)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def get_weather(city: str, days: int | None = None) -> str:
    """Weather of a city

    Args:
        city: The city
        days: Number of days
    """
    return f"#sunny {city} {days}"


def test_models_are_listed_shown_and_loaded(client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert listed.model == "tiny:latest"
    (loaded,) = client.ps().models
    assert (loaded.model, loaded.digest) == (listed.model, listed.digest)
    shown = client.show(listed.model)
    assert shown.capabilities is not None
    assert {"completion", "tools", "thinking"} <= set(shown.capabilities)
    assert shown.modelinfo is not None
    assert shown.modelinfo[f"{shown.modelinfo['general.architecture']}.context_length"] > 0
    assert client.generate("tiny").done_reason == "load"


def test_a_preset_is_listed_shown_and_answers_with_its_system_message(
    server: Server, client: ollama.Client
) -> None:
    with server.preset("brief", 'system = "#plain"\ntemperature = 0\nmax-tokens = 4\nstop = ["zzz"]\n'):
        listed = {one.model: one.details for one in client.list().models}
        assert list(listed) == ["tiny:latest", "brief:latest"]
        assert listed["brief:latest"] is not None
        assert listed["brief:latest"].parent_model == "tiny:latest"
        assert [(one.model, one.size) for one in client.ps().models][1:] == [("brief:latest", 0)]
        shown = client.show("brief")
        assert 'SYSTEM "#plain"' in (shown.modelfile or "")
        assert "stop" in (shown.parameters or "")
        answer = client.chat("brief", said("Hi"))
        assert (answer.model, answer.done_reason, answer.eval_count) == ("brief", "length", 4)
        whole = client.chat("brief:latest", said("Hi"), options={"num_predict": -1}).message.content
        assert whole == "It is well, thank you."
        own = [{"role": "system", "content": "Be kind."}, *said("#quote")]
        assert "left" in (client.chat("brief", own, options={"num_predict": 40}).message.content or "")
        assert client.generate("brief").done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="does not exist"):
        client.chat("brief", said("Hi"))


def test_an_answer_is_the_same_whole_and_streamed(client: ollama.Client) -> None:
    whole = client.chat("tiny", said("#think"), think=True, options=GREEDY)
    assert (whole.message.content, whole.message.thinking) == ("It is well.", "Let me see.")
    assert whole.done_reason == "stop"
    assert whole.eval_count is not None
    assert whole.eval_count > 0
    parts = list(client.chat("tiny", said("#think"), stream=True, think=True, options=GREEDY))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert "".join(part.message.thinking or "" for part in parts) == whole.message.thinking
    assert parts[-1].eval_count == whole.eval_count
    text = client.generate("tiny", "#plain", system="Be brief.", options=GREEDY | {"stop": ["thank"]})
    assert text.response == "It is well, "


def test_texts_are_embedded_by_both_routes(client: ollama.Client) -> None:
    two = client.embed("tiny", ["How are you?", "Well."], truncate=True, keep_alive="5m")
    assert two.model == "tiny"
    assert two.prompt_eval_count is not None
    assert two.prompt_eval_count > 1
    first, second = two.embeddings
    assert abs(math.hypot(*first) - 1) < 1e-3
    assert first != second
    assert client.embed("tiny", "Well.").embeddings == [second]
    assert client.embeddings("tiny", "Well.").embedding == second
    (short,) = client.embed("tiny:latest", "Well.", dimensions=4).embeddings
    assert len(short) == 4
    assert client.embed("tiny", "").embeddings == []


def test_the_only_model_stays_loaded_and_cannot_fill_in(client: ollama.Client) -> None:
    assert client.generate("tiny", keep_alive=0).done_reason == "load"
    assert "insert" not in (client.show("tiny").capabilities or ())
    with pytest.raises(ollama.ResponseError, match="this model cannot fill in a text") as refused:
        client.generate("tiny", "def add(a, b):", suffix="return c")
    assert refused.value.status_code == 400


def test_python_functions_are_called_and_their_results_are_accepted(client: ollama.Client) -> None:
    messages: list[Any] = said("#weather")
    answer = client.chat("tiny", messages, tools=[get_weather], options=GREEDY).message
    calls = [(call.function.name, dict(call.function.arguments)) for call in answer.tool_calls or ()]
    assert calls == [("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome", "days": 2})]
    messages.append(answer)
    for name, arguments in calls:
        messages.append({"role": "tool", "tool_name": name, "content": get_weather(**arguments)})
    parts = list(client.chat("tiny", messages, tools=[get_weather], stream=True, options=GREEDY))
    assert "".join(part.message.content or "" for part in parts) == "It is sunny in both."


def test_a_schema_is_followed(client: ollama.Client) -> None:
    class Answer(BaseModel):
        answer: int

    answer = client.chat("tiny", said("#json"), format=Answer.model_json_schema(), options=GREEDY)
    assert Answer.model_validate_json(answer.message.content or "").answer == 42


def test_errors_are_read_before_and_during_a_stream(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="does not exist; this server has: tiny") as refused:
        client.chat("llama3", said("Hi"))
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="argosy pull NAME"):
        client.pull("llama3")
    with pytest.raises(ollama.ResponseError, match="argosy rm NAME"):
        client.delete("tiny")
    with pytest.raises(ollama.ResponseError, match="the grammar cannot be followed"):
        list(client.chat("tiny", said("#fail"), stream=True, options=GREEDY))


def test_leaving_a_stream_frees_the_engine(server: Server) -> None:
    before = server.num_new_tokens
    own = ollama.Client(host=server.url)
    parts = own.chat("tiny", said("#long"), stream=True, options=GREEDY)
    for _ in range(5):
        next(parts)
    parts.close()  # type: ignore[attr-defined]
    server.require_freed(before)


def test_the_package_for_node_has_the_same_conversation(server: Server) -> None:
    before = server.num_new_tokens
    found = converse("ollama.mjs", server.url, package="ollama")
    server.require_freed(before + 300)
    assert found["models"] == ["tiny:latest"]
    assert found["plain"] == "".join(found["streamed"]) == "It is well."
    assert found["thinking"] == "Let me see."
    assert found["calls"] == [["get_weather", {"city": "Oslo"}], ["get_weather", {"city": "Rome", "days": 2}]]
    assert found["after"] == "It is sunny in both."
    assert found["schema"] == {"answer": 42}
    assert found["status"] == 404
    assert "argosy pull NAME" in found["pull"]
    assert found["failed"] == "the grammar cannot be followed"
    assert 5 <= found["cancelled"] < 400  # `require_freed` has also seen the engine idle
