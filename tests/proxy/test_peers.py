"""Who listens where an engine should: somebody else never gets a byte."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.proxy.fakes import soon
from vllmd.engines.base import Listen
from vllmd.errors import UpstreamFailed
from vllmd.proxy import peers
from vllmd.proxy.peers import Impostor, Listener, listener, register_own_sockets
from vllmd.proxy.upstream import Unreached, connect

ME, OTHER = os.geteuid(), 12345
root = pytest.mark.skipif(ME != 0, reason="needs root: becomes another user")


@pytest.fixture(autouse=True)
def _none_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "_ours", set())


def tcp(owner: int = ME, host: str = "127.0.0.1") -> socket.socket:
    """A listener as that user would have it: its socket's inode is his."""
    made = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    if owner != ME:
        os.fchown(made.fileno(), owner, -1)
    return made


def unix(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    return made


def unix_of(path: Path, user: int) -> Iterator[None]:
    """Somebody else's process listens there, on a socket file that belongs to ``ME``."""
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    pid = os.fork()
    if pid == 0:
        os.setresuid(user, user, user)
        made.listen()  # SO_PEERCRED tells whoever did this
        os.kill(os.getpid(), 19)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    yield
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    made.close()


def outcome(listen: Listen) -> Any:
    """The connection, or why there is none."""

    async def attempt() -> Any:
        made = asyncio.Protocol()
        try:
            await soon(connect(listen, 5, lambda: made))
        except UpstreamFailed as error:
            return error
        return made

    return asyncio.run(attempt())


def was_let_in(listening: socket.socket) -> bool:
    """Whether a connection stands in its queue."""
    listening.setblocking(False)
    try:
        listening.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_the_kernel_tells_who_would_get_a_connection(host: str) -> None:
    """However the engine bound it: servers listen on all addresses, or on both families at once."""
    with tcp(host=host) as listening:
        port, expected = listening.getsockname()[1], Listener(ME, os.fstat(listening.fileno()).st_ino)
        assert listener(socket.AF_INET, "127.0.0.1", port) == (expected if host != "::" else None) or host == "::"
        assert peers.listener_from_proc("127.0.0.1", port) == expected
    assert listener(socket.AF_INET, "127.0.0.1", port) is None
    assert peers.listener_from_proc("127.0.0.1", port) is None


def test_the_engines_own_listener_is_used(tmp_path: Path) -> None:
    """On a port, and on a Unix socket of any length that the file system takes."""
    with tcp() as listening:
        assert isinstance(outcome(Listen(port=listening.getsockname()[1], owner=ME)), asyncio.Protocol)
        assert was_let_in(listening)
    with unix(tmp_path / "s") as listening:
        assert isinstance(outcome(Listen(uds=str(tmp_path / "s"), owner=ME)), asyncio.Protocol)
        assert was_let_in(listening)


@root
def test_another_users_listener_gets_nothing() -> None:
    """Whoever took the port first would get the prompts, and answer them in the model's name."""
    with tcp(OTHER) as listening:
        error = outcome(Listen(port=listening.getsockname()[1], owner=4242))
        assert isinstance(error, Impostor)
        assert f"{OTHER} listens on 127.0.0.1" in error.message
        assert not was_let_in(listening)  # not even a connection


@root
def test_roots_listener_may_be_a_containers() -> None:
    """Docker's proxy is root; whoever is root needs no port of ours."""
    with tcp() as listening:
        assert isinstance(outcome(Listen(port=listening.getsockname()[1], owner=OTHER)), asyncio.Protocol)


@root
def test_another_users_process_on_the_engines_socket_gets_nothing(tmp_path: Path) -> None:
    """The file says who made it, the kernel who listens."""
    for _ in unix_of(tmp_path / "s", OTHER):
        error = outcome(Listen(uds=str(tmp_path / "s"), owner=ME))
        assert isinstance(error, Impostor)
        assert f"{OTHER} listens on" in error.message


@root
def test_another_users_socket_file_is_not_connected_to(tmp_path: Path) -> None:
    """Nor one whose user is not known."""
    with unix(tmp_path / "s") as listening:
        os.chown(tmp_path / "s", OTHER, -1)
        for owner in (ME, -1):
            assert isinstance(outcome(Listen(uds=str(tmp_path / "s"), owner=owner)), Impostor)
        assert not was_let_in(listening)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """It led to the daemon's own admin socket: any client's request came back without a key, and again, and again."""
    with unix(tmp_path / "admin") as listening:
        (tmp_path / "s").symlink_to(tmp_path / "admin")
        error = outcome(Listen(uds=str(tmp_path / "s"), owner=ME))
        assert isinstance(error, Impostor)
        assert "a link" in error.message
        assert not was_let_in(listening)


def test_a_file_that_is_no_socket_is_told(tmp_path: Path) -> None:
    """Not opened: it may be a FIFO."""
    os.mkfifo(tmp_path / "s")
    assert stat.S_ISFIFO((tmp_path / "s").stat().st_mode)
    assert isinstance(outcome(Listen(uds=str(tmp_path / "s"), owner=ME)), Impostor)


def test_the_daemon_never_calls_itself(tmp_path: Path) -> None:
    """Not by another name for its socket either, nor where its engines are its own user's."""
    with tcp() as http, unix(tmp_path / "admin") as admin:
        register_own_sockets([http, admin])
        os.link(tmp_path / "admin", tmp_path / "s")
        assert "vllmd itself" in outcome(Listen(port=http.getsockname()[1], owner=ME)).message
        assert "of vllmd itself" in outcome(Listen(uds=str(tmp_path / "s"), owner=ME)).message
        assert not was_let_in(http)
        assert not was_let_in(admin)


def test_nobody_there_is_no_impostor(tmp_path: Path) -> None:
    """An engine that has not begun to listen: it is asked again."""
    with tcp() as listening:
        port = listening.getsockname()[1]
    assert isinstance(outcome(Listen(port=port, owner=ME)), Unreached)
    assert isinstance(outcome(Listen(uds=str(tmp_path / "none"), owner=ME)), Unreached)


def test_a_listener_that_changed_meanwhile_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took the connection has gone, and the engine came: it must not vouch for him. It is tried again."""
    with tcp() as listening:
        told = iter([Listener(ME, 1), Listener(ME, 2)])
        monkeypatch.setattr(peers, "listener", lambda *where: next(told))
        assert isinstance(outcome(Listen(port=listening.getsockname()[1], owner=ME)), Unreached)


def test_without_sock_diag_the_kernels_list_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have no such module, nor be allowed to ask."""
    monkeypatch.setattr(peers, "listener", lambda *where: None)
    with tcp() as listening:
        assert isinstance(outcome(Listen(port=listening.getsockname()[1], owner=ME)), asyncio.Protocol)
    with tcp() as listening:
        monkeypatch.setattr(peers, "listener_from_proc", lambda *where: Listener(OTHER, 1))
        assert isinstance(outcome(Listen(port=listening.getsockname()[1], owner=4242)), Impostor)


def test_a_server_elsewhere_is_nobodys_to_check() -> None:
    """A remote engine has no owner on this machine."""
    with tcp() as listening:
        assert isinstance(outcome(Listen(port=listening.getsockname()[1])), asyncio.Protocol)


def test_peer_credentials_are_read_as_the_kernel_writes_them() -> None:
    """struct ucred: pid, uid, gid."""
    one, _two = socket.socketpair()
    assert struct.unpack("iII", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] == ME
