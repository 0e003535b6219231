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
from argosy.checkpoint.gguf import is_gguf
from argosy.checkpoint.gguf_names import GGUF_SUFFIX
from argosy.checkpoint.untrusted_file import quote
from argosy.errors import CheckpointError, UnsupportedModel

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


def open_adapter(
    path: str | Path, files: ModelFiles, *, columns: ExpertOrder = "expert_fastest"
) -> AdapterFiles:
    """Read an adapter for a model, and prove that it fits.

    Args:
        path: a directory that PEFT or mlx-lm has written, or a GGUF file of llama.cpp, whatever its name.
        files: the base model's, in any form.
        columns: how the columns of pairs of fused experts follow each other; `expert_slowest` for adapters made by
            Unsloth before 2026-09-17.

    Raises:
        CheckpointError: the adapter is missing, damaged or incomplete, was trained for another base, or is one of
            several in the directory.
        UnsupportedModel: it asks for something that is not supported; names the tensor or key.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", path=path)
    if not path.is_dir():
        if is_gguf(path):
            return open_gguf_adapter(path, files)
        raise CheckpointError(
            f"{path} is neither a directory nor a GGUF file",
            hint=f"give the directory with {CONFIG_FILE}" if path.suffix == ".safetensors" else None,
            path=path,
        )
    return _open_directory(path, files, columns)


def _open_directory(path: Path, files: ModelFiles, columns: ExpertOrder) -> AdapterFiles:
    """Read the only adapter of a directory. A GGUF file beside a PEFT directory's files is its copy: llama.cpp's
    converter writes it there.
    """
    has_config = (path / CONFIG_FILE).exists()
    is_peft, is_mlx = (has_config and (path / name).exists() for name in (WEIGHTS_FILE, MLX_WEIGHTS_FILE))
    if is_peft and is_mlx:
        raise CheckpointError(
            f"{path} holds {WEIGHTS_FILE} of PEFT and {MLX_WEIGHTS_FILE} of mlx-lm, expected one of them",
            hint="copy the adapter that you mean to a directory of its own",
            path=path,
        )
    if is_peft:
        return open_peft(path, files, columns)
    if is_mlx:
        return open_mlx(path, files)
    for name in _PICKLES:
        if has_config and (path / name).exists():
            raise UnsupportedModel(
                f"{path / name} is a pickle, which could run any program; supported: {WEIGHTS_FILE}",
                hint="save it with `model.save_pretrained(DIR, safe_serialization=True)`",
                path=path / name,
            )
    converted = sorted(path.glob("*" + GGUF_SUFFIX))
    if len(converted) == 1:
        return open_gguf_adapter(converted[0], files)
    if converted:
        raise CheckpointError(
            f"{path} holds {len(converted)} GGUF files, expected one adapter",
            hint=f"give one of the files, such as {quote(str(converted[0]))}",
            path=path,
        )
    raise CheckpointError(
        f"{path} holds no adapter: looked for {CONFIG_FILE} with {WEIGHTS_FILE} or {MLX_WEIGHTS_FILE}, and for a file "
        f"*{GGUF_SUFFIX}",
        path=path,
    )
