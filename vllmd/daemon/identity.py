"""The user that vllmd runs as when it is started by hand.

Its engines, which run whatever code a model brings along, are its children there
and run as the same user. Root is asked to name another user (``--user``), and
warned where it does not.
"""

from __future__ import annotations

import logging
import os
import pwd
from collections.abc import MutableMapping

from vllmd.config.types import Config

log = logging.getLogger("vllmd")


def given(config: Config) -> tuple[int, int] | None:
    """User and group to become; None to stay. Raises OSError if there is no such user, or only root could become it."""
    entry = _entry(config)
    return (entry.pw_uid, entry.pw_gid) if entry else None


def become(config: Config, environment: MutableMapping[str, str], *, activated: bool) -> None:
    """Become the user that the configuration names, for good. ``environment`` then names that user's home.

    Raises OSError as ``given`` does, or where the kernel refuses.
    """
    entry = _entry(config)
    if entry is None:
        if os.geteuid() == 0 and not activated and "VLLMD_LAUNCHER" not in environment:
            log.warning(
                "running as root: engines, and whatever code comes with their models, run as root as well; "
                "--user NAME lets all of it run as somebody else"
            )
        return
    os.setgroups(os.getgrouplist(entry.pw_name, entry.pw_gid))
    os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
    os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
    environment.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)
    for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    log.info("running as %s, and engines as well", entry.pw_name)
    for path in config.files:
        if not os.access(path, os.R_OK):
            log.warning("%s may not read %s: a reload will fail", entry.pw_name, path)


def _entry(config: Config) -> pwd.struct_passwd | None:
    if not config.server.user:
        return None
    try:
        entry = pwd.getpwnam(config.server.user)
    except KeyError:
        raise OSError("there is no such user") from None
    if os.geteuid() == entry.pw_uid:
        return None
    if os.geteuid() != 0:
        raise OSError("only root can become somebody else")
    return entry
