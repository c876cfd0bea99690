"""Without keys, the name by which a server is called must be one that no page of a stranger can have."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vllmd.errors import Misdirected
from vllmd.proxy.hosts import Hosts, machine_names
from vllmd.proxy.http import Headers, Peer, Request

OURS = [
    *(
        "127.0.0.1",
        "127.0.0.1:33258",
        "[::1]:33258",
        "[::1]",
        "192.0.2.1:80",
        "localhost",
        "LOCALHOST:33258",
        "localhost.",
    ),
    *("vllmd.localhost:33258", "gpu1.example", "GPU1.example.:8000", "gpu1.example:"),
]
STRANGERS = [
    *("evil.example", "evil.example:33258", "127.0.0.1.evil.example", "localhost.evil.example", "notlocalhost"),
    *("127.0.0.1.nip.io:33258", "1.2.3.4.5", "gpu1.example.evil", "xgpu1.example", "[::1].evil.example", "0x7f.1"),
]


@pytest.mark.parametrize("host", OURS)
def test_addresses_localhost_and_configured_names_are_ours(host: str) -> None:
    """With a port or without, in any case."""
    assert Hosts(["gpu1.example"]).ours(host)


@pytest.mark.parametrize("host", STRANGERS)
def test_any_other_name_is_not(host: str) -> None:
    """A page may have it, and it may point here."""
    assert not Hosts(["gpu1.example"]).ours(host)


def test_the_machines_own_names_are() -> None:
    """As it calls itself, short or long, and over mDNS."""
    name = socket.gethostname()
    assert Hosts().ours(f"{name}:33258")
    assert Hosts().ours(f"{name.partition('.')[0]}.local")


def test_what_etc_hosts_calls_the_machine_is(tmp_path: Path) -> None:
    """Where its full name stands, as Debian writes it; names of other machines are not ours."""
    own = socket.gethostname()
    (tmp_path / "hosts").write_text(f"# x\n127.0.1.1 {own}.lab.example {own}\n192.0.2.9 other.example other\n")
    names = machine_names(tmp_path / "hosts")
    assert f"{own}.lab.example".lower() in names
    assert "other.example" not in names
    assert own.lower() in machine_names(tmp_path / "none")


def test_a_star_is_any() -> None:
    """For whoever has another guard before it."""
    assert Hosts(["*"]).ours("evil.example")


def request(host: str, peer: Peer) -> Request:
    return Request("GET", "/", "/", "", Headers([(b"host", host.encode())] if host else []), peer)


def test_a_strange_name_is_answered_421() -> None:
    """It says what would be right. A Unix socket has no names, and HTTP/1.0 needs none: no browser speaks it."""
    hosts = Hosts()
    with pytest.raises(Misdirected, match=r"not 'evil\.example'.*server\.hosts"):
        hosts.check(request("evil.example", Peer("127.0.0.1", 1)))
    hosts.check(request("evil.example", Peer(pid=1, uid=1, gid=1)))
    hosts.check(request("", Peer("127.0.0.1", 1)))
    for _ in range(2):  # remembered, until the configuration changes
        Hosts(["gpu1.example"]).check(request("gpu1.example", Peer("127.0.0.1", 1)))


def test_a_name_that_was_taken_out_is_strange_again() -> None:
    """What was found to be ours is forgotten with the configuration that said so."""
    hosts = Hosts(["gpu1.example"])
    hosts.check(request("gpu1.example", Peer("127.0.0.1", 1)))
    hosts.configure([])
    with pytest.raises(Misdirected):
        hosts.check(request("gpu1.example", Peer("127.0.0.1", 1)))
