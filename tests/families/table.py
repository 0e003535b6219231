"""Write `docs/families.md`: what Argosy can do with each family, and which test proves it. `make families`

Every cell follows from the registries of the package and from the data of tests, first of all the rows of families.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from argosy.model.encoders.table import ENCODERS
from argosy.model.families import FAMILIES, Family
from argosy.prompt.formats.table import find_format
from tests.engine import test_mtp
from tests.families.convert_published import RECORD, configs
from tests.families.hub_configs import RawConfig
from tests.families.published import PUBLISHED
from tests.models import seeing
from tests.models.configurations import CONFIGURATIONS
from tests.models.converted import CONVERTED, LLAMA_CPP_DIFFERS
from tests.models.mlx_models import MODELS as MLX_MODELS
from tests.models.renamed import RENAMED
from tests.models.rows import rows
from tests.oracle import test_peer
from tests.prompt.families import EVERY_FAMILY

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_RECORDED = json.loads(RECORD.read_text()).keys()
TRANSCRIPTS = Path(__file__).parents[1] / "prompt" / "transcripts"

_HEAD = """# Families

`make families` writes this page from the registries of the package and the data of its tests; do not edit it. A family
is the `model_type` of a `config.json`. An empty cell: not there, or not proved.

"""
_MARKS = (
    (
        "T",
        "logits and greedy answers equal those of `transformers`",
        ("engine/test_logits", "oracle/test_oracle"),
    ),
    ("M", "logits equal those of mlx-lm, from a checkpoint that it wrote", ("engine/test_mlx",)),
    ("G", "logits from a GGUF equal those of its dequantised weights", ("engine/test_gguf",)),
    (
        "C",
        "the metadata of llama.cpp's converter means the same as the `config.json`",
        ("families/test_gguf_converted",),
    ),
    (
        "F",
        "a file of llama.cpp's converter answers as its checkpoint, as `transformers` and as llama.cpp",
        ("oracle/test_converted",),
    ),
    ("L", "logits equal llama.cpp's from the same GGUF", ("oracle/test_peer",)),
    ("V", "answers about pictures or sound equal those of `transformers`", ("engine/test_seeing",)),
    (
        "R",
        "what a model writes is parsed as llama.cpp or the makers parse it, cut at every place",
        ("prompt/test_formats",),
    ),
    ("D", "drafts by its own layer for multi-token prediction equal those of numpy", ("engine/test_mtp",)),
)
_COLUMNS = (
    "family",
    "released models tried by config",
    "text",
    "GGUF",
    "sees, hears",
    "calls, thoughts",
    "drafts",
)


def page() -> str:
    marks = [(mark, what, ", ".join(f"`tests/{test}.py`" for test in tests)) for mark, what, tests in _MARKS]
    names_of: dict[int, list[str]] = {}
    for name, family in sorted(FAMILIES.items()):
        names_of.setdefault(id(family), []).append(name)
    rows = [_row(names, FAMILIES[names[0]]) for names in names_of.values()]
    return f"{_HEAD}{_table(('mark', 'what is proved', 'by'), marks)}\n{_table(_COLUMNS, rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def _row(names: Sequence[str], family: Family) -> tuple[str, ...]:
    """A row of one family file, which may have several names."""

    def is_any(configs: Iterable[RawConfig]) -> bool:
        return any(config["model_type"] in names for config in configs)

    released = [model.name for model in PUBLISHED if is_any([model.config])]
    gguf = {
        "G": any(name in rows() and rows()[name].gguf is not None for name in names),
        "C": is_any(config for one, config in configs().items() if one in _RECORDED),
        "F": is_any(config for name, (_, config) in CONVERTED.items() if name not in LLAMA_CPP_DIFFERS),
        "L": is_any(_configs_in(vars(test_peer).values())),
    }
    text = {
        "T": is_any(one.config for one in CONFIGURATIONS) or any(name in RENAMED for name in names),
        "M": is_any(one.config for one in MLX_MODELS),
    }
    return (
        ", ".join(f"`{name}`" for name in names),
        ", ".join(released),
        _marked("", text),
        "" if family.GGUF_ARCHITECTURE is None else _marked(f"`{family.GGUF_ARCHITECTURE}`", gguf),
        *(_media(names), _chats(names), _drafts(names, family)),
    )


def _configs_in(values: Iterable[object]) -> Iterator[RawConfig]:
    """The configs among the values, or in tables and tuples among them."""
    for value in values:
        match value:
            case {"model_type": _}:
                yield value
            case dict():
                yield from _configs_in(value.values())
            case tuple():
                yield from _configs_in(value)


def _media(names: Sequence[str]) -> str:
    found = dict.fromkeys(encoder.kind for name in names for encoder in ENCODERS.get(name, ()))
    return (
        _marked(", ".join(found), {"V": any(name in seeing.CONFIGS or name in RENAMED for name in names)})
        if found
        else ""
    )


def _chats(names: Sequence[str]) -> str:
    """The formats that its templates are found to have, and whether transcripts of all of them are parsed."""
    recorded = {
        one for path in TRANSCRIPTS.glob("*.json") for one in json.loads(path.read_text())["families"]
    }
    found: dict[str, bool] = {}
    for chat in (chat for name in names if name in rows() for chat in rows()[name].chats):
        form = find_format(EVERY_FAMILY[chat].tokenizer, EVERY_FAMILY[chat].template).name
        found[form] = found.get(form, True) and chat in recorded
    return ", ".join(_marked(f"`{form}`", {"R": is_proved}) for form, is_proved in found.items())


def _drafts(names: Sequence[str], family: Family) -> str:
    if any(name in test_mtp.CONFIGS for name in names):
        return "D"
    return "passed over" if any("mtp" in (layout.passed_over or "") for layout in family.LAYOUTS) else ""


def _marked(what: str, proofs: Mapping[str, bool]) -> str:
    marks = "".join(mark for mark, is_proved in proofs.items() if is_proved)
    return f"{what} {marks}".strip()


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(PAGE.parents[1])}")


if __name__ == "__main__":
    main()
