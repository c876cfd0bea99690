"""The interface to a way of running engines: ``scopes`` (with systemd) and ``sessions`` (without it) implement it.

Both are called from the launcher's one thread and answer through callbacks, at once or later. Time limits are the
caller's (``engines``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vllmd.frozen import frozen
from vllmd.launcher.logs import TakeLines
from vllmd.launcher.process import Process
from vllmd.launcher.protocol import StartOrder


class Group(Protocol):
    """All processes of one engine."""

    def location(self) -> str:
        """The path of its cgroup, "" if it has none."""

    def empty(self) -> bool:
        """Whether no process of the group is alive; a zombie does not count."""

    def kill(self) -> None:
        """Send SIGKILL to all of them."""

    def oom_killed(self) -> bool:
        """Whether the kernel killed one of them for memory."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Call ``changed`` when ``empty`` may have become true."""

    def annotate(self, values: Mapping[str, str]) -> None:
        """Write keys and values on the group. They outlive the launcher where that is possible."""

    def annotations(self) -> dict[str, str]:
        """The keys and values that ``annotate`` has written, also by an earlier launcher."""

    def close(self) -> None:
        """End the calls that ``watch`` began, and free its descriptors."""


class Logs(Protocol):
    """The destination of engines' output, which can be read again; see ``logs``."""

    def open(self, instance: str) -> int: ...
    def forget(self, instance: str) -> None: ...
    def tail(self, instance: str, lines: int, take: TakeLines) -> None: ...
    def follow(self, instance: str, lines: int, take: TakeLines) -> Callable[[], None]: ...


@frozen
class Found:
    """A group of an earlier launcher."""

    instance: str
    group: Group


Placed = Callable[[Group | None, str], None]


class Backend(Protocol):
    """One way of running engines."""

    @property
    def name(self) -> str:
        """The backend's name, one of those in ``LauncherInfo.backend``."""

    @property
    def detail(self) -> str:
        """For operators: how engines are run here, such as the version of systemd."""

    @property
    def limits(self) -> tuple[str, ...]:
        """The names of the limits that have an effect here."""

    @property
    def dies_with_us(self) -> bool:
        """Whether engines must not outlive the launcher."""

    @property
    def marks(self) -> Mapping[str, str]:
        """Variables that are put into every engine's environment."""

    @property
    def logs(self) -> Logs:
        """The logs of the engines."""

    def place(self, order: StartOrder, process: Process, placed: Placed) -> None:
        """Make a group with the waiting child in it, then call ``placed`` once: (group, "") or (None, why not)."""

    def retire(self, instance: str, retired: Callable[[], None]) -> None:
        """Remove the group, with processes in it or not, and call ``retired`` when its name is free."""

    def adopt(self) -> Sequence[Found]:
        """The groups of an earlier launcher."""
