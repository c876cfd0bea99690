"""Check which process listens at an engine's address, by the kernel, before a byte is sent.

A request carries a client's prompt, and the answer is taken for the model's. So a connection to an engine is used only
if a process of the engine's user (``Address.owner``) listens at its other end:

- **Unix sockets.** The file is opened as a handle (``O_PATH``), checked, and connected to through that handle, so that
  no link is followed and the file cannot be replaced in between. It must belong to the engine's user, and so must the
  listening process (``SO_PEERCRED``).
- **TCP.** The kernel is asked for the listener of the port (``sock_diag``, by its own rule which of several listeners
  gets a connection) before and after connecting. If it is the same socket both times, it has this connection. It must
  belong to the engine's user or to root, as Docker's proxy does.

An engine must never make the daemon call itself, neither where both run as one user nor by a second name for the
daemon's own socket: ``register_own_sockets`` notes those. Between processes of one user nothing more is checked: each
of them can do anything to an engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllmd.credentials import credentials
from vllmd.errors import OUT_OF_FILES, UpstreamFailed

if TYPE_CHECKING:
    from vllmd.proxy.gate import Address

NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _NLMSG_ERROR, _NLM_F_REQUEST = 20, 2, 1
_LISTEN = 10  # TCP_LISTEN
_ANY = 0xFFF  # whatever state it is in
_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBBI")  # inet_diag_req_v2 up to its id: family, protocol, extensions, padding, states
_UID_INODE = 4 + 48 + 3 * 4  # in inet_diag_msg: after four bytes, the id, and three numbers
NOBODY = 0xFFFFFFFF


class Impostor(UpstreamFailed):
    """A process of another user listens at the engine's address."""


class Listener(NamedTuple):
    """A TCP socket: its owner's user id, and its inode, which no other socket ever has; 0 if no process has it open."""

    uid: int
    inode: int


_ours: set[tuple[int, int]] = set()  # (device, inode) of files; (0, inode) of TCP sockets


def register_own_sockets(sockets: Iterable[socket.socket]) -> None:
    """Note the daemon's own listening sockets: no engine is ever there."""
    for each in sockets:
        if each.family != socket.AF_UNIX:
            _ours.add((0, os.fstat(each.fileno()).st_ino))
        elif (name := each.getsockname()) and isinstance(name, str):
            try:
                found = os.stat(name)
            except OSError:
                continue
            _ours.add((found.st_dev, found.st_ino))


async def connected(address: Address) -> socket.socket:
    """Connect to a process of the user ``address.owner``. Raises Impostor, OSError."""
    if address.uds:
        return await _unix(address.uds, _owner(address))
    found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for family, _, _, _, place in found[:-1]:
        try:
            return await _tcp(socket.AddressFamily(family), place, _owner(address))
        except OSError:
            continue
    return await _tcp(socket.AddressFamily(found[-1][0]), found[-1][4], _owner(address))


def _owner(address: Address) -> int:
    return -1 if address.owner is None else address.owner


async def _unix(path: str, owner: int) -> socket.socket:
    handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if not stat.S_ISSOCK(found.st_mode):
            raise Impostor(f"{path} is no socket{' but a link' * stat.S_ISLNK(found.st_mode)}; it is not followed")
        if (found.st_dev, found.st_ino) in _ours:
            raise Impostor(f"{path} is a socket of vllmd itself")
        if found.st_uid != owner:
            whose = user_named(found.st_uid)
            raise Impostor(f"{path} belongs to {whose}, not to the engine's user {user_named(owner)}")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, f"/proc/self/fd/{handle}")
            uid = credentials(sock).uid
            if uid == NOBODY:  # the listener's queue is full: sock_connect returns without a connection then
                raise BlockingIOError(errno.EAGAIN, "its queue of connections is full")
            if uid != owner:
                raise Impostor(f"{user_named(uid)} listens on {path}, not the engine's user {user_named(owner)}")
        except BaseException:
            sock.close()
            raise
    finally:
        os.close(handle)
    return sock


async def _tcp(family: socket.AddressFamily, place: tuple[object, ...], owner: int) -> socket.socket:
    host, port = str(place[0]), int(str(place[1]))
    before = listener(family, host, port)
    if before:
        _check(before, owner, host, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, place)
        after = listener(family, host, port)
        if after is None and before is None:  # no sock_diag here: the kernel's list is long, and reading it is slow
            before = after = await asyncio.to_thread(listener_from_proc, host, port)
        if after is None or after != before:  # an engine that has just begun or ended to listen: nothing was sent
            raise ConnectionAbortedError(errno.ECONNABORTED, "who listens there changed while a connection was made")
        _check(after, owner, host, port)
    except BaseException:
        sock.close()
        raise
    return sock


def _check(found: Listener, owner: int, host: str, port: int) -> None:
    if (0, found.inode) in _ours:
        raise Impostor(f"vllmd itself listens on {host}:{port}")
    if found.uid not in (owner, 0):
        raise Impostor(f"{user_named(found.uid)} listens on {host}:{port}, not the engine's user {user_named(owner)}")


def listener_of(host: str, port: int) -> Listener | None:
    """The process that listens on a TCP address, for messages; None if there is none, or if that is unknown."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError):
        return listener(family, host, port) or listener_from_proc(host, port)
    return None


def user_named(uid: int) -> str:
    """A user's name with its id, for messages."""
    import pwd  # for messages only

    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except (KeyError, OverflowError):
        return str(uid) if uid >= 0 else "(not known)"


@functools.cache
def _diag_socket() -> socket.socket:
    """The socket for queries to the kernel, one after the other. Raises OSError where that is not allowed."""
    kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
    kernel.setblocking(False)
    return kernel


def listener(family: socket.AddressFamily, host: str, port: int) -> Listener | None:
    """The socket that would get a connection to a TCP address now; None if there is none, or if the kernel cannot be
    asked.
    """
    if family == socket.AF_INET6:
        packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    else:
        packed = socket.inet_aton(host).ljust(16, b"\0")
    # The query is for the server's end of a connection from address and port 0. There is none, so the kernel finds the
    # listener that would get it.
    return _query(family, 1 << _LISTEN, struct.pack("!HH", port, 0) + packed + bytes(16))


def is_held(peer: tuple[str, int], ours: tuple[str, int]) -> bool | None:
    """Whether a process has the other end of a TCP connection open; None if that is not on this machine, or not known.

    ``peer``, ``ours``: the addresses of its two ends.
    """
    hosts = [host.partition("%")[0].removeprefix("::ffff:") for host, _ in (peer, ours)]
    family = socket.AF_INET6 if ":" in hosts[0] else socket.AF_INET
    place = struct.pack("!HH", peer[1], ours[1])
    place += b"".join(socket.inet_pton(family, host).ljust(16, b"\0") for host in hosts)
    found = _query(family, _ANY, place)
    return None if found is None else found.inode != 0


def _query(family: socket.AddressFamily, states: int, place: bytes) -> Listener | None:
    """The TCP socket with these ports and addresses; None if there is none, or the kernel cannot be asked."""
    body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, states) + place + bytes(4) + b"\xff" * 8
    try:
        kernel = _diag_socket()
        kernel.send(_HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0) + body)
        answer = kernel.recv(8192)  # at once: the kernel answers within ``send``
    except OSError:
        _diag_socket.cache_clear()  # an answer that comes late must not be taken for that of the next query
        return None
    _, kind, *_ = _HEADER.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        return None
    return Listener(*struct.unpack_from("=II", answer, _HEADER.size + _UID_INODE))


def listener_from_proc(host: str, port: int) -> Listener | None:
    """As ``listener``, for a kernel without sock_diag: read the list of all TCP sockets in /proc/net.

    Raises OSError if this process has no file descriptor left to read it.
    """
    places = [_hex(host), *(_hex("0.0.0.0") if ":" not in host else "", "0" * 32)]
    found: dict[str, Listener] = {}
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError as error:
            if error.errno in OUT_OF_FILES:  # who listens is not known then, which is not that somebody else does
                raise
            continue
        for line in lines:
            fields = line.split()
            place, _, number = fields[1].partition(":")
            if int(number, 16) == port and int(fields[3], 16) == _LISTEN:
                found.setdefault(place, Listener(int(fields[7]), int(fields[9])))
    return next((found[place] for place in places if place in found), None)


def _hex(host: str) -> str:
    """An address as /proc/net writes it: 32-bit words in the machine's order."""
    packed = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))
