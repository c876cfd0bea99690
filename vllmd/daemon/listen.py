"""Sockets of our own, where systemd gives none: ``vllmd serve`` at a terminal."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllmd.text import printable

log = logging.getLogger("vllmd")

BACKLOG = 4096
IP_FREEBIND = 15  # linux/in.h; allowed to everybody, and has effect on IPv6 as well
Listeners = dict[str, list[socket.socket]]


@contextlib.contextmanager
def listeners(
    addresses: tuple[str, ...], environment: Mapping[str, str], owner: tuple[int, int] | None = None
) -> Iterator[Listeners]:
    """Listen: ``http`` at the addresses (``host:port``, ``[v6]:port`` or a path), ``admin`` where vllmctl looks for it.

    ``owner``: user and group that get the admin socket, and its folder if that is made here.
    Raises OSError if an address cannot be had. Without an admin socket (another
    daemon has it, or there is no place for it) everything works but vllmctl.
    """
    own = {"http": _all_that_can_be_had(addresses)}
    path = admin_path(environment)
    admin = _admin(path, owner)
    try:
        yield {**own, "admin": [admin]} if admin else own
    finally:
        if admin:
            with contextlib.suppress(PermissionError):  # the folder is root's, and this process is root no more
                path.unlink(missing_ok=True)


def _all_that_can_be_had(addresses: tuple[str, ...]) -> list[socket.socket]:
    """Raises OSError, which names the address. IPv6's loopback alone may be missing beside others: some have none."""
    opened: list[socket.socket] = []
    for address in addresses:
        try:
            opened.append(_listen(_on_the_same_port(address, opened)))
        except OSError as error:
            missing = address.startswith("[::1]:") and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if not missing or len(addresses) == 1:
                for listener in opened:
                    listener.close()
                raise OSError(error.errno, f"{address}: {_why(address, error)}") from None
            log.info("not listening on %s: this machine has no IPv6", address)
    return opened


def _why(address: str, error: OSError) -> str:
    """What is wrong with the address, and what to do."""
    if error.errno == errno.EADDRINUSE and not address.startswith("/"):
        return f"{os.strerror(errno.EADDRINUSE)}: {holder(*_parts(address))} listens there; --port takes another one"
    return os.strerror(error.errno or 0)


def holder(host: str, port: int) -> str:
    """The process that listens on an address, and its user, as far as we may know."""
    from vllmd.proxy.peers import listener_of, user_named  # for messages only

    listener = listener_of(host, port)
    if listener is None:
        return "another process"
    for entry in Path("/proc").glob("[0-9]*/fd/*"):  # those of others only root sees
        with contextlib.suppress(OSError):
            if os.readlink(entry) == f"socket:[{listener.inode}]":
                pid = entry.parts[2]
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                return f"{printable(name)} (process {pid}, user {user_named(listener.uid)})"
    return f"a process of the user {user_named(listener.uid)}"


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _on_the_same_port(address: str, opened: Sequence[socket.socket]) -> str:
    """An address whose port is free to choose gets the port that was chosen for the first one."""
    chosen = next((each.getsockname()[1] for each in opened if each.family != socket.AF_UNIX), 0)
    host, _, port = address.rpartition(":")
    return f"{host}:{chosen}" if port == "0" and chosen else address


def in_words(listeners: Mapping[str, Sequence[socket.socket]]) -> str:
    """The addresses, as people write them: ``http://127.0.0.1:33258 and http://[::1]:33258``."""
    places = []
    for name, sockets in listeners.items():
        for listener in sockets:
            if listener.family not in (socket.AF_INET, socket.AF_INET6):
                places.append(f"{listener.getsockname() or '(no name)'} ({name})")
                continue
            host, port = listener.getsockname()[:2]
            places.append(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    return " and ".join([", ".join(places[:-1]), *places[-1:]] if len(places) > 1 else places)


def admin_path(environment: Mapping[str, str]) -> Path:
    """The first place at which vllmctl looks."""
    given = environment.get("VLLMD_ADMIN_SOCKET")
    runtime = environment.get("XDG_RUNTIME_DIR") or ("/run" if os.geteuid() == 0 else f"/run/user/{os.getuid()}")
    return Path(given) if given else Path(runtime) / "vllmd" / "admin.sock"


def _admin(path: Path, owner: tuple[int, int] | None) -> socket.socket | None:
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if owner:
                os.chown(path.parent, *owner)
        if _alive(path):
            raise OSError("another vllmd listens there")
        path.unlink(missing_ok=True)
        before = os.umask(0o077)
        try:
            listener = _listen(str(path))
        finally:
            os.umask(before)
        if owner:
            os.chown(path, *owner, follow_symlinks=False)
        return listener
    except OSError as error:
        advice = "vllmctl will not reach this vllmd; VLLMD_ADMIN_SOCKET names another place, to both"
        log.warning("no admin socket at %s: %s: %s", path, error.strerror or error, advice)
        return None


def _alive(path: Path) -> bool:
    """Whether a process listens on the socket, or the file is only left over."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _listen(address: str) -> socket.socket:
    if address.startswith("/"):
        return socket.create_server(address, family=socket.AF_UNIX, backlog=BACKLOG)
    place, family = _parts(address), socket.AF_INET6 if address.startswith("[") else socket.AF_INET
    try:
        listener = socket.create_server(place, family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL or address.startswith("[::1]:"):
            raise
        listener = _listen_early(place, family)
        log.warning("%s is no address of this machine now; listening there in case it becomes one", place[0])
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _listen_early(place: tuple[str, int], family: socket.AddressFamily) -> socket.socket:
    """As FreeBind= of a socket unit: at boot, or with a VPN, an address may come later than we do."""
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
