"""The configuration as the system's daemon will read it: root, who checks it, may read files that the daemon may not.

A key, a certificate or a token in such a file has the daemon refuse all of the configuration.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllmd.config.findings import Problem
from vllmd.config.loader import read

USER, GROUPS = "vllmd", ("vllmd-engine", "vllmd-sockets", "vllmd-admin")  # as units/vllmd.service says


def problems_of_daemon(config_file: str | Path | None, env: Mapping[str, str], user: str = USER) -> Sequence[Problem]:
    """What keeps the daemon from reading a configuration that we could read.

    Nothing where we are not root, or where a file is named: it may be a draft that is to be moved.
    """
    if config_file or env.get("VLLMD_CONFIG") or os.geteuid() != 0:
        return ()
    try:
        account = pwd.getpwnam(user)
    except KeyError:  # it is not installed as a system's service
        return ()
    with _rights_of(account):
        return [problem for problem in read(env=env).problems if not problem.unfit]


@contextlib.contextmanager
def _rights_of(account: pwd.struct_passwd) -> Iterator[None]:
    """Within this we have the rights of that user, who is in the daemon's groups as well."""
    more = [group.gr_gid for group in grp.getgrall() if group.gr_name in GROUPS]
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([*os.getgrouplist(account.pw_name, account.pw_gid), *more])
    os.setegid(account.pw_gid)
    os.seteuid(account.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)
