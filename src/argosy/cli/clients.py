"""The settings that each client needs to use a running server, and the files they belong in.

    Connection  ->  SETUPS[client]  ->  Setup: files to print or to change, and notes

The names were checked against the clients' documentation in November 2026: Claude Code 2.1, Codex 0.169, opencode 1.18
(its version 2 reads the same file), Open WebUI 0.12, Continue's config.yaml of schema v1. Time limits are
raised where a client has them: the prefill may take minutes when experts come from the drive.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argosy.cli.edit_file import (
    Change,
    as_json,
    as_toml,
    merge_environment,
    merge_json,
    merge_toml,
    merge_yaml_list,
)

if TYPE_CHECKING:
    from argosy.prompt.prompt import ToolCalling

KEY_VARIABLE = "ARGOSY_API_KEY"
_NO_KEY = "none"  # clients require a key; a server without keys ignores it
_HOUR_MS = 3_600_000
_LONGEST_OUTPUT_TOKENS = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The server, as a client should see it."""

    url: str
    model: str
    context_tokens: int
    inputs: tuple[str, ...] = ("text",)
    tools: ToolCalling = "native"  # assumed if the server does not answer
    key: str | None = None
    is_key_shown: bool = False

    @property
    def output_tokens(self) -> int:
        """Longest answer that a client may ask for: it must fit the context together with the prompt."""
        return max(1, min(self.context_tokens // 4, _LONGEST_OUTPUT_TOKENS))

    @property
    def tool_notes(self) -> tuple[str, ...]:
        """Notes on tool calling, for users of agents."""
        if self.tools == "generic":
            return (
                "this model's chat template does not support tools: a generic prompt describes them, which the model"
                " may follow less well than a model that was trained for tools",
            )
        return (
            ("this model cannot call tools, so an agent will not get far with it",)
            if self.tools == "none"
            else ()
        )

    def secret(self, reference: str) -> str:
        """The text to print in place of the key: a reference, unless the key itself was requested."""
        if self.key is None:
            return _NO_KEY
        return self.key if self.is_key_shown else reference


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFile:
    """`shown` is printed; `change` puts the same settings, including the key, into a file's text."""

    path: Path
    shown: str
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    files: tuple[SettingsFile, ...]
    place: str | None = None  # where `shown` of the first file belongs, if not in the file itself
    notes: tuple[str, ...] = field(default=())


def _claude_code(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    def values(token: str) -> dict[str, str]:
        return {
            "ANTHROPIC_BASE_URL": connection.url,  # without /v1
            "ANTHROPIC_AUTH_TOKEN": token,
            "ANTHROPIC_DEFAULT_OPUS_MODEL": connection.model,
            "ANTHROPIC_DEFAULT_SONNET_MODEL": connection.model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": connection.model,
            # The answer does not count against this window, and must fit after it.
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(connection.context_tokens - connection.output_tokens),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(connection.output_tokens),
            # Drops a line at the start of the prompt that changes with every conversation and defeats the prefix cache.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "API_TIMEOUT_MS": str(_HOUR_MS),
        }

    reference = f'"${KEY_VARIABLE}"'
    token = connection.secret(reference)
    shown = "".join(
        f"export {name}={value if value == reference else shlex.quote(value)}\n"
        for name, value in values(token).items()
    )
    written = {"env": values(connection.key or _NO_KEY)}
    path = file or _home(environment, "CLAUDE_CONFIG_DIR", ".claude") / "settings.json"
    return Setup(
        files=(SettingsFile(path=path, shown=shown, change=lambda text: merge_json(text, written)),),
        place=f'in the shell that starts `claude`; or under "env" in {path}, where --write puts them',
        notes=("do not set ANTHROPIC_API_KEY as well: Claude Code would send it, too",),
    )


def _codex(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    path = file or _home(environment, "CODEX_HOME", ".codex") / "config.toml"
    catalogue = path.with_name("argosy-models.json")
    root: dict[str, Any] = {
        "model": connection.model,
        "model_provider": "argosy",
        "model_context_window": connection.context_tokens,
        "model_catalog_json": str(catalogue.absolute()),
        "web_search": "disabled",  # the search would run at OpenAI
    }
    provider: dict[str, Any] = {
        "name": "Argosy",
        "base_url": f"{connection.url}/v1",
        "wire_api": "responses",
        **({} if connection.key is None else {"env_key": KEY_VARIABLE}),
        "stream_idle_timeout_ms": _HOUR_MS,
    }
    table = ("model_providers", "argosy")
    models = as_json(_codex_catalogue(connection))
    shown = "\n".join([*as_toml(root), "", f"[{'.'.join(table)}]", *as_toml(provider)]) + "\n"
    return Setup(
        files=(
            SettingsFile(path=path, shown=shown, change=lambda text: merge_toml(text, root, table, provider)),
            SettingsFile(path=catalogue, shown=models, change=lambda text: models),
        ),
        notes=_variable_note(connection),
    )


def _codex_catalogue(connection: Connection) -> dict[str, Any]:
    """An entry in the form of Codex's catalogue; without it Codex assumes another model's window and tools."""
    inputs = [kind for kind in connection.inputs if kind in ("text", "image")]
    return {
        "models": [
            {
                "slug": connection.model,
                "display_name": connection.model,
                "description": f"Argosy at {connection.url}",
                "default_reasoning_level": None,
                "supported_reasoning_levels": [],
                "shell_type": "shell_command",
                "visibility": "list",
                "supported_in_api": True,
                "priority": 0,
                "additional_speed_tiers": [],
                "service_tiers": [],
                "availability_nux": None,
                "upgrade": None,
                "base_instructions": (
                    "You are a coding agent in the user's terminal. Read the files that matter before you change"
                    " them, make small changes, run the project's own checks, and say briefly what you did. Use the"
                    " tools you are given; never make up what a command printed."
                ),
                "supports_reasoning_summaries": False,
                "default_reasoning_summary": "none",
                "support_verbosity": False,
                "default_verbosity": None,
                "apply_patch_tool_type": None,
                "web_search_tool_type": "text",
                "truncation_policy": {"mode": "tokens", "limit": min(10_000, connection.context_tokens // 8)},
                "supports_parallel_tool_calls": True,
                "supports_image_detail_original": False,
                "context_window": connection.context_tokens,
                "max_context_window": connection.context_tokens,
                "auto_compact_token_limit": None,
                "effective_context_window_percent": 95,
                "experimental_supported_tools": [],
                "input_modalities": inputs,
                "supports_search_tool": False,
            }
        ]
    }


def _opencode(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    written = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"argosy/{connection.model}",
        "provider": {
            "argosy": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "Argosy",
                "options": {
                    "baseURL": f"{connection.url}/v1",
                    "apiKey": connection.secret(f"{{env:{KEY_VARIABLE}}}"),
                    "timeout": _HOUR_MS,
                    "headerTimeout": _HOUR_MS,
                    "chunkTimeout": _HOUR_MS,
                },
                "models": {
                    connection.model: {
                        "name": connection.model,
                        "tool_call": connection.tools != "none",
                        "limit": {"context": connection.context_tokens, "output": connection.output_tokens},
                        "modalities": {"input": list(connection.inputs), "output": ["text"]},
                    }
                },
            }
        },
    }
    path = file or _home(environment, "XDG_CONFIG_HOME", ".config") / "opencode" / "opencode.json"
    return Setup(
        files=(
            SettingsFile(path=path, shown=as_json(written), change=lambda text: merge_json(text, written)),
        ),
        notes=("a project's own opencode.json takes precedence", *_variable_note(connection)),
    )


def _open_webui(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    def values(key: str) -> dict[str, str]:
        return {
            "OPENAI_API_BASE_URL": f"{connection.url}/v1",
            "OPENAI_API_KEY": key,
            "ENABLE_OLLAMA_API": "False",
            "AIOHTTP_CLIENT_TIMEOUT": str(_HOUR_MS // 1000),
        }

    reference = f'"${KEY_VARIABLE}"'
    shown = "".join(
        f"export {name}={value if value == reference else shlex.quote(value)}\n"
        for name, value in values(connection.secret(reference)).items()
    )
    written = values(connection.key or _NO_KEY)
    path = file or Path("open-webui.env")
    return Setup(
        files=(SettingsFile(path=path, shown=shown, change=lambda text: merge_environment(text, written)),),
        place=f"in the shell of `open-webui serve`; --write puts them into {path}, for `docker run --env-file`",
        notes=(
            "they apply at the first start; later use Admin Settings, Connections, or ENABLE_PERSISTENT_CONFIG=False",
            "in a container 127.0.0.1 is the container itself: use `--url http://host.docker.internal:8080`, and a"
            " server that listens there, with a key",
        ),
    )


def _continue(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    capabilities = ["tool_use"] if connection.tools != "none" else []
    capabilities += ["image_input"] if "image" in connection.inputs else []
    item = [
        f"- name: {json.dumps(f'Argosy {connection.model}', ensure_ascii=False)}",
        "  provider: openai",
        f"  model: {json.dumps(connection.model, ensure_ascii=False)}",
        f"  apiBase: {json.dumps(f'{connection.url}/v1')}",
        f"  apiKey: {json.dumps(connection.secret(f'${{{{ secrets.{KEY_VARIABLE} }}}}'))}",
        "  roles: [chat, edit, apply]",
        f"  capabilities: [{', '.join(capabilities)}]",
        "  defaultCompletionOptions:",
        f"    contextLength: {connection.context_tokens}",
        f"    maxTokens: {connection.output_tokens}",
    ]
    start = "name: Argosy\nversion: 1.0.0\nschema: v1\n"
    directory = _home(environment, "CONTINUE_GLOBAL_DIR", ".continue")
    path = file or directory / "config.yaml"
    shown = start + "models:\n" + "".join(f"  {line}\n" for line in item)
    return Setup(
        files=(
            SettingsFile(
                path=path,
                shown=shown,
                change=lambda text: merge_yaml_list(text, start, "models", item, _is_entry_of_ours),
            ),
        ),
        notes=()
        if connection.key is None or connection.is_key_shown
        else (f"the key belongs in {directory / '.env'}, as {KEY_VARIABLE}=...",),
    )


def _is_entry_of_ours(entry: object) -> bool:
    """Whether `_continue` wrote this entry, for whichever model."""
    return isinstance(entry, Mapping) and entry.get("name") == f"Argosy {entry.get('model')}"


def _variable_note(connection: Connection) -> tuple[str, ...]:
    return (
        ()
        if connection.key is None
        else (f"the client reads the key from {KEY_VARIABLE}: export it in its shell",)
    )


def _home(environment: Mapping[str, str], variable: str, name: str) -> Path:
    return Path(environment.get(variable) or Path(environment.get("HOME") or Path.home()) / name)


SETUPS: dict[str, Callable[[Connection, Path | None, Mapping[str, str]], Setup]] = {
    "claude-code": _claude_code,
    "codex": _codex,
    "opencode": _opencode,
    "openwebui": _open_webui,
    "continue": _continue,
}
