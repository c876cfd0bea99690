"""What a way of running engines must offer. Two do: ``scopes`` (systemd) and ``sessions`` (without it).

Both are called from the launcher's one thread and answer through callbacks,
at once or later; the caller keeps the time limits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
        """SIGKILL to all of them."""

    def oom_killed(self) -> bool:
        """Whether the kernel killed one of them for memory."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Call when ``empty`` may have become true."""

    def annotate(self, values: Mapping[str, str]) -> None:
        """Keep these with it, beyond our own life where that is possible."""

    def annotations(self) -> dict[str, str]:
        """The keys and values that ``annotate`` has written, also by an earlier launcher."""

    def close(self) -> None:
        """End the calls that ``watch`` asked for, and free what watching takes."""


class Logs(Protocol):
    """Where output goes and comes back from; see ``logs``."""

    def open(self, instance: str) -> int: ...
    def forget(self, instance: str) -> None: ...
    def tail(self, instance: str, lines: int, take: TakeLines) -> None: ...
    def follow(self, instance: str, lines: int, take: TakeLines) -> Callable[[], None]: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A group that was there before us."""

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
        """For people: what it builds on here."""

    @property
    def limits(self) -> tuple[str, ...]:
        """The limits that have an effect here."""

    @property
    def dies_with_us(self) -> bool:
        """Whether engines must not outlive the launcher."""

    @property
    def marks(self) -> Mapping[str, str]:
        """Put into every engine's environment."""

    @property
    def logs(self) -> Logs:
        """Where the engines' output goes, and how it is read again."""

    def place(self, order: StartOrder, process: Process, placed: Placed) -> None:
        """Give the waiting child a group of its own; ``placed(None, why)`` if that failed. Called once."""

    def retire(self, instance: str, retired: Callable[[], None]) -> None:
        """Remove what is left of the group, running or not, and wait until its name is free."""

    def adopt(self) -> Sequence[Found]:
        """The groups of an earlier launcher."""
