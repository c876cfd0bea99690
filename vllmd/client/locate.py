"""Which vllmd serves this program: one named in the environment, the system's, or the user's own."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from vllmd.client.address import Address
from vllmd.errors import Forbidden

SYSTEM_SOCKET = "/run/vllmd/admin.sock"


def find(environment: Mapping[str, str] = os.environ) -> Address | None:
    """The first vllmd that listens, None without any. Raises Forbidden for one that this user may not connect to.

    ``VLLMD_URL`` (with ``VLLMD_API_KEY``) comes first, then the admin sockets in the order of vllmctl.
    """
    if environment.get("VLLMD_URL"):
        return Address.of(environment["VLLMD_URL"])
    runtime = environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    named = environment.get("VLLMD_ADMIN_SOCKET")
    for path in [named] if named else [SYSTEM_SOCKET, f"{runtime}/vllmd/admin.sock"]:
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
                continue
        return Address.of(f"unix:{path}")
    return None
