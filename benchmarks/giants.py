"""Checkpoints of released geometries that are larger than the drive, with random weights.

    Giant(directory, GIANTS["kimi_k3"], config, num_records).make()   ->  files on the drive
    Giant(...).files()                                                ->  ModelFiles, as the engine opens them

The index and the weights that every token needs have their real size. Of the routed experts only `num_records` exist:
**many logical experts share the bytes of one record**. This gives no advantage: the cache is keyed by the logical
expert, and reads bypass the page cache, so each miss reads a whole record from the drive. Weights are random, with the
routing of recorded traces (`random_weights.py`); a document's continuation is still the one right answer.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from argosy import _native
from argosy.checkpoint.files import ExpertMatrix, ExpertRecord, ModelFiles, TableRef
from argosy.checkpoint.formats import PANEL_ROWS, matrix_bytes, round_up
from argosy.checkpoint.geometry import dense_shapes, expert_shapes, packed_config, packed_format
from argosy.checkpoint.landing import MatrixRef, Piece
from argosy.checkpoint.manifest import MATRIX_ALIGNMENT
from argosy.checkpoint.safetensors import TensorRef
from argosy.config import Format, ModelConfig
from argosy.model.families import FAMILIES
from argosy.model.ngrams import Ngrams
from argosy.model.step import Step
from common import REPOSITORY
from random_weights import Exact, Normal, RandomWeights, document

sys.path.insert(0, str(REPOSITORY))

from tests.families.hub_configs import RELEASED
from tests.families.published_recurrent import KIMI_K3
from tests.families.published_sparse import DEEPSEEK_V4_1_FLASH

Bytes = NDArray[np.uint8]
RawConfig = dict[str, Any]

DENSE_FILE, EXPERTS_FILE, MADE_FILE = "dense.bin", "experts.bin", "made.json"
PAGE = 4096
# Rows of quantized noise.
POOL_ROWS = 1024
# Rows of the embedding and the head that are made and quantized at once.
STRIPE_ROWS = 16_384
LAYER_SHARE = 0.5  # a layer's output is scaled by this, over the root of the number of layers
SPREAD = 7919  # a prime: neighbours in the router's order are not adjacent in the file
TABLE_TOKENS = 128  # of each of two documents
_E4M3_SIGN_AND_FRACTION, _E4M3_ONE, _E8M0_ONE = 0x87, 0x38, 127
_WHOLE_BLOCKS = 256  # columns of the blocks of every format


class Model(NamedTuple):
    """A released model, and a small one of the same family.

    experts: the format of routed experts.
    dense: the format of matrices that every token needs, where it is possible: some stay exact, some are q8, and
        embedding and head are q4 if this is not q8.
    experts_key: what config.json calls the number of experts.
    short: the sizes of the small model.
    """

    raw: RawConfig
    experts: Format
    dense: Format
    experts_key: str
    short: Mapping[str, Any]

    def config(self, *, short: bool = False, **changes: Any) -> ModelConfig:
        """The geometry, with changes of `with_sizes`."""
        return packed_config(
            FAMILIES[self.raw["model_type"]].parse_config(self.with_sizes(short=short, **changes))
        )

    def with_sizes(self, *, short: bool = False, **changes: Any) -> RawConfig:
        """config.json with `changes` to its text model."""
        changes = {**(self.short if short else {}), **changes}
        if "text_config" in self.raw:
            return self.raw | {"text_config": self.raw["text_config"] | changes}
        return self.raw | changes


_SHORT: Mapping[str, Any] = {
    "vocab_size": 16_384,
    "hidden_size": 768,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 256,
}
GIANTS = {
    "kimi_k2": Model(
        RELEASED["Kimi-K2-Instruct"], "int4", "q8", "n_routed_experts", {**_SHORT, "n_routed_experts": 64}
    ),
    # Its 57 billion weights that every token needs take 58 GiB in q8, 32 in q4 and 20 in q2_k.
    "kimi_k3": Model(
        KIMI_K3,
        "mxfp4",
        "iq1_s",
        "num_experts",
        {
            **_SHORT,
            "attn_res_block_size": 2,
            "linear_attn_config": KIMI_K3["text_config"]["linear_attn_config"]
            | {"full_attn_layers": [4, 6], "kda_layers": [1, 2, 3, 5], "num_heads": 4},
            "num_experts": 64,
            "num_experts_per_token": 8,
            "routed_expert_hidden_size": 512,
        },
    ),
    "deepseek_v41": Model(
        # The token of pictures would lie outside the small vocabulary.
        {key: value for key, value in DEEPSEEK_V4_1_FLASH.items() if key != "image_token_id"},
        "mxfp4",
        "q8",
        "n_routed_experts",
        {
            **{name: size for name, size in _SHORT.items() if name != "intermediate_size"},
            "num_key_value_heads": 1,
            "compress_ratios": [0, 2, 2, 1, 1, 1],
            "kv_source_layer_ids": [1, 3],
            "index_source_layer_ids": [1, 3, 4],
            "candidate_source_layer_id": 3,
            "head_dim": 128,
            "o_groups": 2,
            "o_lora_rank": 128,
            "n_routed_experts": 64,
            "engram_layer_ids": [1, 4],
            "engram_vocab_size": 1_000_000,
            "engram_compressed_vocab_size": 12_000,
            "engram_num_embeddings": [],
        },
    ),
}


def _quantised(format: Format, weights: NDArray[np.float32]) -> Bytes:
    """Quantize [rows, cols] to a slot format that can be computed. int4 is q4 with bfloat16 scales."""
    rows, cols = weights.shape
    if format == "mxfp4":
        from gguf_blocks import to_blocks

        return _native.transcode("MXFP4", to_blocks("MXFP4", weights).reshape(-1), rows, cols)
    if format != "int4":
        out = np.empty(matrix_bytes(format, rows, cols), np.uint8)
        _native.quantize(format, np.ascontiguousarray(weights), out)
        return out
    panels = _quantised("q4", weights).reshape(-(-rows // 16), -1).copy()
    groups = -(-cols // 32)
    scales = panels[:, groups * 256 : groups * (256 + 32)]
    exact = scales.copy().view(np.float16).astype(np.float32)
    scales[:] = (exact.view(np.uint32) >> 16).astype(np.uint16).reshape(len(panels), -1).view(np.uint8)
    return panels.reshape(-1)


class Noise:
    """Quantized noise: panels from a pool for each format, width and deviation, drawn again for each matrix.

    The same matrix in every layer would add the same to the hidden state every time, and drown out the token in it.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._pools: dict[tuple[Format, int, float], Bytes] = {}

    def matrix(self, format: Format, recipe: Normal) -> Bytes:
        """[rows, cols] in a slot format; `silent_rows` are zeros."""
        rows, cols = recipe.shape
        silent = min(recipe.silent_rows, rows)
        parts = [self._rows(format, silent, cols, 0.0)] if silent else []
        parts.append(self._rows(format, rows - silent, cols, recipe.deviation))
        return np.concatenate(parts)

    def _rows(self, format: Format, rows: int, cols: int, deviation: float) -> Bytes:
        key = (format, cols, deviation)
        if key not in self._pools:
            self._pools[key] = self._pool(format, cols, deviation).reshape(POOL_ROWS // PANEL_ROWS, -1)
        pool = self._pools[key]
        return pool[self._random.integers(len(pool), size=-(-rows // PANEL_ROWS))].reshape(-1)

    def _pool(self, format: Format, cols: int, deviation: float) -> Bytes:
        if format == "iq1_s":  # finding the best one takes minutes
            from gguf_blocks import block_shape, random_blocks

            values, _ = block_shape(format.upper())
            blocks = random_blocks(format.upper(), POOL_ROWS * cols // values, deviation, self._random)
            return _native.transcode(format.upper(), blocks.reshape(-1), POOL_ROWS, cols)
        weights = self._random.standard_normal((POOL_ROWS, cols), np.float32)
        return _quantised(format, weights * np.float32(deviation))


def _write_tokenizer(path: Path, folded: NDArray[np.int32]) -> None:
    """Write a tokenizer whose tokens fold to `folded`, [vocab]: each id's first token has a small letter."""
    from tokenizers import Tokenizer, models

    words = [f"w{one}" if one == token else f"W{one}" for token, one in enumerate(folded.tolist())]
    Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="w0")).save(
        str(path)
    )


@dataclass(frozen=True)
class Giant:
    """The layout of the files in a directory. `config` is `model.config()`, or has other sizes."""

    directory: Path
    model: Model
    config: ModelConfig
    num_records: int

    @property
    def _matrices(self) -> list[tuple[int, int, int]]:
        """(offset in a record, rows, cols) for gate, up and down."""
        placed, end = [], 0
        for rows, cols in expert_shapes(self.config, self.config.moe_layers[0]):
            placed.append((end, rows, cols))
            end += round_up(matrix_bytes(self.model.experts, rows, cols), MATRIX_ALIGNMENT)
        return placed

    @property
    def record_bytes(self) -> int:
        offset, rows, cols = self._matrices[-1]
        return round_up(offset + matrix_bytes(self.model.experts, rows, cols), PAGE)

    def format_of(self, name: str, shape: tuple[int, ...]) -> Format:
        """The format of a tensor that every token needs."""
        format = packed_format(name, "q4", self.config)
        if format != "q8" or self.model.dense == "q8":
            return format
        if name in ("embed", "head"):
            return "q4"
        return self.model.dense if shape[-1] % _WHOLE_BLOCKS == 0 else format

    @property
    def dense_bytes(self) -> int:
        """The bytes of weights that every token needs."""
        return sum(
            matrix_bytes(self.format_of(name, shape), *(shape if len(shape) == 2 else (1, *shape)))
            for name, shape in dense_shapes(self.config)
        )

    def files(self) -> ModelFiles:
        """The model as the engine opens it."""
        made = json.loads((self.directory / MADE_FILE).read_text())
        dense, end = {}, 0
        for name, shape in dense_shapes(self.config):
            rows, cols = shape if len(shape) == 2 else (1, shape[0])
            format = self.format_of(name, shape)
            nbytes = matrix_bytes(format, rows, cols)
            path = self.directory / DENSE_FILE
            dense[name] = MatrixRef(name, path, end, nbytes, format, rows, cols)
            end += -(-nbytes // PAGE) * PAGE
        gate, up, down = (ExpertMatrix(0, *place) for place in self._places())
        path, experts = self.directory / EXPERTS_FILE, {}
        for number, layer in enumerate(self.config.moe_layers):
            for expert in range(self.config.num_experts):
                record = (number * self.config.num_experts + expert) * SPREAD % self.num_records
                piece = Piece(path, record * self.record_bytes, self.record_bytes, made["checksums"][record])
                experts[layer, expert] = ExpertRecord((piece,), gate, up, down)
        return ModelFiles(self.directory, self.config, dense, experts, tables=self.tables)

    @property
    def tables(self) -> dict[int, TableRef]:
        """The tables of n-grams by layer, in E4M3 with a scale for 32 columns."""
        found = {}
        for layer in self.config.ngram_layers:
            ngrams, path = self.config.layers[layer].ngrams, self.directory / f"table-{layer}.bin"
            assert ngrams is not None
            rows, dim = ngrams.num_rows, ngrams.row_dim
            codes = TensorRef("codes", path, 0, rows * dim, "F8_E4M3", (rows, dim))
            begin, nbytes = round_up(codes.nbytes, PAGE), codes.nbytes // 32
            scales = TensorRef("scales", path, begin, nbytes, "F8_E8M0", (rows, dim // 32))
            found[layer] = TableRef.of([codes], rows, dim, [scales])
        return found

    def _places(self) -> list[tuple[int, Format, int, int]]:
        return [(offset, self.model.experts, rows, cols) for offset, rows, cols in self._matrices]

    def make(self) -> None:
        """Write the files, unless they exist."""
        wanted = {
            "records": self.num_records,
            "formats": [self.model.experts, self.model.dense],
            "record_bytes": self.record_bytes,
            "layers": self.config.num_layers,
            "layer_share": LAYER_SHARE,
            "panels": "drawn",
            "kv_up": "in two",
        }
        made = self.directory / MADE_FILE
        if made.exists() and json.loads(made.read_text())["made"] == wanted:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        made.unlink(missing_ok=True)
        self._write_tables()
        noise = Noise(seed=1)
        with (self.directory / DENSE_FILE).open("wb") as file:
            self._write_dense(noise, file.write)
        checksums = []
        with (self.directory / EXPERTS_FILE).open("wb") as file:
            recipe_of = self._recipes()
            recipes = [recipe_of(f"expert.{part}") for part in ("gate", "up", "down")]
            record = np.zeros(self.record_bytes, np.uint8)
            for _ in range(self.num_records):
                for (offset, format, _, _), recipe in zip(self._places(), recipes, strict=True):
                    assert isinstance(recipe, Normal)
                    data = noise.matrix(format, recipe)
                    record[offset : offset + len(data)] = data
                checksums.append(int(_native.crc32c_wide(record)))
                file.write(record)  # type: ignore[arg-type]
        made.write_text(json.dumps({"made": wanted, "checksums": checksums}))

    def _recipes(self) -> Callable[[str], Normal | Exact]:
        """The recipe of each tensor. Layers write little, so that the head still sees the token at this depth."""
        weights = RandomWeights(self.config, routing="recorded")

        def recipe(name: str) -> Normal | Exact:
            found = weights[name]
            if isinstance(found, Normal) and found.silent_rows:
                return replace(
                    found, deviation=found.deviation * LAYER_SHARE / math.sqrt(self.config.num_layers)
                )
            return found

        return recipe

    def _write_tables(self) -> None:
        """Write the tables, and a tokenizer that folds its tokens to as many ids as they were made for."""
        vocab, random = self.config.vocab_size, np.random.default_rng(3)
        tokens = [document(number, TABLE_TOKENS, vocab=vocab) for number in (0, 1)]
        for layer, table in self.tables.items():
            ngrams = self.config.layers[layer].ngrams
            assert ngrams is not None
            folded = np.arange(vocab, dtype=np.int32) % ngrams.folded_ids
            _write_tokenizer(self.directory / "tokenizer.json", folded)
            step = Step(
                token_ids=np.array(tokens, np.int32).reshape(-1),
                sequence=np.repeat(np.arange(len(tokens), dtype=np.int32), TABLE_TOKENS),
                slots=np.zeros(0, np.int64),
                block_table=np.zeros((len(tokens), 1), np.int32),
                is_decode=np.zeros(0, np.bool_),
                order=np.zeros(0, np.int32),
                wanted=np.zeros(0, np.int64),
            )
            rows = Ngrams(ngrams, vocab, folded).rows(step)
            codes, scales = (part.tensors[0] for part in table.parts)
            with codes.path.open("wb") as file:
                file.truncate(scales.offset + scales.nbytes)
                for tensor in (codes, scales):
                    for page in np.unique((tensor.offset + rows * tensor.shape[1]) // PAGE):
                        values = random.integers(0, 256, PAGE, np.uint8) & _E4M3_SIGN_AND_FRACTION | _E4M3_ONE
                        file.seek(int(page) * PAGE)
                        file.write(values.tobytes() if tensor is codes else bytes([_E8M0_ONE]) * PAGE)

    def _write_dense(self, noise: Noise, write: Callable[[Any], object]) -> None:
        recipe_of = self._recipes()
        for name, shape in dense_shapes(self.config):
            recipe, format = recipe_of(name), self.format_of(name, shape)
            if isinstance(recipe, Normal) and format != "f32":
                parts = [noise.matrix(format, recipe)]
            else:
                values = (
                    recipe.read()
                    if isinstance(recipe, Exact)
                    else np.random.default_rng(2).standard_normal(shape, np.float32)
                    * np.float32(recipe.deviation)
                )
                values = values.reshape(-1, shape[-1])
                stripes = range(0, len(values), STRIPE_ROWS)
                parts = [
                    np.ascontiguousarray(values[i : i + STRIPE_ROWS]).view(np.uint8).reshape(-1)
                    if format == "f32"
                    else _quantised(format, values[i : i + STRIPE_ROWS])
                    for i in stripes
                ]
            nbytes = sum(len(part) for part in parts)
            for part in parts:
                write(part)
            write(bytes(-nbytes % PAGE))
