"""Open an adapter, whatever program wrote it.

    directory or file + the base model's files  ->  open_adapter  ->  AdapterFiles

Elsewhere: `peft.py` reads PEFT's directories, `mlx.py` those of mlx-lm, `gguf.py` files of llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

from argosy.adapters.files import AdapterFiles
from argosy.adapters.gguf import open_gguf_adapter
from argosy.adapters.mlx import WEIGHTS_FILE as MLX_WEIGHTS_FILE
from argosy.adapters.mlx import open_mlx
from argosy.adapters.pairs import ExpertOrder
from argosy.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, open_peft
from argosy.checkpoint.files import ModelFiles
from argosy.errors import CheckpointError, UnsupportedModel

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


def open_adapter(
    path: str | Path, files: ModelFiles, *, columns: ExpertOrder = "expert_fastest"
) -> AdapterFiles:
    """Read an adapter for a model, and prove that it fits.

    Args:
        path: a directory that PEFT or mlx-lm has written, or a GGUF file of llama.cpp.
        files: the base model's, in any form.
        columns: how the columns of pairs of fused experts follow each other; `expert_slowest` for adapters made by
            Unsloth before 2026-09-17.

    Raises:
        CheckpointError: the adapter is missing, damaged or incomplete, or was trained for another base.
        UnsupportedModel: it asks for something that is not supported; names the tensor or key.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", path=path)
    if path.suffix == ".gguf" and not path.is_dir():
        return open_gguf_adapter(path, files)
    if path.is_dir() and (path / CONFIG_FILE).exists():
        if (path / WEIGHTS_FILE).exists():
            return open_peft(path, files, columns)
        if (path / MLX_WEIGHTS_FILE).exists():
            return open_mlx(path, files)
        for name in _PICKLES:
            if (path / name).exists():
                raise UnsupportedModel(
                    f"{path / name} is a pickle, which could run any program; supported: {WEIGHTS_FILE}",
                    hint="save it with `model.save_pretrained(DIR, safe_serialization=True)`",
                    path=path / name,
                )
    raise CheckpointError(
        f"{path} holds no adapter: looked for {CONFIG_FILE} and {WEIGHTS_FILE} or {MLX_WEIGHTS_FILE} in a directory",
        path=path,
    )
