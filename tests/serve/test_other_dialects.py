"""Completions, Messages and Responses over a real socket, and with the official clients."""

from __future__ import annotations

import json
import time
from typing import Any

import anthropic
import httpx
import openai
import pytest

from argosy.config import SamplingParams
from argosy.engine.engine import Engine
from argosy.engine.loop import EngineLoop
from argosy.prompt.prompt import Prompt
from argosy.serve.answer.service import Service

MESSAGE: dict[str, Any] = {
    "model": "tiny", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "How are you?"}]
}  # fmt: skip


def test_echo_scores_a_prompt_as_the_engine_does(
    client: httpx.Client, service: Service, engine: Engine
) -> None:
    ids = client.post("/tokenize", json={"content": "The quick brown fox"}).json()["tokens"]
    body = {"prompt": [ids, ids[:3]], "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    choices = client.post("/v1/completions", json=body).json()["choices"]
    scores = choices[0]["logprobs"]["token_logprobs"]
    done: list[Any] = []
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, logprobs=1)
    assert isinstance(service.loop, EngineLoop)
    service.loop.submit(Prompt(tuple(ids)), params, done.append)
    assert wait_for(done)
    direct = done[-1].result
    assert scores[0] is None
    assert scores[1 : len(ids)] == [item.logprob for item in direct.prompt_logprobs[1:]]
    assert len(choices[1]["logprobs"]["token_logprobs"]) == 4
    assert choices[0]["text"].startswith("The quick brown fox")


def test_the_tokenizer_routes_accept_the_fields_of_llama_cpp_and_vllm(
    client: httpx.Client, service: Service
) -> None:
    text = "The quick brown fox"
    ours = client.post("/tokenize", json={"content": text, "add_special": False}).json()
    theirs = client.post(
        "/tokenize", json={"prompt": text, "add_special_tokens": False, "model": "tiny"}
    ).json()
    assert ours == theirs
    assert ours["count"] == len(ours["tokens"])
    assert ours["max_model_len"] == service.model.context_tokens
    for body in ({}, {"content": text, "prompt": text}):
        assert client.post("/tokenize", json=body).json()["error"]["param"] == "content"
    back = client.post("/detokenize", json={"tokens": ours["tokens"]}).json()
    assert back == {"content": text, "prompt": text}
    info = client.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in info["chat_template"]


def wait_for(done: list[Any]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (done and hasattr(done[-1], "result")):
        time.sleep(0.01)
    return bool(done)


def test_a_streamed_message_opens_and_closes_its_blocks_in_turn(client: httpx.Client) -> None:
    text = client.post("/v1/messages", json=MESSAGE | {"stream": True}).text
    events = [json.loads(part.partition("data: ")[2]) for part in text.strip().split("\n\n")]
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    whole = client.post("/v1/messages", json=MESSAGE).json()
    said = "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta")
    assert said == whole["content"][0]["text"]
    assert whole["stop_reason"] == "max_tokens"


def test_the_official_client_gets_answers_and_token_counts(url: str) -> None:
    asked = {name: value for name, value in MESSAGE.items() if name != "temperature"}
    asked["extra_body"] = {"temperature": 0}  # the client no longer has this argument
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            final = stream.get_final_message()
        assert final.content[0].text == whole.content[0].text  # type: ignore[union-attr]
        counted = client.messages.count_tokens(model="tiny", messages=MESSAGE["messages"])
        usage = whole.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(**(asked | {"extra_body": {"temperature": 9}}))
        assert refused.value.body["type"] == "error"  # type: ignore[index]


def test_the_billing_line_of_claude_code_does_not_reach_the_prompt(client: httpx.Client) -> None:
    def count(system: str) -> int:
        body = {"messages": MESSAGE["messages"], "system": system}
        return int(client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"])

    assert count("x-anthropic-billing-header: cc_version=1; cch=af31\nBe brief.") == count("Be brief.")


def test_events_of_a_response_are_numbered_and_the_last_has_the_whole(client: httpx.Client) -> None:
    ask = {"input": "How are you?", "max_output_tokens": 8, "temperature": 0}
    text = client.post("/v1/responses", json=ask | {"stream": True}).text
    events = [json.loads(part.partition("data: ")[2]) for part in text.strip().split("\n\n")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"
    ]  # fmt: skip
    whole = client.post("/v1/responses", json=ask).json()
    assert events[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert said == whole["output"][0]["content"][0]["text"]


def test_the_official_client_reads_responses(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        whole = client.responses.create(
            model="tiny", input="How are you?", max_output_tokens=8, temperature=0
        )
        with client.responses.stream(
            model="tiny", input="How are you?", max_output_tokens=8, temperature=0
        ) as stream:
            kinds = [event.type for event in stream]
        assert whole.output_text
        assert kinds[-1] == "response.incomplete"
        counted = client.responses.input_tokens.count(model="tiny", input="How are you?")
        assert whole.usage is not None
        assert counted.input_tokens == whole.usage.input_tokens
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="tiny", input="x", previous_response_id="resp_1")
