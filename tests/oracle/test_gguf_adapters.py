"""GGUF adapters of llama.cpp's own converter: the same answers as llama.cpp, and as the PEFT directory they came from.

`ARGOSY_LLAMA_CPP` names a directory with `convert_lora_to_gguf.py`, `ARGOSY_PEER_PYTHON` an interpreter with
llama-cpp-python; without them these tests are skipped. llama.cpp ignores pairs of some matrices, as of those of latent
attention except `o_proj`, and ends at a query with a gate, so these have none here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy.errors import UnsupportedModel
from tests.helpers.adapters import open_adapted
from tests.models.converter import LLAMA_CPP, convert_all
from tests.models.make_adapters import Made, make_unfused
from tests.models.references import mean_divergence
from tests.models.safetensors_file import Array
from tests.models.tiny import RawConfig, glm4_moe, mixtral, qwen3_moe
from tests.models.tiny_delta import qwen3_next
from tests.models.tiny_latent import deepseek_v3
from tests.oracle.test_peer import PEER

pytestmark = [
    pytest.mark.skipif(not LLAMA_CPP.exists(), reason=f"no llama.cpp: {LLAMA_CPP} does not exist"),
    pytest.mark.skipif(not PEER.exists(), reason=f"no llama-cpp-python: {PEER} does not exist"),
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("one_quiet_thread"),
]

# Mean KL in nats. With 8-bit weights, activations have 8 bits in llama.cpp.
LARGEST_DIVERGENCE = {"F32": 1e-5, "Q8_0": 0.002}
SEED = 60_000
PEER_SIDE = Path(__file__).parents[1] / "models" / "peer_side.py"
# Every expert is chosen, and sizes are those of Q8_0's blocks.
NOT_EXPERTS = r"^(?!.*\.experts\.).*"
SIZES: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"head_dim": 32, "num_key_value_heads": 2}
MODELS: dict[str, tuple[RawConfig, str]] = {
    "qwen3_moe": (qwen3_moe(**SIZES, **HEADS, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=4), ""),
    "mixtral": (
        mixtral(**SIZES, **HEADS, intermediate_size=64, num_local_experts=4, num_experts_per_tok=4),
        r"self_attn|experts|\.gate\.",
    ),
    "glm4_moe": (
        glm4_moe(
            **SIZES, **HEADS, intermediate_size=96, moe_intermediate_size=64, n_routed_experts=4,
            num_experts_per_tok=4, num_nextn_predict_layers=0,
        ),
        "self_attn|mlp",
    ),
    "deepseek_v3": (
        deepseek_v3(
            **SIZES, intermediate_size=96, kv_lora_rank=64, moe_intermediate_size=64, n_group=1, n_routed_experts=4,
            num_experts_per_tok=4, num_key_value_heads=4, q_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32,
            rope_scaling=None, topk_group=1, v_head_dim=32,
        ),
        "o_proj|mlp",
    ),
    "qwen3_next": (
        qwen3_next(
            **SIZES, **HEADS, linear_key_head_dim=32, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_value_head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=4,
            shared_expert_intermediate_size=64,
        ),
        "mlp|out_proj",
    ),
}  # fmt: skip

SCRIPT = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, adapter, scale, ids, out = *sys.argv[1:3], float(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5]
model = Llama(
    path, lora_path=adapter, lora_scale=scale, n_ctx=64, logits_all=True, verbose=False, n_threads=1,
    yarn_beta_fast=-1.0, yarn_beta_slow=-1.0,
)
model.eval(ids)
np.save(out, np.array(model.scores[: len(ids)]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """A base model as GGUF in two formats, an adapter as PEFT writes it and as GGUF."""

    made: Made
    bases: dict[str, Path]
    adapter: Path


@pytest.fixture(scope="module", params=MODELS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    config, targets = MODELS[request.param]
    root = tmp_path_factory.mktemp("converted")
    made = make_unfused(config, root, first_seed=SEED, targets=NOT_EXPERTS + f"({targets})")
    bases = {"F32": root / "F32.gguf", "Q8_0": root / "Q8_0.gguf"}
    convert_all([(made.base, bases["F32"])])
    job = root / "job.json"
    job.write_text(
        json.dumps(
            {
                "source": str(bases["F32"]), "target": str(bases["Q8_0"]), "file_type": "LLAMA_FTYPE_MOSTLY_Q8_0",
                "overrides": {}, "importance": None, "may_requantise": False,
            }
        )
    )  # fmt: skip
    subprocess.run([PEER, PEER_SIDE, "quantise", job], check=True, capture_output=True, timeout=300)
    adapter = root / "adapter.gguf"
    convert_adapter(made.base, made.adapter, adapter)
    return Converted(made=made, bases=bases, adapter=adapter)


def convert_adapter(base: Path, adapter: Path, out: Path) -> None:
    command = [
        sys.executable,
        LLAMA_CPP / "convert_lora_to_gguf.py",
        "--base",
        base,
        "--outfile",
        out,
        adapter,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def peer_logits(base: Path, adapter: Path, prompt: list[int], scale: float = 1.0) -> Array:
    out = adapter.with_suffix(".npy")
    arguments = [base, adapter, str(scale), json.dumps(prompt), out]
    subprocess.run([PEER, "-c", SCRIPT, *arguments], check=True, capture_output=True, timeout=300)
    return np.asarray(np.load(out))


def own_logits(base: Path, adapter: Path | tuple[Path, float], prompt: list[int]) -> Array:
    with open_adapted(base, {"own": adapter}) as engine:
        return engine.logits(prompt, adapter="own")


@pytest.mark.parametrize("format", ["F32", "Q8_0"])
def test_logits_are_those_of_llama_cpp(format: str, converted: Converted) -> None:
    base, prompt = converted.bases[format], converted.made.prompt
    expected = peer_logits(base, converted.adapter, prompt)
    found = own_logits(base, converted.adapter, prompt)
    assert mean_divergence(expected, found) <= LARGEST_DIVERGENCE[format]


def test_a_factor_is_that_of_llama_cpp(converted: Converted) -> None:
    base, prompt = converted.bases["F32"], converted.made.prompt
    expected = peer_logits(base, converted.adapter, prompt, scale=-0.6)
    found = own_logits(base, (converted.adapter, -0.6), prompt)
    assert mean_divergence(expected, found) <= LARGEST_DIVERGENCE["F32"]


@pytest.mark.parametrize("format", ["F32", "Q8_0"])
def test_the_directory_of_peft_means_the_same_on_a_gguf_model(format: str, converted: Converted) -> None:
    base, prompt = converted.bases[format], converted.made.prompt
    found = [own_logits(base, adapter, prompt) for adapter in (converted.adapter, converted.made.adapter)]
    np.testing.assert_array_equal(found[0], found[1])


def test_a_checkpoint_needs_the_directory_of_peft(converted: Converted) -> None:
    made = converted.made
    assert abs(own_logits(made.base, made.adapter, made.prompt) - made.answer.logits).max() <= 3e-4
    with pytest.raises(UnsupportedModel, match="GGUF"):
        own_logits(made.base, converted.adapter, made.prompt)
