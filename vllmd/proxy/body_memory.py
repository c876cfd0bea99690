"""The memory of requests (their bodies, and large heads), shared fairly between clients.

A body is in memory from its first byte until its request is over, which is minutes where a model loads. One limit for
all (``server.max_buffered``) keeps the daemon from being killed for its memory, but the first client to reach it would
lock out all others. So memory is charged as the bytes arrive, never for a length that was only announced, and by a
rule that needs no list of clients: **no holder may have more than what is then left free for the others.** One client
alone gets half of the limit, two get a third each, and the next one always finds as much free as the largest holder
has (the dynamic thresholds of switches that share a buffer between ports).

A holder is a key at an address: several keys behind one proxy are several holders, and so is one key that a team
shares. All of an IPv6 network of 64 bits is one address, as is all of 127.0.0.0/8: one person has more of these
addresses than there can be limits for.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from vllmd.proxy.http import Peer

Holder = tuple[str, str]  # a place (``place_of``) and a key's name


class BodyMemory:
    """Counts the bytes of requests in memory, in all and by holder."""

    def __init__(self, limit: int) -> None:
        """``limit`` is in bytes, over all holders."""
        self.limit = limit
        self.held = 0
        self._by_holder: dict[Holder, int] = {}

    def has_room(self, holder: Holder, size: int) -> bool:
        """Whether ``holder`` could be charged with ``size`` bytes more now."""
        return self._by_holder.get(holder, 0) + size <= self.limit - self.held - size

    def try_charge(self, holder: Holder, size: int) -> bool:
        """Charge ``holder`` with ``size`` bytes more. False, and nothing charged, if it may not have them."""
        own, held = self._by_holder.get(holder, 0) + size, self.held + size
        if own > self.limit - held:
            return False
        self._by_holder[holder], self.held = own, held
        return True

    def uncharge(self, holder: Holder, size: int) -> None:
        """Free ``size`` bytes that ``holder`` was charged with."""
        self.held -= size
        rest = self._by_holder[holder] - size
        if rest:
            self._by_holder[holder] = rest
        else:
            del self._by_holder[holder]


def place_of(peer: Peer) -> str:
    """A client's place, such that one person has few of them: a user id, an IPv4 address, or an IPv6 network."""
    return f"uid {peer.uid}" if peer.local else _network(peer.address)


@lru_cache(4096)
def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 6:
        parsed = parsed.ipv4_mapped or parsed
    if parsed.is_loopback:
        return "loopback"
    return str(parsed) if parsed.version == 4 else str(ipaddress.ip_network((parsed, 64), strict=False))
