"""Failed logins: counted, logged, and slowed for the address that they come from.

Each address may try some wrong keys, then one per second. What is tried beyond that is not looked at: it is told to
come back, right or wrong, so that trying many at a time gains nothing. A key that has opened something from this
address before is looked at all the same: whoever shares an address with somebody who guesses (every user of this
machine has 127.0.0.1) works on.
"""

from __future__ import annotations

import logging
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import field

from vllmd.frozen import mutable
from vllmd.proxy.http import Peer

log = logging.getLogger("vllmd.http")

FREE_TRIES = 20.0  # wrong keys from one address
PER_SECOND = 1.0  # and so many more in each second
MOST_ADDRESSES = 4096  # remembered; the one whose last failure is oldest is forgotten first
MOST_KEYS = 64  # that have opened something, remembered per address
Clock = Callable[[], float]


@mutable
class _Address:
    """Failures from one address. ``tries``: how many more wrong keys it may try at the time ``at``."""

    at: float
    tries: float = FREE_TRIES
    failed: int = 0
    good: OrderedDict[str, None] = field(default_factory=OrderedDict)  # digests


class FailedLogins:
    """Keeps the account. ``count`` hears of each login that failed: ``wrong``, or ``unseen`` for one not looked at."""

    def __init__(self, clock: Clock, count: Callable[[str], None]) -> None:
        self._clock = clock
        self._count = count
        self._addresses: OrderedDict[str, _Address] = OrderedDict()

    def wait(self, peer: Peer, digest: str) -> float:
        """Seconds until a key with this digest is looked at; 0.0 for at once."""
        known = self._addresses.get(_of(peer))
        if known is None or digest in known.good:
            return 0.0
        self._refill(known)
        if known.tries >= 1.0:
            return 0.0
        self._count("unseen")
        return (1.0 - known.tries) / PER_SECOND

    def passed(self, peer: Peer, digest: str) -> None:
        """A right key came from there."""
        known = self._addresses.get(_of(peer))
        if known is not None and digest in known.good:
            return
        known = self._of(peer)
        known.good[digest] = None
        if len(known.good) > MOST_KEYS:
            known.good.popitem(last=False)

    def failed(self, peer: Peer, digest: str) -> None:
        """Count a wrong key; it may have been right before a reload."""
        known = self._of(peer)
        known.good.pop(digest, None)
        self._refill(known)
        known.tries = max(0.0, known.tries - 1.0)
        known.failed += 1
        self._count("wrong")
        if set(f"{known.failed}"[1:]) <= {"0"}:  # the first ones, then every tenth, every hundredth, ...
            what = f"{known.failed} wrong API keys" if known.failed > 1 else "a wrong API key"
            log.warning("%s from %s", what, _of(peer), extra={"journal": {"VLLMD_PEER": _of(peer)}})

    def _of(self, peer: Peer) -> _Address:
        name = _of(peer)
        known = self._addresses.pop(name, None) or _Address(self._clock())
        self._addresses[name] = known
        if len(self._addresses) > MOST_ADDRESSES:
            self._addresses.popitem(last=False)
        return known

    def _refill(self, known: _Address) -> None:
        now = self._clock()
        known.tries = min(FREE_TRIES, known.tries + (now - known.at) * PER_SECOND)
        known.at = now


def _of(peer: Peer) -> str:
    """The origin that failures are counted by: a user of this machine, an IPv4 address, or a network of IPv6, which
    gives each host many.
    """
    if peer.local:
        return f"uid {peer.uid}"
    if ":" not in peer.address:
        return peer.address
    try:
        network = socket.inet_pton(socket.AF_INET6, peer.address.partition("%")[0])[:8]
    except OSError:
        return peer.address
    return peer.address if not any(network) else socket.inet_ntop(socket.AF_INET6, network + bytes(8)) + "/64"
