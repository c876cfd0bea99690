"""Who may what: keys, scopes, sockets."""

from __future__ import annotations

import base64
import socket
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vllmd.config.secrets import digest
from vllmd.config.types import AuthConfig, Config, KeyConfig, ServerConfig, TlsConfig
from vllmd.daemon.keys import ApiKeyAuth, DenyAll, PeerCredentialAuth
from vllmd.daemon.listeners import anybody_can_connect
from vllmd.daemon.logins import FailedLogins
from vllmd.daemon.public_listeners import PublicListeners, public_address
from vllmd.errors import Forbidden, Misdirected, TooManyRequests, Unauthorized, Unavailable, UnknownModel, VllmdError
from vllmd.proxy.access import Caller, Reach, authorise
from vllmd.proxy.http import Headers, Peer, Request

ALICE = KeyConfig("alice", digest("a-secret"))
BOSS = KeyConfig("boss", digest("b-secret"), scopes=("admin",))
CLIENT = Peer("127.0.0.1", 1)
NARROW = KeyConfig("narrow", digest("n-secret"), models=("short", "gone"))


def request(*fields: tuple[str, str], peer: Peer = CLIENT) -> Request:
    raw = [(name.encode(), value.encode()) for name, value in fields]
    return Request("GET", "/", "/", "", Headers(raw), peer)


def opens(name: str) -> tuple[str, ...]:
    if name == "gone":
        raise UnknownModel("gone")
    return ({"short": "org/long"}.get(name, name),)


def keys(*which: KeyConfig, public: tuple[str, ...] = ("health", "metrics")) -> ApiKeyAuth:
    return ApiKeyAuth(AuthConfig(which, public), opens)


def basic(credentials: str) -> str:
    """An Authorization field as browsers write it."""
    return "Basic " + base64.b64encode(credentials.encode()).decode()


def may(found: Caller, scope: str, reach: Reach = Reach.ONE) -> str:
    """What the caller is called. Raises what it is told if it may not."""
    authorise(found, scope, reach)
    return found.name


@pytest.mark.parametrize(
    "fields",
    [
        (("authorization", "Bearer a-secret"),),
        (("authorization", "bearer  a-secret"),),
        (("authorization", "BEARER a-secret "),),
        (("authorization", basic("me:a-secret")),),
        (("authorization", basic("a-secret:")),),
        (("x-api-key", "a-secret"),),
        (("api-key", "a-secret"),),
        (("authorization", "Bearer "), ("x-api-key", "a-secret")),
        (("authorization", "Bearer none"), ("api-key", "a-secret")),
        (("x-api-key", ""), ("authorization", "Bearer a-secret")),
        (("authorization", "Basic ?"), ("x-api-key", "a-secret")),
        (("authorization", "Bearer\ta-secret"),),
        (("authorization", "a-secret"),),
        (("authorization", "Bearer Bearer a-secret"),),
        (("authorization", "Bearer: a-secret"),),
        (("authorization", 'Bearer "a-secret"'),),
        (("x-api-key", "Bearer a-secret"),),
        (("authorization", basic("me:a-secret").rstrip("=")),),
        (("authorization", ""), ("authorization", "Bearer a-secret")),
        (("authorization", "Bearer wrong"), ("authorization", "Bearer a-secret")),
        (("x-api-key", ""), ("x-api-key", "a-secret")),
        (("authorization", "Negotiate a b"), ("api-key", "a-secret")),
        (("x-api-key", "wrong"), ("api-key", "a-secret")),
    ],
)
def test_a_key_is_found_wherever_clients_put_it(fields: tuple[tuple[str, str], ...]) -> None:
    """Nobody has to configure a client for us; and an empty or wrong one hides no good one."""
    assert may(keys(ALICE).identify(request(*fields)), "models") == "alice"


@pytest.mark.parametrize("more", [(), (("x-api-key", "junk"),), (("api-key", "none"),), (("authorization", "x y"),)])
def test_a_password_is_no_operators_whatever_comes_along(more: tuple[tuple[str, str], ...]) -> None:
    """A browser adds it by itself to what an engine's page asks for, and the page may add fields of its own."""
    found = keys(BOSS).identify(request(("authorization", basic("me:b-secret")), *more))
    with pytest.raises(Forbidden, match="as Bearer"):
        may(found, "admin")


def test_a_web_sockets_key_is_a_sub_protocol() -> None:
    """A browser's WebSocket can send no other field; without an upgrade it is none."""
    sent = request(("sec-websocket-protocol", "realtime, openai-insecure-api-key.a-secret"))
    with pytest.raises(Unauthorized):
        may(keys(ALICE).identify(sent), "models")
    sent.upgrade = "websocket"
    assert may(keys(ALICE).identify(sent), "models") == "alice"


def test_every_guess_in_a_request_is_counted() -> None:
    """Four places are no four tries for the price of one."""
    both = keys(ALICE)
    guesses = (("authorization", "Bearer g1"), ("x-api-key", "g2"), ("api-key", "g3"))
    for _ in range(7):
        both.identify(request(*guesses))
    with pytest.raises(TooManyRequests):
        may(both.identify(request(("x-api-key", "g9"))), "models")


@pytest.mark.parametrize(
    "fields", [(), (("authorization", "Bearer wrong"),), (("authorization", "Basic a-secret"),), (("x-api-key", ""),)]
)
def test_no_key_and_a_wrong_one_are_401(fields: tuple[tuple[str, str], ...]) -> None:
    """And the answer does not tell how close it was."""
    with pytest.raises(Unauthorized):
        may(keys(ALICE).identify(request(*fields)), "models")


def test_scopes_do_not_include_each_other() -> None:
    """A client's key administers nothing, an administrator's is not one for chatting unless it says so."""
    both = keys(ALICE, BOSS)
    alice, boss = both.identify(request(("x-api-key", "a-secret"))), both.identify(request(("x-api-key", "b-secret")))
    with pytest.raises(Forbidden, match="has the scope models; this needs the scope admin"):
        may(alice, "admin")
    with pytest.raises(Forbidden, match="has the scopes read and admin; this needs the scope models"):
        may(boss, "models")
    assert may(boss, "admin") == may(boss, "read") == "boss"


def test_a_key_that_reads_changes_nothing() -> None:
    """For a board or a colleague who looks on."""
    reader = keys(KeyConfig("r", digest("r-secret"), scopes=("read",))).identify(request(("x-api-key", "r-secret")))
    assert may(reader, "read", Reach.MACHINE) == may(reader, "metrics") == "r"
    for scope in ("models", "admin"):
        with pytest.raises(Forbidden, match=f"has the scope read; this needs the scope {scope}"):
            may(reader, scope)


def test_without_keys_models_are_open_and_administration_is_not() -> None:
    """Nobody becomes an operator by being able to reach a port."""
    assert may(keys().identify(request()), "models") == ""
    for scope in ("read", "admin"):
        with pytest.raises(Unauthorized, match="admin socket"):
            may(keys().identify(request()), scope)
        with pytest.raises(Unauthorized):  # root, but by a socket for clients
            may(keys().identify(request(peer=Peer(pid=1, uid=0, gid=0))), scope)


def test_health_and_metrics_are_public_as_configured() -> None:
    """Any key opens them where they are not; being alive is no secret."""
    closed = keys(BOSS, public=("health",))
    stranger = closed.identify(request())
    assert may(stranger, "health") == may(stranger, "open") == ""
    with pytest.raises(Unauthorized):
        may(stranger, "metrics")
    assert may(closed.identify(request(("x-api-key", "b-secret"))), "metrics") == "boss"


def test_names_are_public_where_that_is_configured() -> None:
    """For a board without a key; it opens no model."""
    stranger = keys(BOSS, public=("metrics", "names")).identify(request())
    assert stranger.may_use("any")
    assert not stranger.may_see_key("boss")
    for scope in ("models", "health"):
        with pytest.raises(Unauthorized):
            may(stranger, scope)


def test_a_key_for_some_models_is_for_those_only() -> None:
    """Named by alias or by name; a name that is no model's opens nothing, nor does what concerns them all."""
    both = keys(ALICE, NARROW)
    narrow, alice = both.identify(request(("x-api-key", "n-secret"))), both.identify(request(("x-api-key", "a-secret")))
    assert narrow.may_use("org/long")
    assert not narrow.may_use("other")
    assert alice.may_use("other")
    assert not both.identify(request()).may_use("other")
    assert keys().identify(request()).may_use("other")
    with pytest.raises(Forbidden, match="may not use the model 'short-of-it'"):
        narrow.check("other", "short-of-it")
    with pytest.raises(Forbidden, match="for gone, org/long only"):
        may(narrow, "models", Reach.MACHINE)


def test_keys_are_replaced_by_a_reload() -> None:
    """The old one is worthless at once."""
    changing = keys(ALICE)
    changing.configure(AuthConfig((BOSS,)), opens)
    with pytest.raises(Unauthorized):
        may(changing.identify(request(("x-api-key", "a-secret"))), "models")


def test_what_was_found_of_a_connection_ends_with_the_configuration() -> None:
    """The same fields are looked at once, however often they come; after a reload they are looked at again."""
    changing = keys(ALICE)
    same = request(("x-api-key", "a-secret"))
    assert changing.identify(same) is changing.identify(same)
    assert changing.identify(Request("GET", "/", "/", "", same.headers.with_length(5), CLIENT)).name == "alice"
    changing.configure(AuthConfig((BOSS,)), opens)
    with pytest.raises(Unauthorized):
        may(changing.identify(same), "models")
    open_to_all = keys()
    named = request(("host", "gpu1.example"))
    open_to_all.hosts.configure(["gpu1.example"])
    open_to_all.configure(AuthConfig(), opens)
    open_to_all.identify(named)
    open_to_all.hosts.configure([])
    open_to_all.configure(AuthConfig(), opens)
    with pytest.raises(Misdirected):
        open_to_all.identify(named)


def test_a_wrong_key_counts_each_time_it_comes_on_a_connection() -> None:
    """Guesses are not remembered as answered."""
    guesser = Guesser()
    same = request(("x-api-key", "wrong"), peer=Peer("192.0.2.7", 1))
    for _ in range(3):
        guesser.keys.identify(same)
    assert guesser.counted == {"wrong": 3}


def test_a_key_of_any_bytes_is_compared_as_bytes() -> None:
    """Headers are bytes; a key in UTF-8 works, one that is not text is merely wrong."""
    umlaut = keys(KeyConfig("u", digest("schlüssel")))
    sent = Headers([(b"x-api-key", "schlüssel".encode())])
    assert may(umlaut.identify(Request("GET", "/", "/", "", sent)), "models") == "u"
    with pytest.raises(Unauthorized):
        may(umlaut.identify(Request("GET", "/", "/", "", Headers([(b"x-api-key", b"\xff\xfe")]))), "models")


def test_who_may_open_the_admin_socket_may_everything() -> None:
    """The file system has decided; only where it lets everybody in do we."""
    stranger, root = request(peer=Peer(pid=1, uid=4711, gid=4711)), request(peer=Peer(pid=1, uid=0, gid=0))
    assert may(PeerCredentialAuth(anybody_can_connect=False).identify(stranger), "admin") == ""
    lax = PeerCredentialAuth(anybody_can_connect=True)
    assert may(lax.identify(root), "admin") == ""
    assert may(lax.identify(stranger), "open") == ""
    for scope in ("admin", "read", "models", "health"):  # it must not be a way around the keys either
        with pytest.raises(Forbidden):
            may(lax.identify(stranger), scope)


def test_the_read_only_socket_shows_and_changes_nothing() -> None:
    """Its group looks on: no model is used or moved by it."""
    onlooker = PeerCredentialAuth(anybody_can_connect=False, read_only=True).identify(request(peer=Peer(uid=1)))
    for scope in ("open", "health", "metrics", "read"):
        assert may(onlooker, scope, Reach.MACHINE) == ""
    for scope in ("models", "admin"):
        with pytest.raises(Forbidden, match="for looking only"):
            may(onlooker, scope)


def test_a_closed_door_says_why() -> None:
    """Whatever is asked."""
    with pytest.raises(Unavailable, match="no keys"):
        DenyAll("no keys").identify(request())


def test_it_is_closed_even_where_the_certificate_cannot_be_read() -> None:
    """A reload takes the keys away, and the key of the certificate is gone meanwhile."""
    router: Any = SimpleNamespace(authenticator=keys())
    public = PublicListeners(keys())
    public.add(router, cast(Any, SimpleNamespace(tls=None)), ("192.0.2.1:1",))
    tls = TlsConfig(Path("/nowhere/cert.pem"), Path("/nowhere/key.pem"))
    with pytest.raises(ValueError, match="cannot be read"):
        public.configure(Config(server=ServerConfig(tls=tls)))
    with pytest.raises(Unavailable, match="without keys"):
        router.authenticator.identify(request())


# -- wrong keys


class Clock:
    """Stands still until it is told not to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Guesser:
    """A server with Alice's key; tries keys from an address, and says what became of each."""

    def __init__(self) -> None:
        self.clock, self.counted = Clock(), Counter[str]()
        self.failures = FailedLogins(self.clock, lambda how: self.counted.update([how]))
        self.keys = ApiKeyAuth(AuthConfig((ALICE,)), opens, None, self.failures)

    def tries(self, key: str, address: str = "192.0.2.7") -> int:
        """The HTTP status of a request with it."""
        found = self.keys.identify(request(("x-api-key", key), peer=Peer(address, 1)))
        try:
            may(found, "models")
        except VllmdError as error:
            return error.status
        return 200

    def gives_up(self, address: str = "192.0.2.7") -> None:
        """Try until nothing is looked at any more."""
        assert [self.tries("wrong", address) for _ in range(22)] == [401] * 20 + [429] * 2


def test_whoever_guesses_gets_one_try_per_second() -> None:
    """Beyond the first twenty; a right key among those that are not looked at does not show either."""
    guesser = Guesser()
    guesser.gives_up()
    assert guesser.tries("a-secret") == 429
    with pytest.raises(TooManyRequests) as told:
        may(guesser.keys.identify(request(("x-api-key", "a-secret"), peer=Peer("192.0.2.7", 1))), "models")
    assert told.value.retry_after == 1
    guesser.clock.now += 1
    assert [guesser.tries("wrong"), guesser.tries("a-secret")] == [401, 429]
    guesser.clock.now += 1
    assert guesser.tries("a-secret") == 200
    assert guesser.counted == {"wrong": 21, "unseen": 5}


def test_guessing_does_not_lock_others_out() -> None:
    """Neither who comes from elsewhere, nor whose key has opened something from there before: all users of a machine
    come from 127.0.0.1."""
    guesser = Guesser()
    assert guesser.tries("a-secret") == 200
    guesser.gives_up()
    assert guesser.tries("a-secret") == 200
    assert guesser.tries("a-secret", "192.0.2.8") == 200


def test_a_key_that_a_reload_took_away_is_a_wrong_one_again() -> None:
    """Or its owner could go on guessing at full speed."""
    guesser = Guesser()
    assert guesser.tries("a-secret") == 200
    guesser.keys.configure(AuthConfig((BOSS,)), opens)
    assert [guesser.tries("a-secret") for _ in range(21)] == [401] * 20 + [429]


def test_a_network_of_ipv6_counts_as_one_address() -> None:
    """Every host there has more addresses than could be counted."""
    guesser = Guesser()
    for host in range(20):
        guesser.tries("wrong", f"2001:db8::{host:x}")
    assert guesser.tries("wrong", "2001:db8::ffff") == 429
    assert guesser.tries("wrong", "2001:db8:1::1") == 401
    assert guesser.tries("wrong", "::1") == 401


def test_wrong_keys_are_logged_with_their_address_less_and_less_often(caplog: pytest.LogCaptureFixture) -> None:
    """One line is worth reading, a thousand fill the disk."""
    guesser = Guesser()
    for _ in range(100):
        guesser.clock.now += 1
        guesser.tries("wrong")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "a wrong API key from 192.0.2.7"
    assert lines[-1] == "100 wrong API keys from 192.0.2.7"
    assert len(lines) == 9 + 9 + 1


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
        assert bool(public_address(sock)) is reachable


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
