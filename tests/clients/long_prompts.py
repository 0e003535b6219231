"""A prompt of 25,000 tokens at 60 tokens a second, asked by real clients with their own time limits, twice.

    a client in a namespace of its own  ->  argosy serve, slowed by its model's `forward`  ->  a line of the table

The first answer takes seven minutes or more, and most of it is silence: a client that gives up and asks again shows as
more than one request. The second question is the same, so the tokens computed for it show what the first one left.
Rows run side by side, since they only wait. Clients that `argosy connect` knows are set up by it; the others keep their
defaults. Run it by hand, because a full table takes half an hour (`make test-clients` installs most of the clients):

    python -m tests.clients.long_prompts [--python PATH]... [--node-modules DIR] [--rate 60] [ROW...]

`--python` names interpreters of environments in which clients are installed; the first that has a row's package is
used. A row whose client is not found is left out.

Elsewhere: `loopback.py` starts servers; `tests/serve/speaking.py` slows them and counts tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore

from tests.clients.loopback import MODULES, PROGRAMS, URL, Done, Loopback, served

NUM_TOKENS = 25_000
CONTEXT_TOKENS = 131_072
MOST_S = 3000.0  # for one question
SENTENCE = "The harbour opens at nine, and the ferry leaves when the tide is high. "
TOKENS_PER_SENTENCE = 50  # with the tests' tokenizer
ANSWER = "It is well"
STARTING = BoundedSemaphore(2)  # servers start one or two at a time, so that none takes its deadline

# ruff: noqa: E501
# What a client runs: `U` is the server, `P` the prompt. It prints the answer.
_PYTHON = "import sys; U, P = sys.argv[1], open(sys.argv[2]).read()\n"
_NODE = 'import { readFileSync } from "node:fs"; const U = process.argv[2], P = readFileSync(process.argv[3], "utf8");\n'
_OPENAI = "from openai import OpenAI; c = OpenAI(base_url=U + '/v1', api_key='none')\nm = [{'role': 'user', 'content': P}]\n"
_ANTHROPIC = (
    "from anthropic import Anthropic; c = Anthropic(base_url=U, api_key='none')\n"
    "m = dict(model='tiny', max_tokens=64, messages=[{'role': 'user', 'content': P}])\n"
)
_OLLAMA = "import ollama\nm = [{'role': 'user', 'content': P}]\n"
_LITELLM = "import litellm\nm = [{'role': 'user', 'content': P}]\n"
_AI = (
    'import { generateText, streamText } from "ai";\n'
    'import { createOpenAICompatible } from "@ai-sdk/openai-compatible"; import { createOpenAI } from "@ai-sdk/openai";\n'
    'import { createAnthropic } from "@ai-sdk/anthropic";\n'
)
_JS_OPENAI = (
    'import OpenAI from "openai"; const c = new OpenAI({ baseURL: U + "/v1", apiKey: "none" });\n'
    'const m = { model: "tiny", messages: [{ role: "user", content: P }] };\n'
)
_JS_ANTHROPIC = (
    'import Anthropic from "@anthropic-ai/sdk"; const c = new Anthropic({ baseURL: U, apiKey: "none" });\n'
    'const m = { model: "tiny", max_tokens: 64, messages: [{ role: "user", content: P }] };\n'
)
_JS_OLLAMA = (
    'import { Ollama } from "ollama"; const c = new Ollama({ host: U });\n'
    'const m = { model: "tiny", messages: [{ role: "user", content: P }] };\n'
)


@dataclass(frozen=True)
class Row:
    """A client and how it asks.

    package: of Python or npm; or the name of a program.
    code: Python or JavaScript; empty for a program.
    connect: its name for `argosy connect`, if it has one.
    command: of a program; PROMPT, FILE and MODULES stand for the prompt, its file and npm's folder.
    own_tokens: about how long its own prompt is.
    """

    package: str
    code: str = ""
    is_node: bool = False
    connect: str | None = None
    command: Sequence[str] = ()
    own_tokens: int = 0


def _node(package: str, code: str) -> Row:
    return Row(package, _NODE + code, is_node=True)


def _python(package: str, code: str, connect: str | None = None) -> Row:
    return Row(package, _PYTHON + code, connect=connect)


ROWS: dict[str, Row] = {
    "openai-python": _python(
        "openai",
        _OPENAI + "print(c.chat.completions.create(model='tiny', messages=m).choices[0].message.content)",
    ),
    "openai-python, stream": _python(
        "openai",
        _OPENAI
        + "for e in c.chat.completions.create(model='tiny', messages=m, stream=True): print(e.choices[0].delta.content or '', end='')",
    ),
    "openai-python, responses stream": _python(
        "openai",
        _OPENAI
        + "for e in c.responses.create(model='tiny', input=P, stream=True): print(getattr(e, 'delta', ''), end='')",
    ),
    "anthropic-python": _python("anthropic", _ANTHROPIC + "print(c.messages.create(**m).content[0].text)"),
    "anthropic-python, stream": _python(
        "anthropic",
        _ANTHROPIC + "with c.messages.stream(**m) as s:\n  for t in s.text_stream: print(t, end='')",
    ),
    "ollama-python": _python(
        "ollama", _OLLAMA + "print(ollama.chat(model='tiny', messages=m).message.content)", "ollama"
    ),
    "ollama-python, stream": _python(
        "ollama",
        _OLLAMA
        + "for p in ollama.chat(model='tiny', messages=m, stream=True): print(p.message.content, end='')",
        "ollama",
    ),
    "openai-node": _node(
        "openai", _JS_OPENAI + "console.log((await c.chat.completions.create(m)).choices[0].message.content);"
    ),
    "openai-node, stream": _node(
        "openai",
        _JS_OPENAI
        + "for await (const e of await c.chat.completions.create({ ...m, stream: true })) process.stdout.write(e.choices[0].delta.content ?? '');",
    ),
    "anthropic-ts": _node(
        "@anthropic-ai/sdk", _JS_ANTHROPIC + "console.log((await c.messages.create(m)).content[0].text);"
    ),
    "anthropic-ts, stream": _node(
        "@anthropic-ai/sdk",
        _JS_ANTHROPIC
        + "const s = c.messages.stream(m); console.log((await s.finalMessage()).content[0].text);",
    ),
    "ollama-js": _node("ollama", _JS_OLLAMA + "console.log((await c.chat(m)).message.content);"),
    "ollama-js, stream": _node(
        "ollama",
        _JS_OLLAMA
        + "for await (const p of await c.chat({ ...m, stream: true })) process.stdout.write(p.message.content);",
    ),
    "AI SDK openai-compatible": _node(
        "@ai-sdk/openai-compatible",
        _AI
        + 'const p = createOpenAICompatible({ name: "argosy", baseURL: U + "/v1" });\n'
        + 'console.log((await generateText({ model: p("tiny"), prompt: P })).text);',
    ),
    "AI SDK openai, stream": _node(
        "@ai-sdk/openai",
        _AI
        + 'const p = createOpenAI({ baseURL: U + "/v1", apiKey: "none" });\n'
        + 'for await (const t of streamText({ model: p("tiny"), prompt: P }).textStream) process.stdout.write(t);',
    ),
    "AI SDK anthropic, stream": _node(
        "@ai-sdk/anthropic",
        _AI
        + 'const p = createAnthropic({ baseURL: U + "/v1", apiKey: "none" });\n'
        + 'for await (const t of streamText({ model: p("tiny"), prompt: P }).textStream) process.stdout.write(t);',
    ),
    "litellm openai/": _python(
        "litellm",
        _LITELLM
        + "print(litellm.completion('openai/tiny', m, api_base=U + '/v1', api_key='none').choices[0].message.content)",
    ),
    "litellm anthropic/": _python(
        "litellm",
        _LITELLM
        + "print(litellm.completion('anthropic/tiny', m, api_base=U, api_key='none').choices[0].message.content)",
    ),
    "litellm ollama_chat/": _python(
        "litellm",
        _LITELLM + "print(litellm.completion('ollama_chat/tiny', m, api_base=U).choices[0].message.content)",
    ),
    "langchain-openai": _python(
        "langchain_openai",
        "from langchain_openai import ChatOpenAI\n"
        "print(ChatOpenAI(base_url=U + '/v1', api_key='none', model='tiny').invoke(P).text)",
    ),
    "langchain-ollama": _python(
        "langchain_ollama",
        "from langchain_ollama import ChatOllama\nprint(ChatOllama(base_url=U, model='tiny').invoke(P).text)",
    ),
    "llama-index openai-like": _python(
        "llama_index.llms.openai_like",
        "from llama_index.llms.openai_like import OpenAILike\n"
        "print(OpenAILike(model='tiny', api_base=U + '/v1', api_key='none', is_chat_model=True).complete(P))",
    ),
    "instructor": _python(
        "instructor",
        "import instructor, openai, pydantic\n"
        "class R(pydantic.BaseModel): answer: int\n"
        "c = instructor.from_openai(openai.OpenAI(base_url=U + '/v1', api_key='none'), mode=instructor.Mode.JSON_SCHEMA)\n"
        "r = c.chat.completions.create(model='tiny', response_model=R, temperature=0, messages=[{'role': 'user',"
        " 'content': P.replace('#plain', '#json')}])\nprint('It is well, thank you.' if r.answer == 42 else r)",
    ),
    "pydantic-ai": _python(
        "pydantic_ai",
        "from pydantic_ai import Agent; from pydantic_ai.models.openai import OpenAIChatModel\n"
        "from pydantic_ai.providers.openai import OpenAIProvider\n"
        "m = OpenAIChatModel('tiny', provider=OpenAIProvider(base_url=U + '/v1', api_key='none'))\n"
        "print(Agent(m).run_sync(P).output)",
    ),
    "openai-agents": _python(
        "agents",
        "import agents, openai; agents.set_tracing_disabled(True)\n"
        "m = agents.OpenAIResponsesModel(model='tiny', openai_client=openai.AsyncOpenAI(base_url=U + '/v1', api_key='none'))\n"
        "print(agents.Runner.run_sync(agents.Agent(name='a', model=m), P).final_output)",
    ),
    "smolagents": _python(
        "smolagents",
        "from smolagents import OpenAIServerModel\n"
        "m = OpenAIServerModel('tiny', api_base=U + '/v1', api_key='none')\n"
        "print(m([{'role': 'user', 'content': P}]).content)",
    ),
    "llm": Row("llm", command=("-m", "llm", "-m", "argosy", "PROMPT"), connect="llm"),
    "Claude Code": Row(
        "claude",
        command=("-p", "PROMPT", "--output-format", "json"),
        connect="claude-code",
        own_tokens=41_000,
    ),
    "Codex": Row(
        "codex",
        command=(
            "exec",
            "--json",
            "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox",
            "PROMPT",
        ),
        connect="codex",
        own_tokens=5_000,
    ),
    "opencode": Row(
        "opencode", command=("run", "--format", "json", "PROMPT"), connect="opencode", own_tokens=17_000
    ),
    "aider": Row(
        "aider",
        command=(
            "--env-file",
            "aider.env",
            "--message",
            "PROMPT",
            "--yes-always",
            "--no-git",
            "--no-check-update",
            "--analytics-disable",
            "--no-pretty",
        ),
        connect="aider",
        own_tokens=2_000,
    ),
    "curl": Row(
        "curl",
        command=("-sS", "--json", "@BODY", f"{URL}/v1/chat/completions"),
    ),
    "curl, Ollama's API": Row("curl", command=("-sS", f"{URL}/api/chat", "-d", "@BODY")),
}


@dataclass
class Found:
    name: str
    version: str
    seconds: float
    is_answered: bool
    requests: list[str]
    num_computed: int
    num_again: int
    is_answered_again: bool
    last_words: str

    def __str__(self) -> str:
        said = "yes" if self.is_answered else "NO"
        again = "yes" if self.is_answered_again else "NO"
        return (
            f"| {self.name} | {self.version} | {self.seconds:.0f} | {said} | {len(self.requests)} |"
            f" {self.num_computed:,} | {self.num_again:,} | {again} |"
        )


HEAD = (
    "| client | version | seconds | answered | requests | tokens computed | computed for the second | answered |\n"
    "|---|---|---|---|---|---|---|---|"
)


class Installed:
    """Where clients are installed."""

    def __init__(self, pythons: Sequence[str], modules: Path) -> None:
        self._pythons, self.modules = pythons, modules

    def python(self, package: str) -> str | None:
        """The interpreter that has a package."""
        code = (
            f"import importlib.util as u, sys; sys.exit(u.find_spec({package.partition('.')[0]!r}) is None)"
        )
        for python in self._pythons:
            if not subprocess.run([python, "-c", code], check=False, capture_output=True).returncode:
                return python
        return None

    def command(self, row: Row, directory: Path, prompt: Path) -> list[str] | None:
        """The command that asks as a row does; None: its client is not installed."""
        if row.is_node:
            if not (self.modules / row.package).is_dir():
                return None
            script = directory / "ask.mjs"
            script.write_text(row.code)
            (directory / "node_modules").symlink_to(self.modules)
            return ["/usr/bin/env", "node", str(script), URL, str(prompt)]
        if row.code:
            python = self.python(row.package)
            return None if python is None else [python, "-c", row.code, URL, str(prompt)]
        program: str | None
        if row.package == "curl":
            program = "/usr/bin/curl"
        elif row.package == "llm":
            program = self.python("llm")
        else:
            found = PROGRAMS[row.package]
            found = self.modules / found.relative_to(MODULES) if found.is_relative_to(MODULES) else found
            program = str(found) if found.is_file() else self._script(row.package)
        if program is None:
            return None
        body = directory / "body.json"
        said = {"role": "user", "content": prompt.read_text()}
        body.write_text(json.dumps({"model": "tiny", "messages": [said], "stream": False}))
        words = {"PROMPT": prompt.read_text(), "@BODY": f"@{body}"}
        return [program, *(words.get(word, word) for word in row.command)]

    def _script(self, name: str) -> str | None:
        """A program beside one of the interpreters."""
        found = [path for python in self._pythons if (path := Path(python).with_name(name)).is_file()]
        return str(found[0]) if found else None

    def version(self, row: Row) -> str:
        if row.is_node:
            return str(json.loads((self.modules / row.package / "package.json").read_text())["version"])
        if row.code or row.package == "llm":
            name = {"agents": "openai-agents", "llama_index.llms.openai_like": "llama-index-llms-openai-like"}
            code = f"import importlib.metadata as m; print(m.version({name.get(row.package, row.package)!r}))"
            python = self.python(row.package)
            assert python is not None
            return subprocess.run(
                [python, "-c", code], check=False, capture_output=True, text=True
            ).stdout.strip()
        command = self.command(row, Path(tempfile.mkdtemp()), Path("/dev/null"))
        assert command is not None
        done = subprocess.run([command[0], "--version"], check=False, capture_output=True, text=True)
        found = re.search(r"\d+\.\d+\.\d+", done.stdout)
        return found[0] if found else "?"


def _ask(server: Loopback, command: Sequence[str], home: Path, work: Path) -> tuple[Done, float]:
    begin = time.monotonic()
    variables = {"DISABLE_TELEMETRY": "1", "DISABLE_AUTOUPDATER": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    settings = work / "ollama.env"
    if settings.is_file():
        variables |= dict(line.split("=", 1) for line in settings.read_text().splitlines() if "=" in line)
    try:
        done = server.run(command, home=home, work=work, timeout_s=MOST_S, variables=variables)
    except subprocess.TimeoutExpired:
        done = Done(-1, "", f"no answer within {MOST_S:.0f} s")
    time.sleep(0.5)  # a separate thread writes the log
    return done, time.monotonic() - begin


def _num_computed(log: Path) -> int:
    return sum(int(found) for found in re.findall(r"^computed (\d+) tokens$", log.read_text(), re.MULTILINE))


def try_row(name: str, installed: Installed) -> Found | None:
    row, directory = ROWS[name], Path(tempfile.mkdtemp(prefix="long-prompt-"))
    home, work, prompt = directory / "home", directory / "work", directory / "prompt.txt"
    home.mkdir()
    work.mkdir()
    num_own = max(0, NUM_TOKENS - row.own_tokens)
    prompt.write_text(SENTENCE * (num_own // TOKENS_PER_SENTENCE) + "#plain")
    command = installed.command(row, directory, prompt)
    if command is None:
        print(f"{name} is not installed", file=sys.stderr, flush=True)
        return None
    with ExitStack() as stack:
        with STARTING:
            server = stack.enter_context(served(directory, {}, "--context", str(CONTEXT_TOKENS)))
        if row.connect is not None:
            server.connect(row.connect, home=home, work=work)
        first, seconds = _ask(server, command, home, work)
        requests = re.findall(r"POST \S+ \d+ .*", server.log.read_text())
        num_computed = _num_computed(server.log)
        second, _ = _ask(server, command, home, work)
        num_again = _num_computed(server.log) - num_computed
    found = Found(
        name,
        installed.version(row),
        seconds,
        ANSWER in first.stdout,
        requests,
        num_computed,
        num_again,
        ANSWER in second.stdout,
        (first.stdout + first.stderr)[-400:],
    )
    print(f"{found}\n{'' if found.is_answered else found.last_words}", file=sys.stderr, flush=True)
    for request in requests:
        print(f"    {request}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", action="append", default=[])
    parser.add_argument("--node-modules", type=Path, default=MODULES)
    parser.add_argument("--rate", type=float, default=60.0, help="tokens a second")
    parser.add_argument("--side-by-side", type=int, default=12)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    given = parser.parse_args()
    os.environ["SPEAKING_TOKENS_PER_S"] = str(given.rate)
    installed = Installed([*given.python, sys.executable], given.node_modules.absolute())
    with ThreadPoolExecutor(given.side_by_side) as pool:
        rows = {name: pool.submit(try_row, name, installed) for name in given.rows or ROWS}
    print(HEAD)
    for name, row in rows.items():
        if (error := row.exception()) is not None:
            print(f"{name}: {error}", file=sys.stderr)
        elif (found := row.result()) is not None:
            print(found)


if __name__ == "__main__":
    main()
