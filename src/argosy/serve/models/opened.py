"""What a server makes of an open engine: the thread that steps it, the service, and the facts that clients may know.

Elsewhere: `entry.py` opens engines and closes them; the service itself is `serve/answer/service.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from argosy.engine.engine import Engine
from argosy.engine.facts import identity_of
from argosy.engine.ledger import DecodeSteps
from argosy.engine.loop import EngineLoop
from argosy.engine.shared import Ready
from argosy.errors import ArgosyError, DoesNotFit
from argosy.forecast.verification import Verification, compare_decode
from argosy.media.parts import Hearing, Kind
from argosy.observe.live import LiveCache
from argosy.observe.recorder import Recorder
from argosy.prompt.replay import ReplayMemory
from argosy.prompt.reranking import RERANK_FORMS, Reranking
from argosy.serve.answer.facts import ModelFacts
from argosy.serve.answer.service import Common, Service
from argosy.serve.http.log import where_it_failed

if TYPE_CHECKING:
    from argosy.forecast.forecast import Speeds

log = logging.getLogger("argosy.serve")


def service_for(
    engine: Engine,
    facts: ModelFacts,
    common: Common,
    *,
    replay_bytes: int,
    recorder: Recorder | None,
    speeds: Speeds | None,
) -> Service:
    """Start the thread that steps an engine. Close the service's `loop` before closing the engine.

    Args:
        replay_bytes: memory for answers whose tokens are kept until their conversation continues.
        recorder: records the choices of recent tokens; None: nothing is recorded.
        speeds: predicts its speed; None: no predictions.
    """

    def compare(steps: DecodeSteps) -> Verification:
        assert speeds is not None
        return compare_decode(speeds, engine.plan, steps)

    recent_cache = None
    if recorder is not None and not engine.plan.slots.is_packed:
        num_experts, num_slots = engine.config.num_experts, engine.plan.slots_in_decode()
        recent_cache = LiveCache(recorder, num_experts=num_experts, num_slots=num_slots)
    reranking = None
    if common.rerank is not None:
        form, context_tokens = RERANK_FORMS[common.rerank], engine.plan.context_tokens
        reranking = Reranking(form, engine.tokenizer, context_tokens=context_tokens)
    if common.ring is not None:
        engine.forget_others(["", *common.ring.ids])  # drop tenants whose keys were revoked meanwhile
    return Service(
        EngineLoop(engine, report=lambda error: log.error("engine: %s", where_it_failed(error))),
        engine.prompts.remembering(ReplayMemory(max_bytes=replay_bytes)),
        engine.tokenizer,
        facts,
        common,
        ears=engine.ears,
        reranking=reranking,
        recent_cache=recent_cache,
        compare=None if speeds is None else compare,
    )


def facts_of_engine(engine: Engine, name: str) -> ModelFacts:
    """The facts about a model whose engine is open. Reads samples of its files."""
    return _facts_of(engine, name, engine.media.kinds, engine.media.hears, engine.media.faults)


def facts_of_ready(ready: Ready) -> ModelFacts:
    """The facts about a model that is not open yet. Reads samples of its files."""
    found = ready.footprint.processors.items()
    faults = {kind: one for kind, one in found if isinstance(one, ArgosyError)}
    facts = _facts_of(ready, ready.name, ready.media_kinds, ready.hears, faults)
    return replace(facts, adapters=tuple(one.name for one in ready.config.loras))


def _shown(kind: Kind, fault: ArgosyError) -> str:
    """Tell clients why a model takes no media of a kind. The fault's own message may contain paths."""
    if isinstance(fault, DoesNotFit):
        return f"this server's memory budget has no room for {kind}s"
    return f"this server cannot prepare {kind}s for this model"


def _facts_of(
    opened: Engine | Ready,
    name: str,
    media_kinds: tuple[Kind, ...],
    hears: Hearing,
    faults: Mapping[Kind, ArgosyError],
) -> ModelFacts:
    model, plan = opened.files.config, opened.plan
    num_parameters, fingerprint = identity_of(opened.files)
    return ModelFacts(
        id=name,
        family=model.family,
        context_tokens=plan.context_tokens,
        num_layers=len(model.layers),
        num_experts=model.num_experts,
        experts_per_token=model.experts_per_token,
        vocab_size=model.vocab_size,
        num_parameters=num_parameters,
        weight_bytes=plan.dense_bytes + plan.resident_bytes,
        media_kinds=media_kinds,
        media_faults={kind: _shown(kind, fault) for kind, fault in faults.items() if kind not in media_kinds},
        hears=hears,
        hidden_size=model.hidden_size,
        fingerprint=fingerprint,
        sampling=opened.sampling,
    )
