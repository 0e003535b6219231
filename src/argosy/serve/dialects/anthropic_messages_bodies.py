"""The bodies of Anthropic's Messages, and the conversation that the model gets from one.

Claude Code starts the system prompt with a line that changes with each conversation, so that no prompt prefix could
be reused. The line is removed before the prompt is built, unless the server runs with `--keep-billing-line`.

Elsewhere: answers are `anthropic_messages.py`; fields common to several dialects are `serve/answer/fields.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from argosy.config import SamplingParams
from argosy.errors import UsageError
from argosy.serve.answer.fields import (
    Flag,
    FreeObject,
    Lenient,
    Many,
    Messages,
    Name,
    NoEffect,
    NoFlag,
    ObjectSchema,
    Short,
    Stop,
    Text,
    Tokens,
    ToolName,
    Tools,
    few,
    schema_form,
    strays,
)
from argosy.serve.answer.media_parts import Data, Elsewhere, Intake, MediaPart, Piece, content_of
from argosy.serve.answer.replaced import UnreadPart, last_asked
from argosy.serve.answer.request import ChatRequest
from argosy.serve.answer.sampling_fields import Sampling
from argosy.serve.answer.tool_use import ToolChoice

BILLING_LINE = "x-anthropic-billing-header:"
# Type prefixes of tools that Anthropic runs itself.
_SERVER_TOOLS = (
    "web_search_",
    "web_fetch_",
    "code_execution_",
    "tool_search_tool_",
    "mcp_toolset",
    "advisor_",
)
_SHOWN_TYPE = {"pattern": f"^({'|'.join(_SERVER_TOOLS)})[a-z0-9_]*$", "maxLength": 64}


class TextBlock(Lenient):
    type: Literal["text"]
    text: Text


class Base64Source(Lenient):
    type: Literal["base64"]
    media_type: Short
    data: str


class AddressSource(Lenient):
    type: Literal["url"]
    url: str | None = None


class FileIdSource(Lenient):
    type: Literal["file"]


class MediaBlock(MediaPart):
    source: Annotated[Base64Source | AddressSource | FileIdSource, Field(discriminator="type")]

    def data(self) -> Data | Elsewhere:
        if isinstance(self.source, Base64Source):
            return Data(self.source.data, self.source.media_type)
        if isinstance(self.source, AddressSource):
            return Elsewhere("an address", self.source.url)
        return Elsewhere("a file id")

    def drop(self) -> int:
        if not isinstance(self.source, Base64Source):
            return 0
        dropped, self.source.data = self.source.data, ""
        return len(dropped)


class ImageBlock(MediaBlock):
    KIND = "picture"
    REMEDY = "send the picture itself, as a source of type base64"

    type: Literal["image"]


class VideoBlock(MediaBlock):
    """Not part of Anthropic's API; servers of models that watch take it in this form."""

    KIND = "video"
    REMEDY = "send the video itself, as a source of type base64"

    type: Literal["video"]


class Citations(Lenient):
    enabled: NoFlag | None = None


class TextSource(Lenient):
    type: Literal["text"]
    data: Text


class BlocksSource(Lenient):
    type: Literal["content"]
    content: Text | Many[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]]


class FileSource(UnreadPart):
    type: Literal["base64", "url", "file"]


class DocumentBlock(Lenient):
    type: Literal["document"]
    source: Annotated[TextSource | BlocksSource | FileSource, Field(discriminator="type")]
    title: Text | None = None
    context: Text | None = None
    citations: Citations | None = None


class SearchResultBlock(Lenient):
    type: Literal["search_result"]
    source: Text
    title: Text
    content: Many[TextBlock]
    citations: Citations | None = None


class ThinkingBlock(Lenient):
    type: Literal["thinking"]
    thinking: Text
    signature: str | None = None


class RedactedThinkingBlock(Lenient):
    """Encrypted thoughts of another model, which cannot be read here."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Lenient):
    type: Literal["tool_use"]
    id: Short
    name: Short
    input: FreeObject


class ServerBlock(UnreadPart):
    """A call or a result of a tool that Anthropic ran, in a conversation that began there."""

    type: Literal[
        "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
        "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "tool_search_tool_result",
        "mcp_tool_use", "mcp_tool_result", "container_upload", "tool_reference",
    ]  # fmt: skip


ResultContent = Annotated[
    TextBlock | ImageBlock | VideoBlock | DocumentBlock | SearchResultBlock | ServerBlock,
    Field(discriminator="type"),
]


class ToolResultBlock(Lenient):
    type: Literal["tool_result"]
    tool_use_id: Short
    content: Text | Many[ResultContent] | None = None


AskingBlock = Annotated[
    TextBlock | ImageBlock | VideoBlock | DocumentBlock | SearchResultBlock | ToolResultBlock | ServerBlock,
    Field(discriminator="type"),
]
AnsweringBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ServerBlock,
    Field(discriminator="type"),
]


class AskingMessage(Lenient):
    role: Literal["user"]
    content: Text | Many[AskingBlock]


class SystemMessage(Lenient):
    role: Literal["system"]
    content: Text | Many[TextBlock]


class AnsweringMessage(Lenient):
    role: Literal["assistant"]
    content: Text | Many[AnsweringBlock]


AnyMessage = AskingMessage | AnsweringMessage | SystemMessage


class ClientTool(Lenient):
    type: Literal["custom"] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: ObjectSchema
    strict: Flag | None = None


class AnthropicTool(Lenient):
    """A tool that Anthropic runs, or whose parameters only Anthropic's models know."""

    # The OpenAPI document lists the types that are allowed alongside a client's tools; others are refused by name.
    type: Annotated[
        str, Field(pattern=r"^[a-z0-9_]{1,64}$", json_schema_extra=_SHOWN_TYPE),
    ]  # fmt: skip
    name: Short | None = None


def _kind_of_tool(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "client" if kind in (None, "custom") else "anthropic"


AnyTool = Annotated[
    Annotated[ClientTool, Tag("client")] | Annotated[AnthropicTool, Tag("anthropic")],
    Discriminator(_kind_of_tool),
]


class FreeChoice(Lenient):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: Flag | None = None

    def asked(self) -> ToolChoice:
        return ToolChoice("required" if self.type == "any" else self.type)


class NamedChoice(Lenient):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: Flag | None = None

    def asked(self) -> ToolChoice:
        return ToolChoice("required", (self.name,))


class Thinking(Lenient):
    """Whether to think. "adaptive" leaves that to the model. A token budget is accepted but does not limit thoughts."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class OutputFormat(Lenient):
    type: Literal["json_schema"]
    schema_: FreeObject = Field(alias="schema")


class OutputConfig(Lenient):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountBody(Sampling):
    messages: Annotated[list[Annotated[AnyMessage, Field(discriminator="role")]], Messages] = Field(
        examples=[[{"role": "user", "content": "Hello"}]]
    )
    system: Text | Annotated[list[TextBlock], few(256)] | None = None
    tools: Annotated[list[AnyTool], Tools] | None = None
    tool_choice: Annotated[FreeChoice | NamedChoice, Field(discriminator="type")] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # an older name of `output_config.format`
    mcp_servers: Annotated[list[Any], few(0)] | None = None
    context_management: NoEffect[FreeObject] = None
    cache_control: NoEffect[FreeObject] = None
    compaction: NoEffect[FreeObject] = None
    speed: NoEffect[Name] = None
    diagnostics: NoEffect[FreeObject] = None
    billing_policy: NoEffect[FreeObject] = None
    betas: NoEffect[Annotated[list[Short], few(64)]] = None
    fallbacks: NoEffect[Annotated[list[FreeObject], few(64)] | FreeObject] = None
    fallback_credit_token: NoEffect[Text] = None
    user_profile_id: NoEffect[Name] = None
    workspace_id: NoEffect[Name] = None
    anthropic_version: NoEffect[Name] = None

    def params(self) -> SamplingParams:
        return SamplingParams()  # tokens are counted the same way whatever follows them

    def request(self, intake: Intake, *, keep_billing_line: bool) -> ChatRequest:
        params = self.params()
        system = _text(self.system or "")
        if not keep_billing_line and system.startswith(BILLING_LINE):
            system = system.partition("\n")[2]
        messages = [{"role": "system", "content": system}] if system else []
        asked_now = last_asked(said.role for said in self.messages)
        for at, message in enumerate(self.messages):
            place = _Place(intake, f"messages.{at}.content", is_new=at == asked_now)
            messages += _messages(message, place)
        _check_prefill(self.messages[-1], messages[-1])
        choice, config = self.tool_choice, self.output_config
        form = (None if config is None else config.format) or self.output_format
        return ChatRequest(
            messages=messages,
            params=params,
            tools=[_tool(tool) for tool in self._client_tools()],
            tool_choice=ToolChoice.of(choice),
            parallel=choice is None or choice.disable_parallel_tool_use is not True,
            form=None if form is None else schema_form(form.schema_),
            effort=self.effort(),
            effort_field="thinking" if config is None or config.effort is None else "output_config.effort",
            replaced=intake.replaced,
            ignored=self.ignored(),
        )

    def _client_tools(self) -> list[ClientTool]:
        """The tools that the client runs.

        A tool that Anthropic would run is left out if others remain, and the header names it.

        Raises:
            UsageError: the request offers or chooses only tools that Anthropic would run, or offers a tool whose
                parameters only Anthropic's models know.
        """
        tools = self.tools or ()
        clients = [tool for tool in tools if isinstance(tool, ClientTool)]
        others = [tool for tool in tools if isinstance(tool, AnthropicTool)]
        unknown = [tool.type for tool in others if not tool.type.startswith(_SERVER_TOOLS)]
        if unknown:
            raise UsageError(
                f"tools: only Anthropic's models know the parameters of {', '.join(dict.fromkeys(unknown))}",
                param="tools",
                hint="offer it as your own tool, with a name and an input_schema",
            )
        chosen = self.tool_choice.name if isinstance(self.tool_choice, NamedChoice) else None
        if others and (not clients or chosen in [tool.name for tool in others]):
            raise UsageError(
                f"tools: {', '.join(dict.fromkeys(tool.type for tool in others))} would run at Anthropic, "
                "and this server does not run tools",
                param="tools",
                hint="leave it out, or offer a tool that your client runs",
            )
        return clients

    def effort(self) -> str | None:
        """The requested reasoning effort."""
        kind = None if self.thinking is None else self.thinking.type
        asked = None if self.output_config is None else self.output_config.effort
        if kind == "disabled":
            return "none"
        return "medium" if asked is None and kind == "enabled" else asked

    def ignored(self) -> list[str]:
        names = super().ignored()
        blocks = [
            block for message in self.messages if not isinstance(message.content, str) for block in message.content
        ]  # fmt: skip
        nested = [
            inner for block in blocks if isinstance(block, ToolResultBlock) and isinstance(block.content, list)
            for inner in block.content
        ]  # fmt: skip
        names += strays("system", () if isinstance(self.system, str) else self.system or ())
        names += strays("messages", self.messages)
        names += strays("messages.content", [*blocks, *nested])
        tools = self.tools or ()
        names += sorted({f"tools.{tool.type}" for tool in tools if isinstance(tool, AnthropicTool)})
        names += strays("tools", (tool for tool in tools if isinstance(tool, ClientTool)))
        names += strays("tool_choice", (self.tool_choice,))
        names += strays("thinking", (self.thinking,))
        config = self.output_config
        names += strays("output_config", (config,))
        return names + strays("output_config.format", () if config is None else (config.format,))


class MessagesBody(CountBody):
    max_tokens: Tokens
    stop_sequences: Annotated[list[Stop], few(16)] | None = None
    metadata: NoEffect[FreeObject] = None
    service_tier: NoEffect[Name] = None
    container: NoEffect[Name | FreeObject] = None
    inference_geo: NoEffect[Name] = None

    @property
    def person(self) -> str | None:
        named = (self.metadata or {}).get("user_id")
        return named if isinstance(named, str) and named else None

    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, **self.sampling(self.stop_sequences or ()))


def _check_prefill(said: AnyMessage, made: dict[str, Any]) -> None:
    """Refuse trailing whitespace, as Anthropic does, because a token begins with the space before its word."""
    if said.role == "assistant" and made["content"] != made["content"].rstrip():
        raise UsageError(
            "messages: final assistant content cannot end with trailing whitespace",
            param="messages",
            hint="remove the whitespace at the end of the last message",
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of blocks in a conversation; `is_new` if they are in the user's newest turn."""

    intake: Intake
    where: str
    is_new: bool

    def piece(self, block: MediaBlock | DocumentBlock | ServerBlock) -> Piece:
        if isinstance(block, MediaBlock):
            return self.intake.piece(block, self.where, is_new=self.is_new)
        reason = _NOT_RUN_HERE if isinstance(block, ServerBlock) else None
        return self.intake.replaced.note(block.type, self.where, is_new=self.is_new, reason=reason)


_NOT_RUN_HERE = "this server does not run Anthropic's tools"


def _text(given: str | Sequence[TextBlock]) -> str:
    return given if isinstance(given, str) else "\n".join(block.text for block in given)


def _told(
    block: TextBlock | MediaBlock | DocumentBlock | SearchResultBlock | ServerBlock, place: _Place
) -> list[Piece]:
    """Turn a block into texts, each for a line of its own, pictures and videos."""
    match block:
        case TextBlock():
            return [block.text]
        case DocumentBlock(source=TextSource() as source):
            return _document([source.data], block.title, block.context)
        case DocumentBlock(source=BlocksSource() as source):
            given = source.content
            inside = [given] if isinstance(given, str) else [p for part in given for p in _told(part, place)]
            return _document(inside, block.title, block.context)
        case SearchResultBlock():
            return _document([_text(block.content)], block.title, block.source)
    return [place.piece(block)]


def _document(pieces: Sequence[Piece], title: str | None, context: str | None) -> list[Piece]:
    """Write a document as Anthropic recommends for prompts."""
    about = [(name, said) for name, said in (("title", title), ("context", context)) if said]
    head = "".join(f"<{name}>{said}</{name}>\n" for name, said in about)
    return [f"<document>\n{head}<document_content>", *pieces, "</document_content>\n</document>"]


def _messages(message: AnyMessage, place: _Place) -> list[dict[str, Any]]:
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    said: list[Piece] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    made: list[dict[str, Any]] = []
    of_tool = replace(place, is_new=False)
    for number, block in enumerate(message.content):
        match block:
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case RedactedThinkingBlock():
                pass
            case ToolUseBlock():
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                given = block.content or ""
                content = given if isinstance(given, str) else _content(given, of_tool)
                made.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
            case _:
                said += _told(block, replace(place, where=f"{place.where}.{number}"))
    if message.role == "assistant":
        answer: dict[str, Any] = {"role": "assistant", "content": content_of(said, between="")}
        if thoughts:
            answer["reasoning_content"] = "".join(thoughts)
        if calls:
            answer["tool_calls"] = calls
        return [answer]
    if said or not made:
        made.append({"role": message.role, "content": content_of(said, between="\n")})
    return made


def _content(blocks: Sequence[ResultContent], place: _Place) -> str | list[dict[str, Any]]:
    return content_of([piece for block in blocks for piece in _told(block, place)], between="\n")


def _tool(tool: ClientTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema.model_dump(exclude_unset=True),
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}
