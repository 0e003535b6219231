"""The names of a Mamba-2 mixer's tensors on the hub, and its sizes in GGUF metadata: the same in every family."""

from __future__ import annotations

from argosy.config import MambaConfig
from argosy.errors import CheckpointError
from argosy.model.reading.gguf_config import GgufConfigReader

MOST_OF_ONE = 65_536  # heads, dimensions of one, and of its state: more are a damaged file

# Below the mixer's own name.
MAMBA_NAMES = {
    "mamba_in": "in_proj.weight",
    "mamba_in_bias": "in_proj.bias",
    "mamba_conv": "conv1d.weight",
    "mamba_conv_bias": "conv1d.bias",
    "mamba_rate": "A_log",
    "mamba_dt_bias": "dt_bias",
    "mamba_skip": "D",
    "mamba_norm": "norm.weight",
    "mamba_out": "out_proj.weight",
    "mamba_out_bias": "out_proj.bias",
}


# Values of `time_step_limit` that clamp nothing. Released files have `Infinity`, which `read_raw` respells.
NO_LIMIT = ([0.0, {"__float__": "Infinity"}], None)


def require_even_shares(mamba: MambaConfig, channels: int, where: str) -> MambaConfig:
    """Return the config if its heads share the channels evenly, and its groups share the heads.

    Args:
        where: the file, and the names of its keys for channels, heads and groups.

    Raises:
        CheckpointError: they do not.
    """
    if mamba.channels != channels or mamba.num_heads % mamba.num_groups:
        raise CheckpointError(
            f"{where}: {channels} channels, {mamba.num_heads} heads, {mamba.num_groups} groups; expected heads of "
            "equal size, and groups of equally many heads"
        )
    return mamba


def read_gguf_mamba(reader: GgufConfigReader) -> MambaConfig:
    """Read the sizes of Mamba-2 mixers; llama.cpp stores decay rates as they are, not their logarithms.

    Raises:
        CheckpointError: a key is missing, malformed, or contradicts another.
    """
    channels, heads = reader.integer("ssm.inner_size"), reader.integer("ssm.time_step_rank", most=MOST_OF_ONE)
    mamba = MambaConfig(
        num_heads=heads,
        head_dim=channels // heads,
        state_dim=reader.integer("ssm.state_size", most=MOST_OF_ONE),
        num_groups=reader.integer("ssm.group_count"),
        conv_width=reader.integer("ssm.conv_kernel", most=64),
        has_conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in reader.file.tensors),
        is_rate_log=False,
    )
    where = f"{reader.file.path.name}: ssm.inner_size, ssm.time_step_rank and ssm.group_count"
    return require_even_shares(mamba, channels, where)
