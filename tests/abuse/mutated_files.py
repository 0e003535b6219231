"""Does a changed model file crash the engine, or make it take other weights than the file holds?

    python -m tests.abuse.mutated_files [--count 5000] [--seed 0] [--only WORD] [--module _native.so] [--note FILE]

Each mutation changes a tiny quantised model, which is then opened and asked for logits:

    header      bytes of a GGUF's header: types, shapes, offsets, counts, lengths; or of a safetensors header
    swap        a tensor's type becomes any other
    blocks      scales become 0, the largest or smallest number, an infinity or a NaN; codes become any bits
    size        the file ends early, or late
    settings    numbers and words of a config.json's quantisation settings

It is refused with an ArgosyError, or it runs. The weights of a GGUF that runs are then those that the `gguf` package
decodes from the changed bytes, or `tests/native/gguf_blocks.py` where the package cannot, bit for bit; and settings
that do not fit the tensors never give other logits. A crash ends the process, and FILE names the mutation.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.gguf_models import mixed_of_ik, write_gguf_model
from tests.models.hub_schemes import KINDS, write_kind
from tests.models.quantised import config_of
from tests.models.tiny import qwen3_moe
from tests.native.gguf_blocks import BLOCK_TYPES, WITHOUT_PACKAGE, dequantized
from tests.native.other_build import open_module

MODELS = Path(__file__).parents[1] / "models"
SPECIAL_HALVES = (0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF)
TOKENS = [5, 9, 11]
_MOST_SENTENCE_BYTES = 4_000


def sources(folder: Path) -> list[Path]:
    """GGUF files, and directories with safetensors whose config.json has settings of a quantisation; those that are
    made are written to `folder`.
    """
    found = sorted((MODELS / "reference_quantised").glob("*.gguf"))
    found.append(folder / "ik.gguf")
    write_gguf_model(found[-1], config_of("qwen3_moe", num_hidden_layers=2), mixed_of_ik, seed=1)
    for config in sorted(MODELS.glob("reference*/*/config.json")):
        if settings_of(json.loads(config.read_text())) is not None:
            found.append(config.parent)
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    others = {**sizes, "moe_intermediate_size": 64, "num_hidden_layers": 1, "num_experts": 3}
    for name, kind in KINDS.items():
        write_kind(folder / name, qwen3_moe(**others, num_experts_per_tok=2), kind, seed=1)
        found.append(folder / name)
    return found


def settings_of(config: dict[str, Any]) -> dict[str, Any] | None:
    settings = config.get("quantization_config", config.get("quantization"))
    return settings if isinstance(settings, dict) else None


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class GgufSource:
    """A valid file, and the places of its parts."""

    def __init__(self, path: Path) -> None:
        from argosy.checkpoint.gguf import read_gguf

        self.path, self.content = path, path.read_bytes()
        self.tensors = read_gguf(path).tensors
        self.header_bytes = min(ref.offset for ref in self.tensors.values())
        self.kinds = {name: self._kind_at(name) for name in self.tensors}

    def _kind_at(self, name: str) -> int:
        """Where the header has a tensor's type: behind its name, the number of sizes, and the sizes."""
        at = self.content.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)
        return at + 4 + 8 * int.from_bytes(self.content[at : at + 4], "little")

    def mutate(self, kind: str, rng: random.Random) -> bytes:
        changed = bytearray(self.content)
        if kind == "header":
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(self.header_bytes)
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, changed[at] ^ 1 << rng.randrange(8)))
        elif kind == "swap":
            at = self.kinds[rng.choice(sorted(self.kinds))]
            changed[at] = rng.choice((*range(48), 97, 133, *WITHOUT_PACKAGE.values(), 158, 255))
        elif kind == "size":
            if rng.random() < 0.7:
                return bytes(changed[: rng.randrange(len(changed))])
            return bytes(changed) + rng.randbytes(rng.choice((1, 31, 32, 64, 4096)))
        else:
            self._change_blocks(changed, rng)
        return bytes(changed)

    def _change_blocks(self, changed: bytearray, rng: random.Random) -> None:
        ref = self.tensors[rng.choice(sorted(self.tensors))]
        block_bytes = BLOCK_TYPES[ref.dtype][2] if ref.dtype in BLOCK_TYPES else 4
        for _ in range(rng.randint(1, 6)):
            block = ref.offset + rng.randrange(ref.nbytes // block_bytes) * block_bytes
            if rng.random() < 0.5:
                changed[block : block + block_bytes] = rng.randbytes(block_bytes)
            # Scales are at the beginning of a block or at its end; elsewhere this is a code.
            at = rng.choice((0, 2, block_bytes - 2, block_bytes - 4, rng.randrange(block_bytes)))
            at = min(max(at, 0), max(block_bytes - 2, 0))
            half = rng.choice(SPECIAL_HALVES).to_bytes(2, "little")
            changed[block + at : block + min(at + 2, block_bytes)] = half[: block_bytes - at]

    def require_exact(self, path: Path, content: bytes) -> None:
        """Check the values of every tensor whose bytes or place differ from the original's."""
        from argosy.checkpoint.gguf import read_gguf
        from argosy.checkpoint.landing import read_values

        for name, ref in read_gguf(path).tensors.items():
            raw = content[ref.offset : ref.offset + ref.nbytes]
            old = self.tensors.get(name)
            is_same = old is not None and (old.dtype, old.shape) == (ref.dtype, ref.shape)
            if is_same and raw == self.content[old.offset : old.offset + old.nbytes]:
                continue
            found = refused(lambda ref=ref: read_values(ref))
            if raw and not isinstance(found, str):
                expected = values_of(ref.dtype, raw, ref.shape)
                np.testing.assert_array_equal(found.reshape(-1), expected.reshape(-1), err_msg=name)


def values_of(dtype: str, raw: bytes, shape: tuple[int, ...]) -> Any:
    """The values of a tensor whose type Argosy reads, by other decoders."""
    stored = np.frombuffer(raw, np.uint8)
    if dtype == "BF16":
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in BLOCK_TYPES:
        return stored.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dequantized(dtype, stored, int(np.prod(shape[:-1])), shape[-1])


# ── safetensors ─────────────────────────────────────────────────────────────────────────────────────────────────────


class HubSource:
    """A directory with config.json and one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = json.loads((path / "config.json").read_text())
        self.file = next(path.glob("model*.safetensors"))
        self.content = self.file.read_bytes()
        self.header_bytes = 8 + int.from_bytes(self.content[:8], "little")

    @cached_property
    def logits(self) -> Any:
        """The logits of the unchanged model."""
        return logits_of(self.path)

    def mutate(self, kind: str, rng: random.Random) -> tuple[bytes, str]:
        changed, config = bytearray(self.content), json.loads(json.dumps(self.config))
        if kind == "settings":
            settings = settings_of(config)
            assert settings is not None
            _change_one(settings, rng)
        elif kind == "header":
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(self.header_bytes)
                changed[at] = rng.choice((*b'0123456789,:"[]{}', changed[at] ^ 1 << rng.randrange(8)))
        elif kind == "size":
            changed = changed[: rng.randrange(len(changed))] if rng.random() < 0.7 else changed + b"\0" * 64
        else:
            for _ in range(rng.randint(1, 30)):
                at = rng.randrange(self.header_bytes, len(changed))
                few = rng.choice(
                    (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\x7f\x7f\x7f\x7f", rng.randbytes(4))
                )
                changed[at : at + 4] = few[: len(changed) - at]
        return bytes(changed), json.dumps(config)


def _change_one(settings: dict[str, Any], rng: random.Random) -> None:
    """Change one value anywhere in nested settings."""
    places = list(_places(settings))
    holder, key = places[rng.randrange(len(places))]
    odd = (
        None,
        -1,
        0,
        1,
        2,
        3,
        7,
        16,
        31,
        64,
        128,
        2**31,
        2**63,
        0.5,
        "",
        "int",
        "group",
        True,
        [],
        {},
        [1, 128],
    )
    if rng.random() < 0.15 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = rng.choice(odd)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


# ── trying ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(work: Callable[[], Any]) -> Any:
    """The result, or the sentence of the ArgosyError that `work` raises."""
    from argosy.errors import ArgosyError

    try:
        return work()
    except ArgosyError as error:
        sentence = str(error)
        assert len(sentence.encode()) < _MOST_SENTENCE_BYTES, sentence
        return sentence


def logits_of(path: Path) -> Any:
    from argosy import Engine

    with Engine.open(path, memory="1GiB", threads=1, context=64) as engine:
        return engine.logits(TOKENS)


def try_one(source: GgufSource | HubSource, kind: str, rng: random.Random, folder: Path) -> str:
    """Change a model once, and run it; return "refused" or "runs"."""
    if isinstance(source, GgufSource):
        content = source.mutate(kind, rng)
        path = folder / "model.gguf"
        path.write_bytes(content)
    else:
        content, config = source.mutate(kind, rng)
        path = folder / "model"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(source.path, path)
        (path / "config.json").write_text(config)
        (path / source.file.name).write_bytes(content)

    logits = refused(lambda: logits_of(path))
    if isinstance(logits, str):
        return "refused"
    if isinstance(source, GgufSource):
        source.require_exact(path, content)
    elif kind == "settings":
        np.testing.assert_array_equal(logits, source.logits, err_msg=f"{source.path.name} {config}")
    return "runs"


MUTATIONS = {
    GgufSource: ("blocks", "blocks", "header", "swap", "size"),
    HubSource: ("blocks", "settings", "header", "size"),
}


def run_all(count: int, seed: int, only: str = "", note: Path | None = None) -> Counter[tuple[str, str, str]]:
    """Make `count` mutations of all sources in turn; returns how many of each kind were refused or ran."""
    outcomes: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [path for path in sources(Path(folder)) if only in str(path)]
        opened = [GgufSource(path) if path.is_file() else HubSource(path) for path in chosen]
        for number in range(count):
            source = opened[number % len(opened)]
            rng = random.Random(f"{seed} {number}")
            kind = rng.choice(MUTATIONS[type(source)])
            if note is not None:
                note.write_text(f"mutation {number} of seed {seed}: {kind} of {source.path.name}\n")
            try:
                outcomes[source.path.name, kind, try_one(source, kind, rng, Path(folder))] += 1
            except BaseException:
                print(f"mutation {number} of seed {seed}: {kind} of {source.path.name}", file=sys.stderr)
                raise
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="sources with this in their path")
    parser.add_argument("--module", type=Path, help="another build of the native module")
    parser.add_argument("--note", type=Path, help="file that names the mutation in progress")
    options = parser.parse_args()
    open_module(options.module)
    outcomes = run_all(options.count, options.seed, options.only, options.note)
    for (name, kind, outcome), count in sorted(outcomes.items()):
        print(f"{name:<32}{kind:<10}{outcome:<8}{count:>6}")
    print(f"{outcomes.total()} mutations, no crash")
    return 0


if __name__ == "__main__":
    sys.exit(main())
