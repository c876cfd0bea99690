"""The machine that ``vllmctl doctor`` examines, and the form of a finding."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.gpu import Devices, Presence, open_devices

if TYPE_CHECKING:
    from vllmd.config.findings import Reading

Finding = tuple[str, str, str]  # verdict, what, advice


def output(*command: str) -> str:
    """What a command prints; "" where it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def has_module(name: str) -> bool:
    return find_spec(name) is not None


def readable_by(user: str, path: Path) -> bool:
    """Whether a user may read the file; True where that cannot be tested, which takes root."""
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        return True
    if os.geteuid() != 0:
        return True
    done = subprocess.run(
        ["/bin/sh", "-c", 'test -r "$1"', "sh", str(path)],
        user=account.pw_uid,
        group=account.pw_gid,
        extra_groups=os.getgrouplist(user, account.pw_gid),
        check=False,
    )
    return done.returncode == 0


def of_this_machine(here: Presence) -> Devices:
    """The devices as the daemon would find them without any configuration."""
    from vllmd.config.types import Config

    return open_devices(Config(), {}, here=here)


@dataclass(frozen=True)  # with a place for what is read once
class Host:
    """The machine; tests give another root and other answers. ``user``: a daemon of systemctl --user is meant."""

    root: Path = Path("/")
    user: bool = False
    run: Callable[..., str] = output
    has_module: Callable[[str], bool] = has_module
    readable_by: Callable[[str, Path], bool] = readable_by
    env: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    devices: Callable[[Presence], Devices] = of_this_machine

    @cached_property
    def reading(self) -> Reading:
        """The configuration as it is now, read once: all findings are about the same, and a large one takes seconds."""
        from vllmd.config.loader import read

        return read(env=self.env)

    def path(self, absolute: str) -> Path:
        return self.root / absolute.lstrip("/")

    def systemctl(self, *arguments: str) -> str:
        return self.run("systemctl", *(["--user"] if self.user else []), *arguments)
