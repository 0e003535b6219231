"""`--memory` covers pictures and sounds: photographs come at once beside texts, in a cgroup whose limit is the budget.

`benchmarks/media_memory.py` does the same with towers of real sizes, and prints the figures.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cgroup import run_capped, why_no_cap
from make_checkpoint import raw_config, write_checkpoint

BUDGET_BYTES = 880 << 20

SEE = """
import io, json, sys, threading, wave
import numpy as np
from PIL import Image as Pillow
from argosy import Engine, SamplingParams
from argosy.budget.media_memory import IDLE_S
from argosy.errors import PromptTooLong
from argosy.media.parts import Audio, Image, RequestMedia
from argosy.prompt.prompt import Prompt

path, limit, num_photographs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(1)
coarse = Pillow.fromarray(rng.integers(0, 256, (375, 500, 3), np.uint8))
files = []
for turn in range(num_photographs):  # 12 megapixels each
    file = io.BytesIO()
    coarse.rotate(90 * turn, expand=True).resize((4000, 3000)).save(file, "JPEG", quality=90)
    files.append(file.getvalue())
del coarse, file
recording = io.BytesIO()
with wave.open(recording, "wb") as out:
    out.setnchannels(1)
    out.setsampwidth(2)
    out.setframerate(16_000)
    out.writeframes(rng.integers(-9000, 9000, 600 * 16_000).astype("<i2").tobytes())
recording = recording.getvalue()
greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

with Engine.open(path, memory=limit, threads=2, image_tokens=64, chunk_tokens=16, prefix_reuse=False) as engine:
    media, now, answers, refused = engine.media, 0.0, [], []
    media.memory._clock = lambda: now

    def ask(part):
        segments = media.segments(media.read(part), "", RequestMedia())
        try:
            answers.append(engine.submit(Prompt.of([3, 5], *segments, [30, 31]), greedy))
        except PromptTooLong as error:
            refused.append(str(error))

    slots, texts = [], []
    for _ in range(2):
        texts.append(engine.generate([5, 9, 12, 40], greedy).token_ids)
        slots.append(engine.facts().expert_slots)
        parts = [*map(Image, files), Audio(recording)]
        threads = [threading.Thread(target=ask, args=(part,)) for part in parts]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) or engine.has_work:
            texts.append(engine.generate([5, 9, 12, 40], greedy).token_ids)
        slots.append(engine.facts().expert_slots)
        now += IDLE_S
    plan = engine.plan
    print(json.dumps({
        "texts": texts, "slots": slots, "answered": [one.result.require().token_ids for one in answers],
        "refused": refused, "plan": plan.as_dict(),
    }))
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """Write 480 MiB of experts, and small towers; remove it right after the test."""
    raw = raw_config(
        "qwen3_omni_moe", hidden=512, layers=10, experts=64, width=256, heads=4, kv_heads=1, vocab=1024
    )
    raw["thinker_config"]["vision_config"] |= {
        "deepstack_visual_indexes": [0], "depth": 2, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2,
    }  # fmt: skip
    raw["thinker_config"]["audio_config"] |= {
        "d_model": 64, "downsample_hidden_size": 8, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
        "encoder_layers": 2,
    }  # fmt: skip
    del raw["thinker_config"]["video_token_id"]  # the memory for videos would hide what is not given back
    directory = tmp_path / "checkpoint"
    write_checkpoint(directory, raw)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.skipif(bool(why_no_cap()), reason=why_no_cap() or "")
@pytest.mark.full
@pytest.mark.parametrize("num_photographs", [2, 6])
def test_photographs_and_a_recording_beside_texts_stay_within_the_budget(
    checkpoint: Path, num_photographs: int
) -> None:
    """Experts have the memory, then photographs of 12 megapixels and ten minutes of sound, then both again."""
    command = [sys.executable, "-c", SEE, str(checkpoint), str(BUDGET_BYTES), str(num_photographs)]
    run = run_capped(command, limit_bytes=BUDGET_BYTES, timeout_s=250, env=os.environ)
    assert run.num_oom_kills == 0, "killed for memory"
    assert run.returncode == 0, run.stderr
    assert run.peak_bytes <= BUDGET_BYTES
    assert run.peak_swap_bytes == 0
    found = json.loads(run.stdout)
    kept, lent = found["plan"]["expert_slots"], found["plan"]["lent_expert_slots"]
    assert kept < found["plan"]["experts"] / 2 < lent
    assert found["slots"] == [kept + lent, kept] * 2
    assert len(found["answered"]) == 2 * num_photographs
    assert all(text == found["texts"][0] for text in found["texts"])
    assert len(found["refused"]) == 2
    assert all("tokens" in sentence for sentence in found["refused"])
