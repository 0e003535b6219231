"""Tokens of a prompt: /tokenize, /detokenize, /tokenizer_info and /apply-template, as in llama.cpp and vLLM.

Elsewhere: prompts are built in the room `prompt`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from starlette.requests import Request

from argosy.config import SamplingParams
from argosy.errors import UsageError
from argosy.serve.answer.fields import MAX_TOKENS, Effort, Flag, Messages, Strict, Text, TokenId, Tools, few
from argosy.serve.answer.media_parts import Intake
from argosy.serve.answer.opening import Opening
from argosy.serve.answer.request import ChatRequest
from argosy.serve.answer.rules import exactly_one
from argosy.serve.answer.service import service_of
from argosy.serve.dialects.openai_chat_bodies import EXAMPLES, OfferedTool, Turn, sent
from argosy.serve.http.caller import Caller
from argosy.serve.http.closed import Closed
from argosy.serve.http.failures import Refused
from argosy.serve.http.route import get_route, post_route
from argosy.serve.models.models import use_model


class TokenizeBody(Strict):
    """A text, as `content` (llama.cpp's name) or as `prompt` (vLLM's name), or a conversation, as vLLM has it."""

    RULES = (exactly_one("content", "prompt", "messages"),)

    content: Text | None = Field(None, examples=["Hello"])
    prompt: Text | None = None
    add_special: Flag = False
    add_special_tokens: Flag = False
    messages: Annotated[list[Turn], Messages] | None = None
    tools: Annotated[list[OfferedTool], Tools] | None = None
    add_generation_prompt: Flag = True
    enable_thinking: Flag | None = None
    reasoning_effort: Effort | None = None
    model: str | None = Field(None, max_length=256)

    @property
    def text(self) -> str | None:
        """The text; None if the body is a conversation."""
        given = [one for one in (self.content, self.prompt, self.messages) if one is not None]
        if len(given) != 1:
            raise UsageError(
                f"expected one of content, prompt and messages, found {len(given)} of them", param="content"
            )
        return self.prompt if self.content is None else self.content

    def request(self, intake: Intake) -> ChatRequest:
        """The conversation."""
        return ChatRequest(
            messages=sent(self.messages or (), intake), replaced=intake.replaced, params=SamplingParams(),
            tools=[tool.model_dump(exclude_unset=True) for tool in self.tools or ()], thinks=self.enable_thinking,
            effort=self.reasoning_effort,
        )  # fmt: skip


class DetokenizeBody(Strict):
    tokens: Annotated[list[TokenId], few(MAX_TOKENS)]
    model: str | None = Field(None, max_length=256)


class TemplateBody(Strict):
    messages: Annotated[list[Turn], Messages] = Field(examples=EXAMPLES)
    tools: Annotated[list[OfferedTool], Tools] | None = None


class Tokenized(Closed):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Closed):
    content: str
    prompt: str


class TokenizerInfo(Closed):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Rendered(Closed):
    prompt: str


async def tokenize(body: TokenizeBody, request: Request) -> Tokenized:
    """Tokenize a text, in which nothing becomes a control token, or a conversation."""
    service = service_of(request)
    has_prefix = body.add_special or body.add_special_tokens
    caller: Caller = request.state.caller
    if (text := body.text) is None:
        found, _ = await Opening(service, caller).tokens(
            lambda: body.request(service.intake(caller)), opens_answer=body.add_generation_prompt
        )
        tokens = list(found)
    else:
        tokens = await service.work.run(caller, service.prompts.tokenize, text, add_prefix=has_prefix)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.model.context_tokens}


async def detokenize(body: DetokenizeBody, request: Request) -> Detokenized:
    """Turn token ids into text."""
    service = service_of(request)
    text = await service.work.run(request.state.caller, service.prompts.detokenize, body.tokens)
    return {"content": text, "prompt": text}


async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Show special tokens and chat template, for clients that leave tokenizing to the server."""
    service = await use_model(request)
    if service.tokenizer is None:
        raise Refused(404, "this model has no tokenizer")
    special = service.tokenizer.special_tokens
    return {
        "bos_token": special.get("bos_token"), "eos_token": special.get("eos_token"),
        "pad_token": special.get("pad_token"), "chat_template": service.tokenizer.chat_template,
    }  # fmt: skip


async def apply_template(body: TemplateBody, request: Request) -> Rendered:
    """Render a conversation with the model's chat template."""
    service = service_of(request)
    caller: Caller = request.state.caller

    def apply() -> str:
        intake = service.intake(caller)
        said = sent(body.messages, intake)
        if (preset := service.model.preset) is not None:
            said = [dict(one) for one in preset.with_messages(said)]
        caller.held.files.require_all()
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]
        return service.prompts.apply_template(
            said, tools=tools, replace_damaged=intake.replaced.replace_damaged, check=caller.go_on
        )

    return {"prompt": await service.run_reading(caller, apply)}


ROUTES = (
    post_route("/tokenize", tokenize, Tokenized, screens="nothing", takes_media=True),
    post_route("/detokenize", detokenize, Detokenized, screens="nothing"),
    get_route("/tokenizer_info", tokenizer_info, "infer", answer=TokenizerInfo, refusals=("404",)),
    post_route("/apply-template", apply_template, Rendered, screens="nothing", takes_media=True),
)  # fmt: skip
