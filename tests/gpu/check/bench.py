"""What the parts work with: one device, a table to fill, the time that is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllmd.core.types import Device
from vllmd.gpu import Devices, DeviceSample

REPOSITORY = Path(__file__).resolve().parents[3]
GiB, MiB = 1 << 30, 1 << 20
POLL = 0.05


@dataclass(frozen=True)
class Row:
    """One line: what was looked at, what must hold, what was seen, whether it held (None: a figure, nothing more)."""

    part: str
    what: str
    wanted: str
    seen: str
    held: bool | None = None


class Table:
    """The rows so far; each is printed as it comes, so that a run that is cut off has told what it knew."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.rows: list[Row] = []
        self.part = ""
        self._say = say

    def add(self, what: str, wanted: str, seen: str, held: bool | None = None) -> None:
        row = Row(self.part, what, wanted, seen, held)
        self.rows.append(row)
        self._say(f"{mark(row):3} {row.part}: {row.what}: {row.seen}" + (f" (wanted {wanted})" if wanted else ""))

    def figure(self, what: str, seen: str) -> None:
        """Something measured that no bound is known for."""
        self.add(what, "", seen)

    @property
    def good(self) -> bool:
        return all(row.held is not False for row in self.rows)

    def markdown(self) -> str:
        """For tests/bench/gpu.md."""
        lines = ["| part | what | wanted | seen | |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {r.part} | {r.what} | {r.wanted} | {r.seen} | {mark(r)} |" for r in self.rows]
        return "\n".join(lines) + "\n"


def mark(row: Row) -> str:
    """``ok``, ``NO``, or nothing for a mere figure."""
    return "" if row.held is None else "ok" if row.held else "NO"


@dataclass
class Bench:
    """One device and what is known of how to work with it.

    ``torch``: the environment for processes that use torch. ``deadline``: on time.monotonic()'s clock.
    """

    devices: Devices
    device: Device
    folder: Path
    table: Table
    deadline: float
    load_seconds: float = 60.0
    copy_bytes: int = 20 * GiB
    settle: float = 15.0  # seconds until an idle device has gone down to what it takes when idle
    python: str = sys.executable
    transformers: Sequence[str] = ()
    torch: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def sample(self) -> DeviceSample:
        """Raises RuntimeError if the device cannot be read."""
        sample = self.devices.sample()
        if self.device.index not in sample.devices:
            raise RuntimeError(f"device {self.device.index} cannot be read: {sample.failed.get(self.device.index)}")
        return sample.devices[self.device.index]

    def environment(self, **more: str) -> dict[str, str]:
        """For a process of ours that uses the device."""
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        return {**os.environ, "PYTHONPATH": path, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **self.torch, **more}

    def script(self, code: str, *arguments: str, timeout: float = 120.0, **env: str) -> dict[str, Any]:
        """Run Python in a process of its own; what its last line of output says, as JSON. Raises RuntimeError."""
        done = subprocess.run(
            [self.python, "-c", code, *arguments],
            env=self.environment(**env), capture_output=True, text=True, timeout=min(timeout, max(5.0, self.left)),
        )  # fmt: skip
        lines = done.stdout.strip().splitlines()
        try:
            return json.loads(lines[-1])  # type: ignore[no-any-return]
        except (IndexError, ValueError):
            raise RuntimeError(f"a script ended with {done.returncode}:\n{done.stdout}{done.stderr[-2000:]}") from None

    def scripts(
        self, code: str, cases: Mapping[str, tuple[Sequence[str], Mapping[str, str]]]
    ) -> dict[str, dict[str, Any]]:
        """The same Python with each case's arguments and environment, all at the same time. Raises RuntimeError."""
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            started = {what: pool.submit(self.script, code, *args, **env) for what, (args, env) in cases.items()}
            return {what: each.result() for what, each in started.items()}


def wait_for(true: Callable[[], bool], limit: float, poll: float = POLL) -> bool:
    """Whether it became true within ``limit`` seconds."""
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(poll)
    return True


def gib(size: float) -> str:
    return f"{size / GiB:.2f} GiB"
