"""Who may what: keys, scopes, sockets."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vllmd.config.secrets import digest
from vllmd.config.types import AuthConfig, KeyConfig
from vllmd.daemon.keys import DenyAll, Keys, PeerCredentialAuth
from vllmd.daemon.listeners import anybody_can_connect, reachable_at
from vllmd.errors import Forbidden, Unauthorized, Unavailable, UnknownModel
from vllmd.proxy.http import Headers, Peer, Request

ALICE = KeyConfig("alice", digest("a-secret"))
BOSS = KeyConfig("boss", digest("b-secret"), scopes=("admin",))
CLIENT = Peer("127.0.0.1", 1)
NARROW = KeyConfig("narrow", digest("n-secret"), models=("short", "gone"))


def request(*fields: tuple[str, str], peer: Peer = CLIENT) -> Request:
    raw = [(name.encode(), value.encode()) for name, value in fields]
    return Request("GET", "/", "/", "", Headers(raw), peer)


def resolve(name: str) -> str:
    if name == "gone":
        raise UnknownModel("gone")
    return {"short": "org/long"}.get(name, name)


def keys(*which: KeyConfig, public: tuple[str, ...] = ("health", "metrics")) -> Keys:
    return Keys(AuthConfig(which, public), resolve)


@pytest.mark.parametrize(
    "field", [("authorization", "Bearer a-secret"), ("authorization", "bearer  a-secret"), ("x-api-key", "a-secret")]
)
def test_a_key_is_presented_as_openai_or_anthropic_clients_do(field: tuple[str, str]) -> None:
    """Both kinds of clients send theirs unchanged."""
    assert keys(ALICE).admit(request(field), "models") == "alice"


@pytest.mark.parametrize(
    "fields", [(), (("authorization", "Bearer wrong"),), (("authorization", "Basic a-secret"),), (("x-api-key", ""),)]
)
def test_no_key_and_a_wrong_one_are_401(fields: tuple[tuple[str, str], ...]) -> None:
    """And the answer does not tell how close it was."""
    with pytest.raises(Unauthorized):
        keys(ALICE).admit(request(*fields), "models")


def test_scopes_do_not_include_each_other() -> None:
    """A client's key administers nothing, an administrator's is not one for chatting unless it says so."""
    both = keys(ALICE, BOSS)
    with pytest.raises(Forbidden, match="opens models, not admin"):
        both.admit(request(("x-api-key", "a-secret")), "admin")
    with pytest.raises(Forbidden, match="opens admin, not models"):
        both.admit(request(("x-api-key", "b-secret")), "models")
    assert both.admit(request(("x-api-key", "b-secret")), "admin") == "boss"


def test_without_keys_models_are_open_and_administration_is_not() -> None:
    """Nobody becomes an operator by being able to reach a port."""
    assert keys().admit(request(), "models") == ""
    with pytest.raises(Unauthorized, match="admin socket"):
        keys().admit(request(), "admin")
    with pytest.raises(Unauthorized):
        keys().admit(request(peer=Peer(pid=1, uid=0, gid=0)), "admin")  # root, but by a socket for clients


def test_health_and_metrics_are_public_as_configured() -> None:
    """Any key opens them where they are not; being alive is no secret."""
    closed = keys(BOSS, public=("health",))
    assert closed.admit(request(), "health") == ""
    assert closed.admit(request(), "open") == ""
    with pytest.raises(Unauthorized):
        closed.admit(request(), "metrics")
    assert closed.admit(request(("x-api-key", "b-secret")), "metrics") == "boss"


def test_a_key_for_some_models_is_for_those_only() -> None:
    """Named by alias or by name; a name that is no model's opens nothing."""
    narrow = keys(ALICE, NARROW)
    assert narrow.may_use("narrow", "org/long")
    assert not narrow.may_use("narrow", "other")
    assert narrow.may_use("alice", "other")
    assert narrow.may_use("", "other")


def test_keys_are_replaced_by_a_reload() -> None:
    """The old one is worthless at once."""
    changing = keys(ALICE)
    changing.configure(AuthConfig((BOSS,)), resolve)
    with pytest.raises(Unauthorized):
        changing.admit(request(("x-api-key", "a-secret")), "models")


def test_a_key_of_any_bytes_is_compared_as_bytes() -> None:
    """Headers are bytes; a key in UTF-8 works, one that is not text is merely wrong."""
    umlaut = keys(KeyConfig("u", digest("schlüssel")))
    sent = Headers([(b"x-api-key", "schlüssel".encode())])
    assert umlaut.admit(Request("GET", "/", "/", "", sent), "models") == "u"
    with pytest.raises(Unauthorized):
        umlaut.admit(Request("GET", "/", "/", "", Headers([(b"x-api-key", b"\xff\xfe")])), "models")


def test_who_may_open_the_admin_socket_may_everything() -> None:
    """The file system has decided; only where it lets everybody in do we."""
    stranger, root = Peer(pid=1, uid=4711, gid=4711), Peer(pid=1, uid=0, gid=0)
    assert PeerCredentialAuth(anybody_can_connect=False).admit(request(peer=stranger), "admin") == ""
    lax = PeerCredentialAuth(anybody_can_connect=True)
    assert lax.admit(request(peer=root), "admin") == ""
    assert lax.admit(request(peer=stranger), "open") == ""
    for scope in ("admin", "models", "health"):  # it must not be a way around the keys either
        with pytest.raises(Forbidden):
            lax.admit(request(peer=stranger), scope)


def test_a_closed_door_says_why() -> None:
    """Whatever is asked."""
    with pytest.raises(Unavailable, match="no keys"):
        DenyAll("no keys").admit(request(), "open")


@pytest.mark.parametrize(
    ("family", "address", "reachable"),
    [
        (socket.AF_INET, "127.0.0.1", False),
        (socket.AF_INET, "127.9.9.9", False),
        (socket.AF_INET, "0.0.0.0", True),
        (socket.AF_INET6, "::1", False),
        (socket.AF_INET6, "::", True),
    ],
)
def test_an_address_beyond_loopback_is_told_by_the_socket_itself(
    family: socket.AddressFamily, address: str, reachable: bool
) -> None:
    """systemd's sockets are bound before the configuration is read. (Bound here, never listened on.)"""
    with socket.socket(family) as sock:
        sock.bind((address, 0))
        assert bool(reachable_at(sock)) is reachable


def test_the_admin_sockets_mode_tells_who_can_connect(tmp_path: Path) -> None:
    """0660 is the owner's and the group's, 0666 is everybody's; an abstract one has no mode."""
    with socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as abstract:
        sock.bind(str(tmp_path / "s"))
        (tmp_path / "s").chmod(0o660)
        assert not anybody_can_connect(sock)
        (tmp_path / "s").chmod(0o666)
        assert anybody_can_connect(sock)
        abstract.bind("\0vllmd-test")
        assert anybody_can_connect(abstract)
