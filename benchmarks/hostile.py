"""How much server memory and time do hostile requests take, and do other clients notice?

    python benchmarks/hostile.py [--only NAME]

Each attack gets a fresh `argosy serve` with a tiny model. Memory is the kernel's count for the server and its
chat-template process: resident before the attack, at the peak (VmHWM), and one second after. `others` is the longest
time of a /health request during the attack.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.abuse.hostile_bodies import ATTACKS
from tests.cli.tiny_chat_model import write_chat_model

MIB = 1 << 20


@contextlib.contextmanager
def served(model: Path) -> Iterator[tuple[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "argosy", "serve", str(model), "--memory", "1GiB", "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/ready").close()
                break
            time.sleep(0.05)
        post(
            f"{url}/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}',
        )
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def post(url: str, body: bytes) -> int:
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def memory(pid: int, name: str) -> int:
    """The value of `name`, in bytes, for a process and its children."""
    total = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *children):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    print(
        f"{'attack':<34} {'body MB':>8} {'before':>8} {'peak':>8} {'after':>8}  MiB   {'s':>6} {'others s':>8}  status"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = write_chat_model(Path(folder) / "model")
        for name, (path, body, at_once, _) in ATTACKS.items():
            if only not in name:
                continue
            data = body()
            json.loads(data)
            with served(model) as (url, pid):
                before, worst, is_over = memory(pid, "VmRSS"), [0.0], threading.Event()
                statuses: list[int] = []

                def watch(
                    url: str = url, worst: list[float] = worst, is_over: threading.Event = is_over
                ) -> None:
                    while not is_over.is_set():
                        began = time.monotonic()
                        urllib.request.urlopen(f"{url}/health", timeout=120).close()
                        worst[0] = max(worst[0], time.monotonic() - began)
                        time.sleep(0.01)

                def attack(
                    url: str = url, path: str = path, data: bytes = data, statuses: list[int] = statuses
                ) -> None:
                    statuses.append(post(url + path, data))

                watcher = threading.Thread(target=watch)
                watcher.start()
                began = time.monotonic()
                threads = [threading.Thread(target=attack) for _ in range(at_once)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                seconds = time.monotonic() - began
                is_over.set()
                watcher.join()
                peak = memory(pid, "VmHWM")
                time.sleep(1)
                print(
                    f"{name:<34} {at_once} x {len(data) / 1e6:4.1f} {before / MIB:8.0f} {peak / MIB:8.0f}"
                    f" {memory(pid, 'VmRSS') / MIB:8.0f}        {seconds:6.1f} {worst[0]:8.2f}  {sorted(statuses)}",
                    flush=True,
                )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
