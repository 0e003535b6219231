"""The memory that a server claims from the budget, independent of its models."""

from __future__ import annotations

from argosy.config import MIB, PROCESS, Claim
from argosy.serve.http.held import AUDIT_BYTES, BODY_BYTES, MEDIA_BODIES_BYTES

# Connections and threads, each with its own allocator: 18 MiB. A second process that renders chat templates: 11 MiB
# that it does not share with the first. Measured values, rounded up.
SERVER_GROWTH_BYTES = 30 * MIB
TEXT_BYTES = 48 * MIB  # one long conversation, rendered and then encoded piece by piece
REPLAY_BYTES = 16 * MIB  # answers of a thousand tokens take about 20 KB each
KEPT_BYTES = REPLAY_BYTES // 4  # the part of those for items that clients refer to, shared by all models


def server_claims(*, keeps_content: bool) -> tuple[Claim, ...]:
    """Memory for requests and for the server's own growth.

    Args:
        keeps_content: whether an audit keeps what requests say.
    """
    return (
        Claim(PROCESS, SERVER_GROWTH_BYTES),
        Claim("request_bytes", BODY_BYTES + TEXT_BYTES),
        Claim("request_bytes", MEDIA_BODIES_BYTES, when="media"),
        Claim("request_bytes", TEXT_BYTES, when="video"),  # such a conversation alongside another long one
        *((Claim("request_bytes", AUDIT_BYTES),) if keeps_content else ()),
    )
