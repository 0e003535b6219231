"""A card says what is known and that the rest is unknown; hostile names and reports do not get through."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import blake3
import pytest

from argosy.checkpoint.pack import pack
from argosy.cli.main import main
from argosy.errors import UsageError
from argosy.evaluate.card import gather, markdown
from argosy.evaluate.measure import identity_of
from argosy.evaluate.reports import read_report
from argosy.forecast.planning import Summary
from argosy.library.kept import Pulled
from argosy.model.families import open_model
from argosy.open.models import open_files
from tests.library.caches import GGUF, REFERENCE

Captured = pytest.CaptureFixture[str]
SMALL = REFERENCE / "mixtral_head_dim_tied_sharded"
BUDGET = Summary(
    "mixtral", "f32", 6, 2, smallest_bytes=300 << 20, resident_bytes=400 << 20, context_tokens=128, num_layers=3,
    vocab_size=90, num_parameters=1000, weight_bytes=4000, sampling={}, media_kinds=[],
)  # fmt: skip
ESTIMATE = {"value": 0.5, "low": 0.25, "high": 0.75}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("card") / "source"
    shutil.copytree(SMALL, source)
    (source / "LICENSE").write_text("do what you like")
    pack(open_model(source), source.with_name("packed"), format="q8")
    return source.with_name("packed")


def report(identity: str, **changes: Any) -> dict[str, Any]:
    subject = {"name": "source", "identity": "layout:0", "family": "mixtral", "dense_formats": ["f32"]}
    return {
        "argosy_drift": 1,
        "argosy": "0.1.0",
        "reference": {**subject, "expert_format": "f32", "settings": {}},
        "candidate": {**subject, "identity": identity, "expert_format": "q8", "settings": {}},
        "texts": {"blake3": "0" * 64, "languages": ["en", "de"]},
        "verdict": {"level": "small", "reasons": ["every number is within the limits of small drift"]},
        "text": [
            {
                "language": "all", "num_tokens": 80, "kl_nats": ESTIMATE, "agreement": ESTIMATE,
                "perplexity_reference": 9.5, "perplexity_candidate": 9.6, "perplexity_rise": ESTIMATE,
            }
        ],
        "gaps": {"num_templates": 8, "num_pairs": 2, "reference_nats": 1.5, "change_nats": ESTIMATE},
        "groups": [
            {
                "dimension": "size", "group": "tall", "shift_nats": ESTIMATE, "loss_rise_nats": ESTIMATE,
                "perplexity_reference": 9.5, "perplexity_candidate": 9,
            }
        ],
        "questions": [],
        **changes,
    }  # fmt: skip


def saved(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_card_of_a_pack_has_its_hashes_licence_conversion_and_drift(
    packed: Path, tmp_path: Path, capsys: Captured
) -> None:
    identity = identity_of(open_files(packed))
    drift = saved(tmp_path / "drift.json", report(identity))
    policy = saved(tmp_path / "policy.toml", 'default = "house"\n[policies.house]\npii-output = "detect"\n')
    command = ["card", str(packed), "--drift", str(drift), "--policy", str(policy)]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    listed = {one["name"]: one for one in facts["files"]}
    for name in ("dense.bin", "experts.bin", "config.json", "LICENSE"):
        data = (packed / name).read_bytes()
        assert listed[name] == {
            "name": name, "nbytes": len(data), "blake3": blake3.blake3(data).hexdigest(), "sha256": None,
        }  # fmt: skip
    manifest = blake3.blake3((packed / "argosy.json").read_bytes()).hexdigest()
    assert facts["model"]["identity"] == f"blake3:{manifest}"
    assert facts["licence"] == {"name": None, "origin": None, "accepted_at": None, "files": ["LICENSE"]}
    assert facts["source"] is None
    conversion = facts["conversion"]
    assert (conversion["asked_format"], conversion["expert_format"]) == ("q8", "q8")
    assert conversion["reference"] == {"name": "source", "identity": "layout:0"}
    assert facts["drift"]["text"][0]["kl_nats"] == ESTIMATE
    assert facts["guard"]["policies"] == ["house"]
    assert facts["memory"]["smallest_bytes"] <= facts["memory"]["resident_bytes"]
    assert any("licence is not known" in limit for limit in facts["limits"])

    written = tmp_path / "card.md"
    assert main([*command, "--save", str(written)]) == 0
    text = written.read_text()
    for part in (
        "- form: a pack, asked for as q8\n", "**small**: every number is within", "| all | 0.5000 (0.2500 to 0.7500) |",
        "- policies: house; of keys without one: house\n", "- source: unknown\n", "- accepted here: unknown\n",
        f"| experts.bin | {(packed / 'experts.bin').stat().st_size} | blake3 `",
    ):  # fmt: skip
        assert part in text, part


def test_a_report_in_the_pack_is_found_and_one_of_another_model_is_refused(
    packed: Path, tmp_path: Path, capsys: Captured
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    assert main(["card", str(copy)]) == 0
    assert "## Drift\n\nNot measured.\n" in capsys.readouterr().out
    saved(copy / "drift.json", report(identity_of(open_files(copy))))
    assert main(["card", str(copy)]) == 0
    assert "**small**" in capsys.readouterr().out
    saved(copy / "drift.json", report("blake3:of another"))
    assert main(["card", str(copy)]) == 2
    assert "is about another model" in capsys.readouterr().err


def test_a_card_of_files_names_known_hashes_and_reads_others_only_if_asked(
    tmp_path: Path, capsys: Captured
) -> None:
    directory, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    shutil.copytree(SMALL, directory)
    blobs.mkdir()
    shard = directory / "model-00001-of-00002.safetensors"
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    shard.rename(blobs / sha256)  # as in a hub's cache
    shard.symlink_to(blobs / sha256)
    hashed = {}
    for flags in ([], ["--hash"]):
        assert main(["card", str(directory), "--json", *flags]) == 0
        facts = json.loads(capsys.readouterr().out)
        hashed[len(flags)] = {one["name"]: (one["sha256"], one["blake3"]) for one in facts["files"]}
        assert any("--hash reads them" in limit for limit in facts["limits"]) != bool(flags)
    assert hashed[0][shard.name] == hashed[1][shard.name] == (sha256, None)
    config = (directory / "config.json").read_bytes()
    assert hashed[0]["config.json"] == (None, None)
    assert hashed[1]["config.json"] == (None, blake3.blake3(config).hexdigest())


def test_what_the_library_knows_of_a_pull_is_on_the_card() -> None:
    files = open_files(GGUF / "model.gguf")
    pulled = Pulled("owner/name", "a" * 40, 1, (), licence="apache-2.0", accepted_at=1_760_000_000)
    facts = gather("owner/name", files, budget=BUDGET, pulled=pulled)
    assert facts["source"] == {"repository": "owner/name", "revision": "a" * 40}
    assert facts["licence"]["name"] == "apache-2.0"
    assert facts["licence"]["accepted_at"] == "2025-10-09T08:53:20Z"
    assert "- apache-2.0, says the hub's card\n- accepted here: 2025-10-09T08:53:20Z\n" in markdown(facts)


def test_a_model_that_comes_with_argosy_has_its_licence_on_the_card() -> None:
    facts = gather("demo", open_files(GGUF / "model.gguf"), budget=BUDGET, licence="Apache-2.0")
    assert "- Apache-2.0, says Argosy\n" in markdown(facts)


def test_names_from_files_and_hubs_cannot_write_markdown() -> None:
    hostile = "x](http://a.b) <img src=x>\n# `title` | **b** \x1b[31m"
    pulled = Pulled("owner/name", "a" * 40, 1, (), licence=hostile)
    facts = gather(hostile, open_files(SMALL), budget=BUDGET, pulled=pulled)
    text = markdown(facts)
    assert "\x1b" not in text
    lines = [line for line in text.splitlines() if "img" in line]
    assert [line[:3] for line in lines] == ["# x", "- x"]  # the title and the licence, each on its line
    for line in lines:
        assert not re.search(r"(?<!\\)[\[\]<>`*|]|://", line[1:]), line
    for name in ("1. a", "1234) a", "- a", "# a", "+ a", "a_b_c", "&lt;", "www.a.b"):
        facts["limits"] = [name]
        assert f"- {name}\n" not in markdown(facts), name


IDENTITY = "blake3:1"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ("[]", "expected an object"),
        ({}, "not a drift report of version 1"),
        ({"argosy_drift": "1"}, "not a drift report of version 1"),
        (report(IDENTITY, verdict=None), "verdict is null, expected an object"),
        (report(IDENTITY, verdict={"level": "small", "reasons": ["a"] * 257}), "expected a list of at most 256"),
        (report(IDENTITY, verdict={"level": "s" * 501, "reasons": []}), "expected a text of at most 500"),
        (report(IDENTITY, text=[]), "compares no text"),
        (report(IDENTITY, text=[{"language": "all", "num_tokens": -1}]), "num_tokens is a whole number"),
        (report(IDENTITY, gaps={"num_templates": 1, "num_pairs": 1, "reference_nats": "1"}), "expected a number"),
        (report(IDENTITY, groups=None), "groups is null, expected a list"),
        (report("blake3:2"), "is about another model"),
        (" " * ((1 << 20) + 1), "has at most 1048576"),
    ],
)  # fmt: skip
def test_a_report_of_another_form_is_refused_by_name(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_report(saved(tmp_path / "drift.json", content), IDENTITY)
    assert said in refused.value.message


def test_what_a_report_has_beside_is_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "drift.json", report(IDENTITY, more={"a": ["b"]}))
    found = read_report(path, IDENTITY)
    assert "more" not in found
    assert found["groups"][0]["perplexity_candidate"] == 9.0
    with pytest.raises(UsageError):
        read_report(tmp_path / "none", IDENTITY)
