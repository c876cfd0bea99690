"""How much memory requests may take, and who may take how much of it: their bodies, and heads that are large.

The problem: a body is held from its first byte until its request is over, which is minutes where a model loads. One
limit for all (``server.max_buffered``) keeps the daemon from being killed for its memory, but whoever reaches it first
locks out everybody else. So memory is taken as the bytes arrive, never for a length that was only announced, and by a
rule that needs no list of who is who: **nobody may hold more than what is then left free for the others.** One client
alone gets half of the limit, two get a third each, and whoever comes next always finds as much free as the greediest
holds (the dynamic thresholds of switches that share a buffer between ports).

A holder is a key at an address: several keys behind one proxy do not stand in each other's way, and one key that a
whole team shares is not one holder either. All of an IPv6 network of 64 bits is one address, as is all of 127.0.0.0/8:
both give one person more addresses than anybody can count.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from vllmd.proxy.http import Peer

Holder = tuple[str, str]  # a place (``place_of``) and a key's name


class BodyMemory:
    """Keeps count of the bytes of requests that are held, in all and by holder."""

    def __init__(self, limit: int) -> None:
        """``limit`` is in bytes, over all holders."""
        self.limit = limit
        self.held = 0
        self._by_holder: dict[Holder, int] = {}

    def has_room(self, holder: Holder, size: int) -> bool:
        """Whether ``holder`` may have ``size`` bytes more now."""
        return self._by_holder.get(holder, 0) + size <= self.limit - self.held - size

    def take(self, holder: Holder, size: int) -> bool:
        """Count ``size`` bytes more for ``holder``; False, and nothing counted, if it may not have them."""
        mine, held = self._by_holder.get(holder, 0) + size, self.held + size
        if mine > self.limit - held:
            return False
        self._by_holder[holder], self.held = mine, held
        return True

    def give_back(self, holder: Holder, size: int) -> None:
        """``size`` bytes that were taken are no longer held."""
        self.held -= size
        left = self._by_holder[holder] - size
        if left:
            self._by_holder[holder] = left
        else:
            del self._by_holder[holder]


def place_of(peer: Peer) -> str:
    """What counts as one place: a user of this machine, an IPv4 address, or an IPv6 network of 64 bits."""
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
