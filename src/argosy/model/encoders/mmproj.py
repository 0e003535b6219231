"""Read towers from files of llama.cpp's converter (`mmproj-*.gguf`), in the terms of `encoder.py`.

    GgufFile  ->  read_towers  ->  config, names of tensors, settings of the processor

A GGUF model keeps its towers in a separate file of architecture `clip`. Its `clip.projector_type` names the tower, and
the text model names the family; a file with towers for pictures and for sound has a type for each. Weights keep their
values, but some are stored differently: the kernel that makes a hidden state from a patch of two frames is two
matrices, queries and keys of MoonViT have the pairs of an axis together, and Gemma's kernel has colours first.

The file contains the mean and deviation of colours, but for most towers no picture sizes. Sizes then come from the
released models' `preprocessor_config.json`, named in the tower's file; llama.cpp uses its own.

Elsewhere: `projector.py` is a tower's own part; `checkpoint/gguf.py` finds and reads the file; `reading.py` makes
`EncoderFiles` of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from argosy.checkpoint.gguf import GgufFile
from argosy.checkpoint.untrusted_file import quote
from argosy.config import ModelConfig
from argosy.errors import ArgosyError, CheckpointError, UnsupportedModel
from argosy.media.parts import Kind
from argosy.model.encoders.encoder import Encoder
from argosy.model.encoders.projector import Projector
from argosy.model.encoders.table import ENCODERS, PROJECTORS
from argosy.model.reading.config_reader import ConfigReader
from argosy.model.reading.gguf_config import GgufConfigReader

_ARCHITECTURE = "clip"
_PARTS: Mapping[Kind, str] = {"picture": "vision", "sound": "audio"}  # as the keys name them
_NAMED_BESIDE = "give the file that was published with the model: `--mmproj PATH`"

_LAYER_NAMES = {
    "attn_norm": "ln1",
    "qkv": "attn_qkv",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_out",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_out_norm": "attn_post_norm",
    "mlp_norm": "ln2",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_out_norm": "ffn_post_norm",
    "attn_scale": "ls1",
    "mlp_scale": "ls2",
}
_DEEPSTACK_NAMES = {"norm": "norm", "up": "fc1", "down": "fc2"}


@dataclass(frozen=True, slots=True)
class TowerInFile:
    """A tower as its file describes it.

    names: canonical name -> name of the tensor.
    settings: as the projector reads them.
    """

    encoder: Encoder
    config: Any
    projector: Projector
    names: Mapping[str, str]
    settings: Mapping[str, object]


def read_towers(file: GgufFile, model: ModelConfig) -> dict[Kind, TowerInFile | ArgosyError]:
    """Read the descriptions of the towers; a tower that cannot run is represented by the error that says why.

    Args:
        model: the text model that the towers serve.

    Raises:
        UnsupportedModel: another kind of file.
        CheckpointError: the file has no tower, or its declaration is malformed.
    """
    architecture = file.text("general.architecture")
    if architecture != _ARCHITECTURE:
        raise UnsupportedModel(
            f"{file.path.name} has architecture '{quote(architecture)}'; a file with a vision tower has "
            f"'{_ARCHITECTURE}'",
            path=file.path,
            key="general.architecture",
            value=architecture,
            supported=(_ARCHITECTURE,),
        )
    found: dict[Kind, TowerInFile | ArgosyError] = {}
    for kind, part in _PARTS.items():
        if file.flag(f"clip.has_{part}_encoder", False):
            try:
                found[kind] = _read_tower(file, model, kind)
            except (UnsupportedModel, CheckpointError) as error:
                found[kind] = error
    if not found:
        raise CheckpointError(
            f"{file.path.name} has neither clip.has_vision_encoder nor clip.has_audio_encoder", path=file.path
        )
    return found


def is_of(kind: Kind, tensor: str) -> bool:
    """Whether a tensor of the file belongs to the tower of this kind."""
    return tensor.startswith(("a.", "mm.a.")) == (kind == "sound")


def _read_tower(file: GgufFile, model: ModelConfig, kind: Kind) -> TowerInFile:
    part = _PARTS[kind]
    reader = GgufConfigReader(file, _ARCHITECTURE)
    key = f"{part}.projector_type" if reader.has(f"{part}.projector_type") else "projector_type"
    projector_type = file.text(reader.key(key))
    known = {name: one for name, one in PROJECTORS.items() if one.kind == kind}
    projector = known.get(projector_type)
    if projector is None:
        raise reader.unsupported(key, projector_type, ", ".join(known))
    if model.family not in projector.families:
        raise UnsupportedModel(
            f"{file.path.name} has a tower of type {projector_type} for {kind}s, and the model beside it is a "
            f"{model.family}; this tower belongs to: {', '.join(projector.families)}",
            hint=_NAMED_BESIDE,
            path=file.path,
            key=key,
            value=projector_type,
            supported=list(projector.families),
        )
    encoders = ENCODERS.get(projector.families[model.family], ())
    if not (encoder := next((one for one in encoders if one.kind == kind), None)):
        raise UnsupportedModel(f"this installation is without the tower of {file.path.name}", path=file.path)
    raw = projector.read_config(reader)
    settings = projector.read_settings(reader)
    rows = reader.integer(f"{part}.projection_dim")
    _pass_others(reader, kind)
    reader.finish()
    if rows != model.hidden_size:
        raise CheckpointError(
            f"{file.path.name} makes rows of {rows} values for {kind}s, and the model beside it has a hidden size of "
            f"{model.hidden_size}",
            hint=_NAMED_BESIDE,
            path=file.path,
            key=f"clip.{part}.projection_dim",
        )
    own = ConfigReader(raw, model.family, file.path, within=f"clip.{part}")
    config = encoder.read(own, ConfigReader({}, model.family, file.path), model)
    config = replace(config, **projector.stored)
    names = {
        name: projector.whole_names.get(name) or _name(name, projector, config)
        for name in encoder.tensors(config)
    }
    for old, new in projector.renamed.items():
        names = {
            ours: name if name in file.tensors else name.replace(old, new) for ours, name in names.items()
        }
    return TowerInFile(encoder, config, projector, names, settings)


def _pass_others(reader: GgufConfigReader, kind: Kind) -> None:
    """Count keys of the other tower as read; keys without a part, such as `use_gelu`, belong to vision."""
    for key in reader.file.metadata:
        name = key.removeprefix(f"{_ARCHITECTURE}.")
        is_audio = name.startswith("audio.")
        if name.startswith("has_") or is_audio == (kind == "picture"):
            reader.key(name)


def _name(canonical: str, projector: Projector, config: Any) -> str:
    """Return the name of a tensor in the file."""
    base, kind, names = canonical, "weight", projector.names
    if canonical.endswith("_bias"):
        base, kind = canonical.removesuffix("_bias"), "bias"
    if base in names:
        return f"{names[base]}.{kind}"
    first, _, rest = base.partition(".")
    number, _, last = rest.partition(".")
    if first == "patch":  # a frame after the first
        return f"{names['patch']}.weight.{number}"
    if first == "deepstack":  # numbered by the layer whose output it takes
        layer, last = config.deepstack_layers[int(number)], _DEEPSTACK_NAMES[last]
        return f"v.deepstack.{layer}.{last}.{kind}"
    assert first in projector.layers or first == "layers", canonical
    of_kind = "v.blk" if projector.kind == "picture" else "a.blk"
    stack, own = projector.layers.get(first, (of_kind, {}))
    return f"{stack}.{number}.{own.get(last) or _LAYER_NAMES[last]}.{kind}"
