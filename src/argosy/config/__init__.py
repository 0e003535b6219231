# ruff: noqa: F401, I001  names for others to import, read as one table
"""User settings and checkpoint geometry, as frozen and strict values.

The command line and the environment are read in one place and become an `EngineConfig`. A family file turns
`config.json` into a `ModelConfig`. Everything below receives these objects and reads no other configuration.
"""

from argosy.config.adapter_needs import AdapterNeeds
from argosy.config.claims import CLAIMED, PROCESS, Claim, claimed
from argosy.config.engine import (
    DEMO, DRAFTED_AT_ONCE, DRAFT_TOKENS, INSTRUCTION_SETS, KV_BLOCK_TOKENS, MOST_SEQUENCES, RUNNING,
    SERVED_AT_ONCE, SERVED_WAITING, SIZING, TINY_EN, WATERMARK_CONTEXT, WATERMARK_DEPTH, AskAhead, Budget,
    EngineConfig, EngineOptions, KvDir, KvDtype, Pooling, Tuning,
)  # fmt: skip
from argosy.config.expert_slots import ExpertSlots
from argosy.config.model import (
    ACT_ORDER_FORMATS, F8_FORMATS, FLOAT_FORMATS, MEASURED_FORMATS, ActivationConfig, Format, LayerConfig, ModelConfig,
    RouterConfig,
)  # fmt: skip
from argosy.config.mixers import (
    AttentionConfig, BlockIndexConfig, CandidateConfig, CompressedConfig, DeltaConfig, EntryIndexConfig, IndexConfig,
    KimiDeltaConfig, LatentConfig, LightningConfig, MambaConfig, Mixer, PoolConfig, QueryScale, RecurrentMixer,
    RopeConfig, RotaryMixer, ShortConvConfig, WindowedMixer,
)  # fmt: skip
from argosy.config.ngrams import NgramConfig
from argosy.config.residual import BankResidual, GatedResidual, Residual, SinkhornResidual
from argosy.config.sampling import (
    CHOOSING, EFFORTS, ENDING, LENIENT_SCHEMA, MAX_GRAMMAR_CHARACTERS, SAMPLING, THINKING, Grammar, Preset,
    SamplingDefaults, SamplingParams, Trigger, TriggerWord,
)  # fmt: skip
from argosy.config.units import GIB, KIB, MIB, counted, disk_size, format_bytes, parse_seconds, parse_size
