"""The settings that each client needs to use a running server, and the files where they belong.

    Connection  ->  SETUPS[client]  ->  Setup: files to print or to change, and notes

The names were checked against the clients' documentation in November 2026: Claude Code 2.1, Codex 0.169, opencode
1.18 (its version 2 reads the same file), Open WebUI 0.12, Continue's config.yaml with schema v1, Ollama's packages
for Python and node 0.6, Zed's openai_compatible providers, aider 0.86, llm 0.36, and the forms of Cline, Roo Code
and Jan. Clients' time limits are raised, because prefill may take minutes when experts come from the drive.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from argosy.cli.shared.edit_file import (
    Change,
    as_json,
    as_toml,
    merge_environment,
    merge_json,
    merge_toml,
    merge_yaml_items,
    merge_yaml_list,
)
from argosy.errors import UsageError
from argosy.user_directories import home_directory

if TYPE_CHECKING:
    from argosy.prompt.prompt import ToolCalling

KEY_VARIABLE = "ARGOSY_API_KEY"
_REFERENCE = f'"${KEY_VARIABLE}"'  # as written in a shell
_NO_KEY = "none"  # clients require a key; a server without keys ignores it
_HOUR_MS = 3_600_000
_LONGEST_OUTPUT_TOKENS = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """The server as a client should see it."""

    url: str
    model: str
    context_tokens: int
    inputs: tuple[str, ...] = ("text",)
    tools: ToolCalling = "native"  # assumed if the server does not answer
    key: str | None = None
    is_key_shown: bool = False

    @property
    def output_tokens(self) -> int:
        """The longest answer that a client may request: it must fit the context together with the prompt."""
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
        """The text to print for the key: a reference, unless the key itself was requested."""
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
    """`form` is for clients whose settings no other program can change: lines to type in. They have no files."""

    files: tuple[SettingsFile, ...] = ()
    form: str = ""
    # Where the form, or the first file's `shown`, belongs, if not in the file itself.
    place: str | None = None
    notes: tuple[str, ...] = field(default=())


def _claude_code(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    def values(token: str) -> dict[str, str]:
        return {
            "ANTHROPIC_BASE_URL": connection.url,  # without /v1
            "ANTHROPIC_AUTH_TOKEN": token,
            "ANTHROPIC_DEFAULT_OPUS_MODEL": connection.model,
            "ANTHROPIC_DEFAULT_SONNET_MODEL": connection.model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": connection.model,
            # The answer does not count against this window but must fit after it.
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(connection.context_tokens - connection.output_tokens),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(connection.output_tokens),
            # Drops a line at the start of the prompt that changes in every conversation and defeats the prefix
            # cache.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            "API_TIMEOUT_MS": str(_HOUR_MS),
            # Without it, Claude Code drops a stream whose first token takes more than five minutes, and retries.
            "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(_HOUR_MS),
        }

    shown = _exports(values(connection.secret(_REFERENCE)))
    written = {"env": values(connection.key or _NO_KEY)}
    path = file or _home(environment, "CLAUDE_CONFIG_DIR", ".claude") / "settings.json"
    return Setup(
        files=(SettingsFile(path=path, shown=shown, change=lambda text: merge_json(text, written)),),
        place=f'in the shell that starts `claude`; or under "env" in {path}, where --write puts them',
        notes=("do not set ANTHROPIC_API_KEY as well: Claude Code would also send it",),
    )


def _codex(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    path = file or _home(environment, "CODEX_HOME", ".codex") / "config.toml"
    catalogue = path.parent / "argosy-models.json"
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
    """An entry for Codex's catalogue, without which Codex assumes another model's window and tools."""
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


def _environment_setup(
    connection: Connection,
    values: Callable[[str], dict[str, str]],
    path: Path,
    *,
    place: str,
    notes: tuple[str, ...] = (),
) -> Setup:
    """The setup of a client that reads variables: shown for a shell, written to a file of variables.

    Args:
        values: makes the variables, given the key.
    """
    written = values(connection.key or _NO_KEY)
    return Setup(
        files=(
            SettingsFile(
                path=path,
                shown=_exports(values(connection.secret(_REFERENCE))),
                change=lambda text: merge_environment(text, written),
            ),
        ),
        place=place,
        notes=notes,
    )


def _open_webui(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    def values(key: str) -> dict[str, str]:
        return {
            "OPENAI_API_BASE_URL": f"{connection.url}/v1",
            "OPENAI_API_KEY": key,
            "ENABLE_OLLAMA_API": "False",
            "AIOHTTP_CLIENT_TIMEOUT": str(_HOUR_MS // 1000),
        }

    path = file or Path("open-webui.env")
    return _environment_setup(
        connection,
        values,
        path,
        place=f"in the shell of `open-webui serve`; --write puts them into {path}, for `docker run --env-file`",
        notes=(
            "they apply at the first start; later use Admin Settings, Connections, or ENABLE_PERSISTENT_CONFIG=False",
            "in a container 127.0.0.1 is the container itself: use"
            f" `--url {_from_container(connection.url)}`, and a server that listens there, with a key",
        ),
    )


def _ollama(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    def values(key: str) -> dict[str, str]:
        return {"OLLAMA_HOST": connection.url} | ({} if connection.key is None else {"OLLAMA_API_KEY": key})

    path = file or Path("ollama.env")
    return _environment_setup(
        connection,
        values,
        path,
        place=f"in the shell of a client that speaks Ollama's API; --write puts them into {path}",
        notes=(
            f"the model's name is {connection.model}; argosy commands fetch and delete models, not this API",
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


def _zed(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    written = {
        "language_models": {
            "openai_compatible": {
                # Zed reads the key from the upper-case provider's name plus _API_KEY: ARGOSY_API_KEY.
                "Argosy": {
                    "api_url": f"{connection.url}/v1",
                    "available_models": [
                        {
                            "name": connection.model,
                            "display_name": connection.model,
                            "max_tokens": connection.context_tokens,
                            "max_output_tokens": connection.output_tokens,
                            "capabilities": {
                                "tools": connection.tools != "none",
                                "images": "image" in connection.inputs,
                                "parallel_tool_calls": connection.tools != "none",
                                "prompt_cache_key": False,
                            },
                        }
                    ],
                }
            }
        },
        "agent": {"default_model": {"provider": "Argosy", "model": connection.model}},
    }
    path = file or _home(environment, "XDG_CONFIG_HOME", ".config") / "zed" / "settings.json"
    needed = f"Zed uses no provider without a key: export {KEY_VARIABLE}={_NO_KEY} in its shell"
    return Setup(
        files=(
            SettingsFile(path=path, shown=as_json(written), change=lambda text: merge_json(text, written)),
        ),
        notes=_variable_note(connection) or (needed,),
    )


def _aider(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    def values(key: str) -> dict[str, str]:
        return {
            "OPENAI_API_BASE": f"{connection.url}/v1",
            "OPENAI_API_KEY": key,
            "AIDER_MODEL": f"openai/{connection.model}",  # the prefix selects the protocol
            "AIDER_TIMEOUT": str(_HOUR_MS // 1000),
            "AIDER_SHOW_MODEL_WARNINGS": "false",  # it knows no prices for this model
        }

    path = file or Path("aider.env")
    return _environment_setup(
        connection,
        values,
        path,
        place=f"in the shell that starts `aider`; --write puts them into {path}, for `aider --env-file`",
    )


def _llm(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
    """An entry in llm's list of models with OpenAI's API."""
    item = [
        f"- model_id: {json.dumps(f'argosy/{connection.model}', ensure_ascii=False)}",
        f"  model_name: {json.dumps(connection.model, ensure_ascii=False)}",
        "  aliases: [argosy]",
        f"  api_base: {json.dumps(f'{connection.url}/v1')}",
        *([] if connection.key is None else ["  api_key_name: argosy"]),
        *(["  supports_tools: true"] if connection.tools != "none" else []),
        "  supports_schema: true",
        *(["  vision: true"] if "image" in connection.inputs else []),
        *(["  audio: true"] if "audio" in connection.inputs else []),
    ]
    directory = environment.get("LLM_USER_PATH")
    if directory is None:
        directory = str(_home(environment, "XDG_CONFIG_HOME", ".config") / "io.datasette.llm")
    path = file or Path(directory) / "extra-openai-models.yaml"
    stored = "llm keeps keys itself: `llm keys set argosy` asks for it"
    return Setup(
        files=(
            SettingsFile(
                path=path,
                shown="".join(f"{line}\n" for line in item),
                change=lambda text: merge_yaml_items(text, item, _is_model_of_ours),
            ),
        ),
        notes=(
            '`llm -m argosy "Why is the sky blue?"` asks it',
            *(() if connection.key is None else (stored,)),
        ),
    )


def _form(
    fields: Callable[[Connection], Mapping[str, object]], place: str, *, notes: tuple[str, ...] = ()
) -> Callable[[Connection, Path | None, Mapping[str, str]], Setup]:
    def setup(connection: Connection, file: Path | None, environment: Mapping[str, str]) -> Setup:
        if file is not None:
            raise UsageError("--file names a settings file, and this client's settings are typed into it")
        form = "".join(f"{name}: {value}\n" for name, value in fields(connection).items())
        return Setup(form=form, place=place, notes=notes)

    return setup


def _cline_fields(connection: Connection) -> dict[str, object]:
    """The field names of Cline, and of Roo Code, which grew from it."""
    return {
        "API Provider": "OpenAI Compatible",
        "Base URL": f"{connection.url}/v1",
        "API Key": connection.secret(f"the text of {KEY_VARIABLE}"),
        "Model ID": connection.model,
        "Context Window Size": connection.context_tokens,
        "Max Output Tokens": connection.output_tokens,
        "Supports Images": "yes" if "image" in connection.inputs else "no",
    }


def _jan_fields(connection: Connection) -> dict[str, object]:
    return {
        "API Format": "OpenAI-compatible",
        "Provider Name": "Argosy",
        "Base URL": f"{connection.url}/v1",
        "API Key": connection.secret(f"the text of {KEY_VARIABLE}"),
        "Model ID": connection.model,
    }


def _is_model_of_ours(entry: object) -> bool:
    """Whether `_llm` wrote this entry, for any model."""
    return isinstance(entry, Mapping) and entry.get("model_id") == f"argosy/{entry.get('model_name')}"


def _is_entry_of_ours(entry: object) -> bool:
    """Whether `_continue` wrote this entry, for any model."""
    return isinstance(entry, Mapping) and entry.get("name") == f"Argosy {entry.get('model')}"


def _exports(values: Mapping[str, str]) -> str:
    """Shell lines; a reference to the key stays a reference."""
    return "".join(
        f"export {name}={value if value == _REFERENCE else shlex.quote(value)}\n"
        for name, value in values.items()
    )


def _variable_note(connection: Connection) -> tuple[str, ...]:
    return (
        ()
        if connection.key is None
        else (f"the client reads the key from {KEY_VARIABLE}: export it in its shell",)
    )


def _from_container(url: str) -> str:
    """The address of this machine as seen from a container, with the port and path of `url`."""
    parts = urlsplit(url)
    port = "" if parts.port is None else f":{parts.port}"
    return urlunsplit(parts._replace(netloc=f"host.docker.internal{port}"))


def _home(environment: Mapping[str, str], variable: str, name: str) -> Path:
    return Path(environment.get(variable) or home_directory(environment) / name)


SETUPS: dict[str, Callable[[Connection, Path | None, Mapping[str, str]], Setup]] = {
    "claude-code": _claude_code,
    "codex": _codex,
    "opencode": _opencode,
    "openwebui": _open_webui,
    "ollama": _ollama,
    "continue": _continue,
    "zed": _zed,
    "aider": _aider,
    "llm": _llm,
    "cline": _form(_cline_fields, "in the settings panel of Cline"),
    "roo": _form(
        _cline_fields,
        "in the settings panel of Roo Code",
        notes=(
            'it gives up after ten minutes: set `"roo-cline.apiRequestTimeout": 3600` in VS Code\'s settings',
        ),
    ),
    "jan": _form(
        _jan_fields,
        "in Jan under Settings, Model Providers, Add Provider",
        notes=(
            "Jan names itself to servers on its own machine: start this one with"
            " `argosy serve --allow-origin tauri://localhost`",
        ),
    ),
}
