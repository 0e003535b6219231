"""How fast does a worker copy its files from the coordinator, and what does that cost an answer beside it?

    python benchmarks/cluster_copy.py --short           # half a minute
    python benchmarks/cluster_copy.py --model DIR --repeats 7

Everything is on this machine: both ends share its drive and its cores, so a copy reads and writes the same drive, and
the rate is that of the slowest part, most likely the drive. The same bytes are copied by `cp` in turn. Beside answers,
a copy is bounded to `--copy-rate`; tokens with and without one alternate.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from argosy import Engine, SamplingParams
from argosy.checkpoint.files import ExpertRecord
from argosy.checkpoint.pack import pack
from argosy.checkpoint.shards import ALL_SHARDS, COPY_FILE
from argosy.cluster.copied import Copy
from argosy.cluster.copy_link import CopyEnd, CopyLink
from argosy.cluster.copy_source import CopySource, Pace, serve_copy
from argosy.cluster.identity import fingerprint
from argosy.config import parse_size
from argosy.model.families import open_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import Report, alternate
from tests.models.tiny import qwen3_moe, write_model

KEY = bytes(32)


def copied(model: Path, directory: Path, pace: Pace, stop: threading.Event | None = None) -> float:
    """Copy a model as a worker does; returns the seconds."""
    ours, theirs = socket.socketpair()
    files = open_model(model)
    stop = stop or threading.Event()

    def serve() -> None:
        with theirs, suppress(Exception):  # the other end ends it
            serve_copy(
                CopyEnd(theirs, KEY),
                CopySource(files),
                ALL_SHARDS,
                pace=pace,
                sent=lambda nbytes: None,
                stop=stop,
            )

    thread = threading.Thread(target=serve)
    thread.start()
    copy = Copy(directory)
    began = time.perf_counter()
    try:
        with ours:
            copy.fill(
                CopyLink(ours, KEY), fingerprint(files), lambda files, shards: None, lambda what, share: None
            )
        return time.perf_counter() - began
    finally:
        thread.join()
        copy.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a pack; default: one is made, of half a GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--copy-rate", default="50MB")
    parser.add_argument("--short", action="store_true")
    arguments = parser.parse_args()
    repeats = 3 if arguments.short else arguments.repeats
    with tempfile.TemporaryDirectory(prefix="argosy-copy-", dir=Path(__file__).parent) as root_name:
        root = Path(root_name)
        model = arguments.model or made_model(root, small=arguments.short)
        measure(
            model,
            root,
            repeats,
            256 if arguments.short else arguments.tokens,
            float(parse_size(arguments.copy_rate)),
        )


def made_model(root: Path, *, small: bool) -> Path:
    config = qwen3_moe(
        hidden_size=512, moe_intermediate_size=512, num_hidden_layers=4 if small else 8, num_experts=32,
        num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    pack(open_model(write_model(root / "made", config, seed=3)), root / "model", format="source")
    shutil.rmtree(root / "made")
    return root / "model"


def measure(model: Path, root: Path, repeats: int, num_tokens: int, rate: float) -> None:
    files = open_model(model)
    nbytes = files.expert_bytes
    report = Report(
        "cluster_copy", state=f"{nbytes / 1e9:.2f} GB of experts; both ends and the drive are this machine's"
    )
    target = root / "copy"
    free = Pace(1e15, lambda: False)

    def copy_once() -> dict[str, float]:
        seconds = copied(model, target, free)
        shutil.rmtree(target)
        return {"MB/s": nbytes / 1e6 / seconds}

    def cp_once() -> dict[str, float]:
        began = time.perf_counter()
        subprocess.run(["cp", "-r", str(model), str(target)], check=True)
        subprocess.run(["sync", "-d", *(str(path) for path in target.iterdir())], check=True)
        seconds = time.perf_counter() - began
        shutil.rmtree(target)
        return {"MB/s": nbytes / 1e6 / seconds}

    copied(model, target, free)
    ours, theirs = files.experts, open_model(target, is_copy=True).experts
    assert all(bytes_of(ours[key]) == bytes_of(theirs[key]) for key in ours)
    shutil.rmtree(target)
    prompt = list(range(3, 19))
    wanted = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    half = max(files.config.experts_per_token, len(files.experts) // 2)
    with Engine.open(model, memory="4GiB", threads=1, expert_slots=half, prefix_reuse=False) as engine:
        expected = engine.generate(prompt, wanted).token_ids

        def answer() -> dict[str, float]:
            began = time.perf_counter()
            assert engine.generate(prompt, wanted).token_ids == expected
            return {"tok/s": num_tokens / (time.perf_counter() - began)}

        def answer_beside() -> dict[str, float]:
            stop = threading.Event()

            def copying() -> None:
                with suppress(Exception):  # it is ended in the middle
                    copied(model, target, Pace(rate, lambda: True), stop)

            thread = threading.Thread(target=copying)
            thread.start()
            while not (target / COPY_FILE).exists():
                time.sleep(0.01)
            try:
                return answer()
            finally:
                stop.set()
                thread.join()
                shutil.rmtree(target)

        report.correct(
            f"{len(ours)} of {len(ours)} experts are copied bit for bit; {num_tokens} tokens are equal beside a copy"
        )
        report.opening()
        rates = alternate({"copy": copy_once, "cp": cp_once}, repeats)
        tokens = alternate({"alone": answer, "beside": answer_beside}, repeats)
    ours_rate = report.figure("a worker copies", "MB/s", rates["copy"], "MB/s")
    cp_rate = report.figure("cp and sync", "MB/s", rates["cp"], "MB/s")
    alone = report.figure("answers alone", "tok/s", tokens["alone"], "tok/s")
    beside = report.figure(
        f"answers beside a copy of {rate / 1e6:.0f} MB/s", "tok/s", tokens["beside"], "tok/s"
    )
    report.ratio("copy over cp", ours_rate, cp_rate)
    report.ratio("answers beside over alone", beside, alone)
    for name, samples in (rates | tokens).items():
        cores = statistics.median(sample.other_cores for sample in samples)
        report.line("others", f"{name}: {cores:.2f} cores were used by other processes")


def bytes_of(record: ExpertRecord) -> list[bytes]:
    found = []
    for piece in record.pieces:
        with piece.path.open("rb") as file:
            file.seek(piece.offset)
            found.append(file.read(piece.nbytes))
    return found


if __name__ == "__main__":
    main()
