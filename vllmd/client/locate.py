"""Which vllmd serves this program: one that was named, the system's, or the user's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

from vllmd.client.address import Address
from vllmd.errors import Forbidden

SYSTEM_SOCKET = "/run/vllmd/admin.sock"


def find(environment: Mapping[str, str] = os.environ) -> Address | None:
    """The first that listens; None where no vllmd runs. Raises Forbidden where one does that we may not ask.

    ``VLLMD_URL`` (with ``VLLMD_API_KEY``) comes first, then the admin sockets in the order of vllmctl.
    """
    if environment.get("VLLMD_URL"):
        return Address.of(environment["VLLMD_URL"])
    for path in _sockets(environment):
        if _listens(path):
            return Address.of(f"unix:{path}")
    return None


def _sockets(environment: Mapping[str, str]) -> Iterator[str]:
    if environment.get("VLLMD_ADMIN_SOCKET"):
        yield environment["VLLMD_ADMIN_SOCKET"]
        return
    yield SYSTEM_SOCKET
    runtime = environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    yield f"{runtime}/vllmd/admin.sock"


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except PermissionError:
            raise Forbidden(
                f"a vllmd serves this machine, but you may not open {path}: have yourself added to its group "
                "(vllmd-admin), "
                "or set VLLMD_URL and VLLMD_API_KEY to use it with a key that has the scope admin"
            ) from None
        except OSError:
            return False
    return True
