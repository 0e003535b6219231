"""Train the routed experts and the router on a frozen dense model, for a given number of minutes.

    domain phase   each sequence goes to the expert pair of its domain; the router learns to choose that pair
    mix phase      the router decides; experts and router train together, with a load-balance loss

    python train.py --work WORK --minutes 80

It writes WORK/trained.safetensors every few minutes, and WORK/train.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from base_model import END_OF_TURN, chat_prompt, find_gguf, load_tokenizer
from data import DOMAIN_OF_SLOT, DOMAINS

from model import NUM_EXPERTS, DemoModel, Routing

SLOTS_OF_STEP = (("prose", "prose", "maths", "plays", "code"), ("prose", "prose", "maths", "chat", "code"))


class Batches:
    """Shuffled passes over the sequences of each slot, with one tuple of slots per step."""

    def __init__(self, path: Path, seed: int) -> None:
        arrays = np.load(path)
        self._ids = {slot: arrays[f"{slot}_ids"] for slot in DOMAIN_OF_SLOT}
        self._targets = {slot: arrays[f"{slot}_targets"] for slot in DOMAIN_OF_SLOT}
        self._chance = np.random.default_rng(seed)
        self._queue: dict[str, list[int]] = {slot: [] for slot in DOMAIN_OF_SLOT}

    def next(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids int64 [sequences, tokens + 1], is_target bool of the same shape, domain int64 [sequences]."""
        slots = SLOTS_OF_STEP[step % len(SLOTS_OF_STEP)]
        picks = [(slot, self._pick(slot)) for slot in slots]
        ids = np.stack([self._ids[slot][at] for slot, at in picks]).astype(np.int64)
        targets = np.stack([self._targets[slot][at] for slot, at in picks])
        return (
            torch.from_numpy(ids),
            torch.from_numpy(targets),
            torch.tensor([DOMAIN_OF_SLOT[slot] for slot in slots]),
        )

    def _pick(self, slot: str) -> int:
        if not self._queue[slot]:
            self._queue[slot] = self._chance.permutation(len(self._ids[slot])).tolist()
        return self._queue[slot].pop()


def balance_loss(routing: Routing) -> torch.Tensor:
    """Switch-style balance loss, 1.0 when even: experts x share of choices x mean probability, mean over layers."""
    losses = []
    for log_probs, expert_ids in zip(routing.log_probs, routing.expert_ids, strict=True):
        share = torch.bincount(expert_ids.reshape(-1), minlength=NUM_EXPERTS) / expert_ids.numel()
        losses.append(NUM_EXPERTS * (share * log_probs.exp().mean(dim=0)).sum())
    return torch.stack(losses).mean()


def choice_loss(routing: Routing) -> torch.Tensor:
    """The router's cross entropy against the forced experts, averaged over layers."""
    return torch.stack(
        [-p.gather(1, ids).mean() for p, ids in zip(routing.log_probs, routing.expert_ids, strict=True)]
    ).mean()


def learning_rate(progress: float, step: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 20)
    return peak * warm * (0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder with train.npz and heldout.npz")
    parser.add_argument(
        "--resume", type=Path, help="start from these trained tensors, with a fresh optimiser"
    )
    parser.add_argument("--minutes", type=float, default=80.0)
    parser.add_argument("--domain-phase", type=float, default=0.42, help="share of the time")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--balance", type=float, default=0.02)
    parser.add_argument("--choice", type=float, default=0.1)
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--watch-minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(asked.seed)

    gguf_path = find_gguf(asked.work)
    tokenizer = load_tokenizer(gguf_path)
    end_id = tokenizer.token_to_id(END_OF_TURN)
    question = tokenizer.encode(chat_prompt("What is the capital of France?")).ids
    model = DemoModel(gguf_path, seed=asked.seed)
    if asked.resume:
        model.load_trained(asked.resume)
    held_out = np.load(asked.work / "heldout.npz")
    batches = Batches(asked.work / "train.npz", asked.seed)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=asked.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )

    def watch(label: str) -> None:
        names = [name for name in (*DOMAINS, "wiki_plain", "maths_raw") if f"{name}_ids" in held_out]
        found = []
        for name in names:
            losses = model.token_losses(
                held_out[f"{name}_ids"][:1025], held_out[f"{name}_targets"][:1025], 512
            )
            found.append(f"{name} {math.exp(losses.mean()):.2f}")
        reply = tokenizer.decode(model.greedy(question, end_id, 16), skip_special_tokens=False)
        print(f"held out, {label}: {', '.join(found)}; Paris: {reply!r}", flush=True)

    started = time.monotonic()
    watch("step 0")
    last_save = last_watch = started
    step = num_tokens = 0
    with (asked.work / "train.csv").open("w", newline="", encoding="utf-8") as log_file:
        log = csv.writer(log_file)
        log.writerow(
            [
                "step",
                "minutes",
                "tokens",
                "loss",
                "auxiliary",
                "learning_rate",
                "gradient_norm",
                "smallest_share",
            ]
        )
        while (progress := (time.monotonic() - started) / (asked.minutes * 60)) < 1:
            ids, targets, domains = batches.next(step)
            is_forced = progress < asked.domain_phase
            forced_ids = torch.stack([2 * domains, 2 * domains + 1], dim=1) if is_forced else None
            rate = learning_rate(progress, step, asked.learning_rate)
            for group in optimiser.param_groups:
                group["lr"] = rate
            hidden, routing = model(ids[:, :-1], forced_ids)
            loss = model.loss(hidden, ids[:, 1:], targets[:, 1:])
            auxiliary = (
                asked.choice * choice_loss(routing) if is_forced else asked.balance * balance_loss(routing)
            )
            (loss + auxiliary).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            num_tokens += int(targets[:, 1:].sum())
            now = time.monotonic()
            shares = torch.stack(
                [torch.bincount(i.reshape(-1), minlength=NUM_EXPERTS) / i.numel() for i in routing.expert_ids]
            )
            log.writerow([
                step, f"{(now - started) / 60:.2f}", num_tokens, f"{loss.item():.4f}", f"{auxiliary.item():.4f}",
                f"{rate:.2e}", f"{norm.item():.3f}", f"{float(shares.min()):.4f}",
            ])  # fmt: skip
            if step % 10 == 0:
                log_file.flush()
                losses = f"loss {loss.item():.3f}  aux {auxiliary.item():.3f}  norm {norm.item():.2f}"
                print(f"step {step}  {(now - started) / 60:.1f} min  {losses}", flush=True)
            if now - last_save > asked.save_minutes * 60:
                model.save_trained(asked.work / "trained.safetensors")
                last_save = now
            if now - last_watch > asked.watch_minutes * 60:
                watch(f"step {step}, {'domain' if is_forced else 'mix'} phase")
                last_watch = time.monotonic()
    model.save_trained(asked.work / "trained.safetensors")
    watch(f"step {step}, end")
    print(f"{step} steps, {num_tokens} target tokens, {(time.monotonic() - started) / 60:.1f} min")


if __name__ == "__main__":
    main()
