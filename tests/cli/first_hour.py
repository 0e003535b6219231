"""The first hour of a new user, typed into a shell on a pseudo-terminal.

    plan, pull from a hub on loopback, run, chat past the context, a picture, a server, its clients and page

The model thinks, has Qwen3's chat template, and answers by script. Run as a program, this module slows hub and model
down, prints the longest stretch of each step in which nothing new came, and what was on the screen meanwhile. It exits
with 1 if such a stretch was longer than two seconds and the screen showed only what had been typed. On a busy machine,
two seconds become four times what `argosy --version` takes.

    python -m tests.cli.first_hour
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.cli.terminal import OnTerminal, Wait, on_terminal
from tests.helpers.hub_server import REPOSITORY, Served, directory_files, served
from tests.models.seeing import write_seeing_chat_model
from tests.serve.speaking import write_speaking_model

ROOT = Path(__file__).parents[2]
LONG_WAIT_S = 2.0
_CONTEXT = 256
_TOKENS_PER_S = 25.0  # of the slow model
_HELD_S = 5.0  # the slow hub, in the middle of the weights


class Step(NamedTuple):
    """What was typed or done, how long it took, and its longest wait."""

    what: str
    seconds: float
    longest: Wait | None


class Hour:
    """Types into a shell, and notes each step."""

    def __init__(self, terminal: OnTerminal) -> None:
        self._terminal = terminal
        self.steps: list[Step] = []

    def type(self, line: str, *expected: str) -> str:
        """Type a line, and wait for texts, one after another. Returns what was shown."""
        began, self._terminal.longest = time.monotonic(), None
        self._terminal.send(line.encode() + b"\r")
        shown = b""
        for text in expected:
            shown += self._terminal.until(text.encode()) + text.encode()
        self.steps.append(Step(line, time.monotonic() - began, self._terminal.longest))
        return shown.decode(errors="replace")

    def do(self, what: str, work: Callable[[], object]) -> None:
        """Note a step of another program."""
        began = time.monotonic()
        work()
        self.steps.append(Step(what, time.monotonic() - began, None))


def live(hour: Hour, home: Path) -> None:
    """Type the whole hour. Raises AssertionError if something expected does not come."""
    done = "<0> "  # the shell's prompt, after a command that succeeded
    hour.type(f"argosy plan {REPOSITORY}", "fits      yes", "not here: a download of", done)
    hour.type(f"argosy pull {REPOSITORY}", "licence   apache-2.0", "[y/N]")
    hour.type("y", f"argosy run -m {REPOSITORY}", done)
    hour.type("argosy list", REPOSITORY, done)
    hour.type(
        f'argosy run -m {REPOSITORY} "#think How are you?"', "thinking: Let me see.", "It is well.", done
    )

    used = f"of {_CONTEXT} tokens of context"
    hour.type(
        f"argosy chat {REPOSITORY} --context {_CONTEXT} -n 90", f"context of {_CONTEXT} tokens", "/help lists"
    )
    hour.type("#think Hi", "Let me see.", "It is well.", used)
    hour.type("#long", "(cut off after 90 tokens, the limit of -n", used)
    hour.type("/continue", "(cut off after 180 tokens, the limit of -n", used)
    hour.type("/continue", f"the context of {_CONTEXT} tokens is full: /trim", used)
    hour.type("/trim 40%", "dropped 1 turn (", "tokens are used")
    hour.type("/continue", "(cut off after", used)
    hour.type("/quit", done)

    hour.type(f'argosy run -m {home}/seeing --image {home}/cat.png -n 8 "What is it?"', "tokens   ", done)

    shown = hour.type(f"argosy up {REPOSITORY} --port 0", "the server runs at ", done)
    url = re.findall(r"the server runs at (http://[0-9.:]+)", shown)[0]
    hour.type("argosy ps", "ready", done)
    for name, ask in clients(url).items():
        hour.do(name, ask)
    hour.do("the page", lambda: urllib.request.urlopen(url, timeout=30).read().index(b"<html"))
    hour.type("argosy stop", "has stopped", done)


def clients(url: str) -> dict[str, Callable[[], object]]:
    """The clients that are installed, and a question of each."""
    question: Any = [{"role": "user", "content": "#plain"}]

    def openai() -> None:
        import openai

        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        model = client.models.list().data[0].id
        assert client.chat.completions.create(model=model, messages=question, max_tokens=8).choices

    def anthropic() -> None:
        import anthropic

        client = anthropic.Anthropic(base_url=url, api_key="none")
        model = client.models.list().data[0].id
        assert client.messages.create(model=model, messages=question, max_tokens=8).usage.output_tokens

    def ollama() -> None:
        import ollama

        client = ollama.Client(host=url)
        model = client.list().models[0].model
        assert client.chat(model=model, messages=question, options={"num_predict": 8}).message

    def as_curl() -> None:
        """Ollama's own example, which names no content type: curl and urllib then name a form's."""
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as models:
            model = json.load(models)["data"][0]["id"]
        body = {"model": model, "messages": question, "stream": False, "options": {"num_predict": 8}}
        chat = urllib.request.Request(f"{url}/api/chat", json.dumps(body).encode())
        with urllib.request.urlopen(chat, timeout=30) as answer:
            assert json.load(answer)["message"]

    known = {"openai": openai, "anthropic": anthropic, "ollama": ollama}
    found = {name: ask for name, ask in known.items() if importlib.util.find_spec(name) is not None}
    return {**found, "curl": as_curl}


@contextmanager
def new_user(home: Path, *, is_slow: bool) -> Iterator[Hour]:
    """A shell of somebody who has only installed Argosy, and a hub with one model."""
    from PIL import Image

    model = write_speaking_model(home / "served")
    write_seeing_chat_model(home / "seeing")
    Image.new("RGB", (64, 48), "orange").save(home / "cat.png")
    command = home / "bin" / "argosy"
    command.parent.mkdir()
    # Only what answers here needs the script; importing that takes a second.
    command.write_text(
        f"#!/bin/sh\ncase $1 in plan|pull|list|up|ps|stop) module=argosy;; *) module=tests.serve.speaking;; esac\n"
        f'exec {sys.executable} -P -m $module "$@"\n'
    )
    command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name in ("LANG", "PYTHONPYCACHEPREFIX")}
    environment = {
        **kept, "HOME": str(home), "PATH": f"{command.parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PS1": "<$?> ",
        "COLUMNS": "120", "TERM": "xterm", "ARGOSY_THREADS": "1",
    }  # fmt: skip
    if is_slow:
        environment["SPEAKING_TOKENS_PER_S"] = str(_TOKENS_PER_S)
    with served(directory_files(model)) as hub:
        environment["HF_ENDPOINT"] = hub.url
        if is_slow:
            _hold(hub)
        shell = [shutil.which("env") or "/usr/bin/env", "-i"]
        shell += [f"{name}={value}" for name, value in environment.items()]
        with on_terminal([*shell, "sh", "-i"]) as terminal:
            terminal.until(b"<0> ")
            try:
                yield Hour(terminal)
            except BaseException:  # a server in the background outlives the terminal
                subprocess.run([*shell, command, "stop"], stdin=subprocess.DEVNULL, timeout=60, check=False)
                raise


def _hold(hub: Served) -> None:
    """Let the hub pause within the weights, once they are asked for."""
    hub.holds["model.safetensors"] = at = 100_000

    def release() -> None:
        while not any(last > at for _, _, last in hub.ranges):  # headers end before
            time.sleep(0.1)
        time.sleep(_HELD_S)
        hub.is_held.set()

    threading.Thread(target=release, daemon=True).start()


def main() -> int:
    with tempfile.TemporaryDirectory() as directory, new_user(Path(directory), is_slow=True) as hour:
        hour.type("argosy --version", "<0> ")
        limit_s = max(LONG_WAIT_S, 4 * hour.steps[0].seconds)
        try:
            live(hour, Path(directory))
        finally:
            num_blank = sum(show(step, limit_s) for step in hour.steps)
    print(f"{num_blank} waits of more than {limit_s:.1f} s were blank")
    return 1 if num_blank else 0


def show(step: Step, limit_s: float) -> bool:
    """Print a step, and what was on the screen during a wait above the limit. Returns whether that was nothing."""
    line, wait, is_blank = f"{step.what[:60]:<60} {step.seconds:>6.1f} s", step.longest, False
    if wait is not None:
        line += f", nothing new for {wait.seconds:.1f} s"
        if wait.seconds > limit_s:
            is_blank = wait.is_blank
            line += f": {'BLANK' if is_blank else wait.shown}"
    print(line)
    return is_blank


if __name__ == "__main__":
    sys.exit(main())
