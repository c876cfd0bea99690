"""The host names under which a server without keys may be called.

A web page can have its own name point to any address (DNS rebinding). Its browser then takes this server for the page's
own, and lets the page read every answer. Only the name in ``Host`` tells such a request from an honest one. A caller
with a key needs no such check; without keys the name must be one that no foreign page can have.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from pathlib import Path

from vllmd.errors import Misdirected
from vllmd.proxy.http import Request

# A page has a name: nothing points an address somewhere else. A name that ends in a number is an IPv4 address.
ADDRESS = re.compile(r"\[[0-9a-f:.]+\]|[0-9]+(\.[0-9]+){3}")
LOCALHOST = re.compile(r"([a-z0-9_-]+\.)*localhost")  # nobody can have a name below it (RFC 6761, 6.3)
# Under this name, which browsers take for this machine, the page is served at loopback addresses, and nothing of an
# engine's runs a script: a page of an engine (``/upstream/NAME/``) has another origin, and cannot act as an operator.
PAGE_HOST = "vllmd.localhost"
ETC_HOSTS = Path("/etc/hosts")
MAX_ACCEPTED_KEPT = 64


class Hosts:
    """Addresses, localhost, this machine's names, and those that the configuration adds; ``*`` is any."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._machine = machine_names()
        self.configure(names)

    def configure(self, names: Iterable[str]) -> None:
        """Replace the names that the configuration adds."""
        self._names = self._machine | {_plain(name) for name in names}
        self._accepted: set[str] = set()  # Host fields that were accepted: clients repeat themselves

    def check(self, request: Request) -> None:
        """Raise Misdirected for a request under another name. Over a Unix socket there are no names."""
        host = request.headers.get("host")
        if request.peer.local or not host or host in self._accepted:
            return
        if self.ours(host):
            if len(self._accepted) < MAX_ACCEPTED_KEPT:
                self._accepted.add(host)
            return
        raise Misdirected(
            f"this server is not {host[:200]!r}: without keys it answers under addresses, localhost and its machine's "
            "names; server.hosts adds others"
        )

    def ours(self, host: str) -> bool:
        """Whether a ``Host`` (with or without its port) is one of ours."""
        name = _plain(host)
        known = name in self._names or "*" in self._names
        return known or bool(ADDRESS.fullmatch(name) or LOCALHOST.fullmatch(name))


def shares_the_page(request: Request) -> bool:
    """Whether the answer has the same origin as the daemon's own page, for the browser."""
    return request.fenced or _plain(request.headers.get("host")) == PAGE_HOST


def machine_names(etc_hosts: Path = ETC_HOSTS) -> frozenset[str]:
    """The host name, with ``.local`` (mDNS), and what /etc/hosts calls it; DNS is not asked, it may not answer."""
    own = socket.gethostname().lower()
    names = {own, own.partition(".")[0], f"{own.partition('.')[0]}.local"}
    try:
        lines = etc_hosts.read_text(errors="replace").lower().splitlines()
    except OSError:
        lines = []
    entries = [line.partition("#")[0].split()[1:] for line in lines]
    return frozenset(names.union(*(entry for entry in entries if own in entry)))


def _plain(host: str) -> str:
    """Without its port and the dot at its end, in lower case."""
    name = host.lower()
    if not name.endswith("]"):
        head, colon, port = name.rpartition(":")
        name = head if colon and port.isdecimal() and (":" not in head or head.endswith("]")) else name.rstrip(":")
    return name.rstrip(".")
