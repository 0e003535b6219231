"""OpenAI's Chat Completions: POST /v1/chat/completions.

A stream sends the role once, and the id and name of a tool call before its arguments. A call keeps its index, and
with `include_usage` the last chunk has no choices. `x-ignored-params` names accepted fields without effect.

Elsewhere: the path of a request is `serve/answer/respond.py`; chunks are `openai_chunks.py`; answers are
`serve/answer/answers.py`.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, cast

from starlette.requests import Request
from starlette.responses import Response

from argosy.engine.sequence import TokenLogprob
from argosy.prompt.formats.events import Event as SaidEvent
from argosy.prompt.formats.events import ReasoningDelta, TextDelta, ToolCallArguments, ToolCallBegin
from argosy.serve.answer.answers import Ended, Finish, Progress, Said, Step
from argosy.serve.answer.logprobs import ScoredToken
from argosy.serve.answer.request import Read
from argosy.serve.answer.respond import respond
from argosy.serve.answer.usage import ReadOfPrompt, ThoughtTokens, Timings, Usage
from argosy.serve.dialects.openai_chat_bodies import ChatBody
from argosy.serve.dialects.openai_chunks import ChunkExchange
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import OpenAIError
from argosy.serve.http.route import post_route


class Function(Closed):
    name: str
    arguments: str


class Call(Closed):
    id: str
    type: Literal["function"]
    function: Function


class Scores(Closed):
    content: list[ScoredToken]
    refusal: None


class ChatMessage(Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Call]]
    function_call: NotRequired[Function]


ChatFinish = Finish | Literal["function_call"]


class Choice(Closed):
    index: int
    message: ChatMessage
    finish_reason: ChatFinish
    logprobs: Scores | None
    token_ids: NotRequired[list[int]]


class ChatUsage(Usage):
    completion_tokens_details: ThoughtTokens
    timings: NotRequired[Timings]


class ChatCompletion(Closed):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    timings: NotRequired[Timings]
    prompt_token_ids: NotRequired[list[int]]


class FunctionDelta(Closed):
    name: NotRequired[str]
    arguments: str


class CallDelta(Closed):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(Closed):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[CallDelta]]
    function_call: NotRequired[FunctionDelta]


class ChoiceDelta(Closed):
    index: int
    delta: Delta
    finish_reason: ChatFinish | None
    logprobs: NotRequired[Scores]
    token_ids: NotRequired[list[int]]


class ChatChunk(Closed):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChoiceDelta]
    usage: NotRequired[ChatUsage]
    timings: NotRequired[Timings]
    prompt_progress: NotRequired[ReadOfPrompt]
    prompt_token_ids: NotRequired[list[int]]


async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    return await respond(ChatExchange, body, request)


class ChatExchange(ChunkExchange[ChatBody, ChatChunk]):
    id_prefix = "chatcmpl-"
    chunk_type = "chat.completion.chunk"

    def reads(self) -> list[Read]:
        return [lambda: self.body.request(self.caller, self.service.intake(self.caller))]

    def begin(self) -> list[ChatChunk]:
        chunks = [
            self._chunk(number, {"role": "assistant", "content": ""}) for number in range(self.body.n or 1)
        ]
        if (prompt_ids := self._prompt_ids()) is not None:
            chunks[0]["prompt_token_ids"] = prompt_ids
        return chunks

    def take(self, step: Step) -> list[ChatChunk]:
        match step:
            case Progress():
                return self.progress(step)
            case Said():
                deltas = [delta for event in step.events if (delta := self._delta(event))]
                token_ids = step.token_ids if self.body.return_token_ids else ()
                if (step.logprob is not None or token_ids) and not deltas:
                    deltas = [{}]
                chunks = [
                    self._chunk(step.answer, delta, logprob=step.logprob if at == 0 else None)
                    for at, delta in enumerate(deltas)
                ]
                if token_ids:
                    chunks[0]["choices"][0]["token_ids"] = list(token_ids)
                return chunks
            case Ended():
                is_older_form = step.finish == "tool_calls" and self.body.calls_functions
                return [
                    self._chunk(step.answer, {}, finish="function_call" if is_older_form else step.finish)
                ]

    async def end(self) -> list[ChatChunk]:
        usage = {"usage": self._last_usage()} if self.wants_usage else {}
        return self.last(usage | self.timings())

    def whole(self) -> ChatCompletion:
        choices = [self._choice(folded) for folded in self.folded()]
        made = {
            **self.chunk(choices),
            "object": "chat.completion",
            "usage": self._last_usage(),
            **self.timings(),
        }
        if (prompt_ids := self._prompt_ids()) is not None:
            made["prompt_token_ids"] = prompt_ids
        return cast(ChatCompletion, made)

    def _choice(self, folded: dict[str, Any]) -> Choice:
        said = folded["delta"]
        message: ChatMessage = {"role": "assistant", "content": said["content"], "refusal": None}
        if "reasoning_content" in said:
            message["reasoning_content"] = said["reasoning_content"]
        if "tool_calls" in said:
            message["tool_calls"] = [
                {"id": call["id"], "type": "function", "function": call["function"]}
                for call in said["tool_calls"].values()
            ]
        if "function_call" in said:
            message["function_call"] = said["function_call"]
        if not said["content"] and ("tool_calls" in said or "function_call" in said):
            message["content"] = None
        scores = folded.get("logprobs", {}).get("content", [])
        choice: Choice = {
            "index": folded["index"], "message": message, "finish_reason": folded["finish_reason"],
            "logprobs": {"content": scores, "refusal": None} if self.body.logprobs else None,
        }  # fmt: skip
        if "token_ids" in folded:
            choice["token_ids"] = folded["token_ids"]
        return choice

    def _prompt_ids(self) -> list[int] | None:
        """The ids of the prompt's tokens, if requested."""
        answers = self.answers
        if not (self.body.return_token_ids and answers.tells_token_ids):
            return None
        return list(answers.prompts[0].token_ids or ())

    def _chunk(
        self,
        number: int,
        delta: Delta,
        *,
        finish: ChatFinish | None = None,
        logprob: TokenLogprob | None = None,
    ) -> ChatChunk:
        choice: ChoiceDelta = {"index": number, "delta": delta, "finish_reason": finish}
        if logprob is not None:
            scored = self.speller.scored(logprob, self.body.top_logprobs or 0)
            choice["logprobs"] = {"content": [scored], "refusal": None}
        return self.chunk_of(choice)

    def usage(self) -> ChatUsage:
        details: ThoughtTokens = {"reasoning_tokens": self.answers.num_reasoning_tokens}
        return cast(ChatUsage, {**super().usage(), "completion_tokens_details": details})

    def _last_usage(self) -> ChatUsage:
        """The usage and, if requested, the ledger."""
        return cast(ChatUsage, {**self.usage(), **self.timings()})

    def _delta(self, event: SaidEvent) -> Delta | None:
        match event:
            case TextDelta():
                return {"content": event.text}
            case ReasoningDelta() if not self.body.hides_thoughts:
                return {"reasoning_content": event.text}
            case ToolCallBegin():
                function: FunctionDelta = {"name": event.name, "arguments": ""}
                if self.body.calls_functions:
                    return {"function_call": function}
                call: CallDelta = {
                    "index": event.index,
                    "id": event.id,
                    "type": "function",
                    "function": function,
                }
                return {"tool_calls": [call]}
            case ToolCallArguments():
                more: FunctionDelta = {"arguments": event.json_fragment}
                if self.body.calls_functions:
                    return {"function_call": more}
                return {"tool_calls": [{"index": event.index, "function": more}]}
        return None


ROUTES = (
    post_route(
        "/v1/chat/completions", chat_completions, ChatCompletion, screens="answers",
        takes_media=True, events=ChatChunk | OpenAIError, has_done=True,
    ),
)  # fmt: skip
