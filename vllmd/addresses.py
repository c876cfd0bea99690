"""What an address says of who can reach it."""

from __future__ import annotations

import functools

PLAIN = frozenset({"localhost", "127.0.0.1", "::1"})


@functools.lru_cache(1000)
def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an IP address without brackets and port, is this machine and nobody else's."""
    if host in PLAIN:
        return True
    import ipaddress  # 7 ms that only other addresses need

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
