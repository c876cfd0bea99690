"""The configuration as the system's daemon will read it: root, who checks it, may read files that the daemon may not.

A key, a certificate or a token in such a file has the daemon refuse all of the configuration.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllmd.config.findings import Problem
from vllmd.config.loader import read

USER, GROUPS = "vllmd", ("vllmd-engine", "vllmd-sockets", "vllmd-admin")  # as units/vllmd.service says
SERVICE, SYSTEMD_SECONDS = "vllmd.service", 5.0
CREDENTIAL = re.compile(r"^[ \t]*(Load|Set|Import)Credential(Encrypted)?[ \t]*=[ \t]*\S", re.MULTILINE)


def problems_of_daemon(config_file: str | Path | None, env: Mapping[str, str], user: str = USER) -> Sequence[Problem]:
    """What keeps the daemon from reading a configuration that we could read.

    Nothing where we are not root, or where a file is named: it may be a draft that is to be moved. Nothing either
    where systemd hands the daemon credentials (systemd.exec(5)): such a file is read by systemd, as root.
    """
    if config_file or env.get("VLLMD_CONFIG") or os.geteuid() != 0:
        return ()
    try:
        account = pwd.getpwnam(user)
    except KeyError:  # it is not installed as a system's service
        return ()
    if _gets_credentials():
        return ()
    with _rights_of(account) as taken:
        return [problem for problem in read(env=env).problems if not problem.unfit] if taken else ()


@contextlib.contextmanager
def _rights_of(account: pwd.struct_passwd) -> Iterator[bool]:
    """Within this we have the rights of that user, who is in the daemon's groups as well.

    False: we may not take them, as root of a container without these capabilities; nobody knows then what it may read.
    """
    groups, gid, home, taken = os.getgroups(), os.getegid(), os.environ.get("HOME"), False
    try:
        with contextlib.suppress(OSError):
            os.setgroups([*os.getgrouplist(account.pw_name, account.pw_gid), *_numbers_of(GROUPS)])
            os.setegid(account.pw_gid)
            os.seteuid(account.pw_uid)
            os.environ["HOME"] = account.pw_dir  # what ``~`` is
            taken = True
        yield taken
    finally:
        os.seteuid(0)
        os.setegid(gid)
        if os.getgroups() != groups:
            os.setgroups(groups)
        if home is None:
            os.environ.pop("HOME", None)
        else:
            os.environ["HOME"] = home


def _gets_credentials() -> bool:
    """Whether the service has any, as its unit file or a drop-in of it says; False where systemd does not answer."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        shown = subprocess.run(["systemctl", "cat", SERVICE], capture_output=True, text=True, timeout=SYSTEMD_SECONDS)
        return CREDENTIAL.search(shown.stdout) is not None
    return False


def _numbers_of(groups: Sequence[str]) -> Iterator[int]:
    for name in groups:
        with contextlib.suppress(KeyError):
            yield grp.getgrnam(name).gr_gid
