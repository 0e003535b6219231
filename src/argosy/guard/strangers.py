"""Limit the requests without a valid key, by the client's address.

    no valid key  ->  Strangers.count  ->  401, or 429 once an address is over its limit

A refused request is cheap, but its body is read to the end so that the client gets to read the answer. An address
that keeps trying gets 429, and its connection is closed. A valid key is always admitted, whatever its address has
sent. Loopback addresses are not limited: a proxy may run on this machine, and all of its clients share its address.

Elsewhere: the limits of keys are `limits.py`.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable

from argosy.guard.buckets import Buckets
from argosy.guard.limits import TooMany

PER_MINUTE = 60
_IPV6_PREFIX = 64  # the usual size of one customer's network


class Stranger(TooMany):
    """An address has sent too many requests without a valid key."""


class Strangers:
    """The refusals that each address has left, refilled at PER_MINUTE. Any thread may call it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._buckets = Buckets(clock)

    def count(self, address: str) -> None:
        """Count a request without a valid key.

        Raises:
            Stranger: the address has used up its refusals.
        """
        network = _network(address)
        if network is None:
            return
        wait_s = self._buckets.take(network, PER_MINUTE)
        if wait_s:
            raise Stranger(
                "too many requests without a valid key came from this address", retry_after_s=wait_s
            )


def _network(address: str) -> str | None:
    """The network of an address; None for this machine's own addresses and for text that is not an address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if found.is_loopback:
        return None
    if found.version == 4:
        return str(found)
    return str(ipaddress.ip_network((found, _IPV6_PREFIX), strict=False))
