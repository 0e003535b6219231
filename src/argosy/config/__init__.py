# ruff: noqa: F403  these modules are read as one
"""User settings and checkpoint geometry, as frozen and strict values.

The command line and the environment are read in one place and become an `EngineConfig`. A family file turns
`config.json` into a `ModelConfig`. Everything below receives these objects and reads no other configuration.
"""

from argosy.config.claims import *
from argosy.config.engine import *
from argosy.config.expert_slots import *
from argosy.config.model import *
from argosy.config.sampling import *
from argosy.config.units import *
