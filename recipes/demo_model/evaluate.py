"""Measure the shipped model: perplexities before and after, each expert removed, routing by domain, and a chat.

    python evaluate.py --work WORK --experts packages/argosy-demo/argosy_demo/experts.gguf

The experts are those of the file, dequantised to float16 as the demo model stores them, not the trainer's float32
weights. Streams and windows are fixed, see `data.py`. An expert is removed from all layers at once, in two ways: it
adds nothing, or it may not be chosen and the next best expert takes its place.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from base_model import END_OF_TURN, chat_prompt, find_gguf, load_tokenizer
from data import DOMAINS, EVALUATION_WINDOW

from argosy.demo.experts import TrainedExperts
from model import NUM_EXPERTS, DemoModel

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Write a Python function that adds two numbers.",
    "I have 5 apples and buy 7 more. How many apples do I have?",
    "Give me three tips to sleep better.",
    "Who are you?",
)
PARTS = ("perplexity", "routing", "silent", "forbidden", "chat")
CROSS_CHECKS = ("wiki_plain", "maths_raw")


def load_shipped(model: DemoModel, path: Path) -> None:
    """Load the experts file into the trainer's model, rounded to float16 as `build_demo` stores it."""
    trained = TrainedExperts(path)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(trained.num_layers):
        found = trained.layer(layer)
        for kind, values in (
            ("router", found.router),
            ("gate_up", np.concatenate([found.gate, found.up], axis=1)),
            ("down", found.down),
        ):
            tensors[f"layers.{layer}.{kind}"] = torch.from_numpy(values.astype(np.float16).astype(np.float32))
    model.load_trained(tensors)


def routing_shares(model: DemoModel, ids: np.ndarray, window: int) -> np.ndarray:
    """Each expert's share of the routing choices on a stream, averaged over layers."""
    counts = torch.zeros(NUM_EXPERTS)
    with torch.inference_mode():
        for at in range(0, len(ids) - 1, window):
            part = torch.from_numpy(ids[at : at + window].astype(np.int64))
            _, routing = model(part[None])
            for expert_ids in routing.expert_ids:
                counts += torch.bincount(expert_ids.reshape(-1), minlength=NUM_EXPERTS)
    return (counts / counts.sum()).numpy()


def table(titles: list[str]) -> None:
    row(titles)
    row(["---"] * len(titles))


def row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


class Evaluation:
    """One model, the held-out streams, and the tables printed from them."""

    def __init__(self, model: DemoModel, held_out: Path, removal_tokens: int) -> None:
        self._model = model
        arrays = np.load(held_out)
        known = (*DOMAINS, *CROSS_CHECKS)
        self._streams = {
            name: (arrays[f"{name}_ids"], arrays[f"{name}_targets"])
            for name in known
            if f"{name}_ids" in arrays
        }
        self._domains = [name for name in DOMAINS if name in self._streams]
        self._removal_tokens = removal_tokens

    def perplexity(self) -> None:
        print("\nperplexity on held-out text\n")
        table(["", *self._streams])
        for label, experts_on in (("dense", False), ("with experts", True)):
            self._model.experts_on = experts_on
            losses = [self._losses(name) for name in self._streams]
            row([label, *(f"{math.exp(found.mean()):.2f}" for found in losses)])
        row(["tokens", *(str(len(found)) for found in losses)])

    def routing(self) -> None:
        print("\nshare of choices that each expert gets, %; even would be 12.5\n")
        table(["", *(f"expert {expert}" for expert in range(NUM_EXPERTS))])
        for name in self._domains:
            shares = routing_shares(self._model, self._streams[name][0][:2048], EVALUATION_WINDOW)
            row([name, *(f"{100 * share:.1f}" for share in shares)])

    def silent(self) -> None:
        print(
            "\nchange of perplexity when one expert adds nothing; in brackets, of the loss, in standard errors\n"
        )
        self._removals("silent_expert")

    def forbidden(self) -> None:
        print("\nthe same when one expert may not be chosen, so that the next best takes its place\n")
        self._removals("forbidden_expert")

    def _removals(self, kind: str) -> None:
        whole = {name: self._losses(name, self._removal_tokens) for name in self._domains}
        table(["expert", *self._domains])
        for expert in range(NUM_EXPERTS):
            setattr(self._model, kind, expert)
            cells = []
            for name in self._domains:
                # Losses are compared token by token, so that most of the noise cancels.
                worse = self._losses(name, self._removal_tokens) - whole[name]
                error = worse.std(ddof=1) / math.sqrt(len(worse))
                cells.append(f"{100 * math.expm1(worse.mean()):+.1f} % ({worse.mean() / error:+.1f})")
            row([str(expert), *cells])
        setattr(self._model, kind, None)

    def _losses(self, name: str, num_tokens: int | None = None) -> np.ndarray:
        ids, is_target = self._streams[name]
        end = None if num_tokens is None else num_tokens + 1
        return self._model.token_losses(ids[:end], is_target[:end], EVALUATION_WINDOW)


def print_chat(model: DemoModel, gguf_path: Path) -> None:
    tokenizer = load_tokenizer(gguf_path)
    end_id = tokenizer.token_to_id(END_OF_TURN)
    for question in QUESTIONS:
        reply = model.greedy(tokenizer.encode(chat_prompt(question)).ids, end_id, 64)
        print(f"{question}\n    {tokenizer.decode(reply, skip_special_tokens=False)!r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder with heldout.npz")
    parser.add_argument(
        "--experts", type=Path, help="the experts file; without it, the float32 masters in WORK"
    )
    parser.add_argument("--removal-tokens", type=int, default=4096, help="of each stream, for the removals")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all of them if not given")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    gguf_path = find_gguf(asked.work)
    model = DemoModel(gguf_path)
    if asked.experts:
        load_shipped(model, asked.experts)
    else:
        model.load_trained(asked.work / "trained.safetensors")
    evaluation = Evaluation(model, asked.work / "heldout.npz", asked.removal_tokens)
    for part in asked.parts:
        if part == "chat":
            print_chat(model, gguf_path)
        else:
            getattr(evaluation, part)()


if __name__ == "__main__":
    main()
