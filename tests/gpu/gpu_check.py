"""``make gpu-check``: the probe, the attribution and the return of memory, on a real NVIDIA GPU.

Two stand-in engines hold real device memory through torch; one sleeps, wakes
and is stopped, the other is killed; after each step NVML must say what the
ledger would. Needs a checkout, torch and nvidia-ml-py, nothing else::

    python3 tests/gpu/gpu_check.py [--device N] [--engine-memory 4GiB]

Exit status: 0 all held, 1 something did not, 77 there is no GPU to check
(``make`` reports that one as ``Error 77``).
It uses at most a third of what is free on one device and touches no other process.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from vllmd.config.types import Config  # noqa: E402
from vllmd.core.types import Device  # noqa: E402
from vllmd.gpu import Devices, DeviceSample, attribute, open_devices, pids_of  # noqa: E402

NO_GPU = 77  # the status by which automake and meson mean: skipped
GiB, MiB = 1 << 30, 1 << 20
START_LIMIT = 180.0  # seconds; importing torch from a cold disk takes its time
RETURN_LIMIT = 20.0
POLL = 0.1
TOLERANCE = 64 * MiB  # what the driver may round, per process
CONTEXT_LIMIT = 2 * GiB  # CUDA's context of one process, beside what it allocated


@dataclass(frozen=True)
class Row:
    """One line of the table: what must hold, what was seen, whether it held."""

    what: str
    wanted: str
    seen: str
    held: bool


@dataclass
class Engine:
    """A running stand-in."""

    name: str
    size: int
    process: subprocess.Popen[bytes]
    uds: Path
    context: int = 0  # bytes that its processes hold beside ``size``, as seen once it was ready

    @property
    def pids(self) -> frozenset[int]:
        return pids_of(None, self.process.pid)

    def call(self, method: str, path: str) -> int:
        """The answer's status; 0 while nobody listens."""
        connection = _Unix(str(self.uds))
        try:
            connection.request(method, path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()


class _Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


@dataclass
class Check:
    """The steps, in order, on one device. ``argv``: how an engine of so many bytes is made to hold them there."""

    devices: Devices
    device: Device
    argv: Callable[[int], Sequence[str]]
    env: Mapping[str, str]
    folder: Path
    rows: list[Row] = field(default_factory=list)
    engines: dict[str, Engine] = field(default_factory=dict)

    def run(self, size: int) -> list[Row]:
        """All steps with engines of ``size`` and half of it. Whatever happens, no engine is left."""
        try:
            self._steps(size)
        finally:
            for engine in self.engines.values():
                engine.process.kill()
                engine.process.wait()
        return self.rows

    def _steps(self, size: int) -> None:
        before = self._probe()
        first, second = self._start("first", size), self._start("second", size // 2)
        self._attributed(first, second, before)
        self._asleep(first, before)
        self._awake(first)
        self._ended(first, signal.SIGTERM, before.used + second.size + second.context)
        self._ended(second, signal.SIGKILL, before.used)

    def _probe(self) -> DeviceSample:
        sample = self._sample()
        self._row("total, as in the inventory", _size(self.device.memory), _size(sample.total),
                  sample.total == self.device.memory)  # fmt: skip
        added = sample.used + sample.free
        self._row("used + free = total", _size(sample.total), _size(added), abs(added - sample.total) <= TOLERANCE)
        return sample

    def _start(self, name: str, size: int) -> Engine:
        uds = self.folder / f"{name}.sock"
        argv = [sys.executable, "-m", "vllmd.simengine", "--uds", str(uds), "--model", name, "--quiet"]
        argv += ["--memory", str(size), "--memory-asleep", "0"]
        argv += ["--load-time", "0", "--sleep-time", "0", "--wake-time", "0"]
        log = (self.folder / f"{name}.log").open("wb")
        process = subprocess.Popen(
            [*argv, *self.argv(size)],
            env={**os.environ, **self.env, "PYTHONPATH": str(REPOSITORY)},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        log.close()
        engine = self.engines[name] = Engine(name, size, process, uds)
        began = time.monotonic()
        ready = wait_for(lambda: process.poll() is not None or engine.call("GET", "/health") == 200, START_LIMIT)
        if not ready or process.poll() is not None:
            raise RuntimeError(f"the {name} engine did not start:\n{(self.folder / f'{name}.log').read_text()[-3000:]}")
        self._row(f"{name} engine ready", f"< {START_LIMIT:.0f} s", f"{time.monotonic() - began:.1f} s", True)
        return engine

    def _attributed(self, first: Engine, second: Engine, before: DeviceSample) -> None:
        """Each engine's memory is its own, the sum is what the device lost, and strangers hold no more than before."""
        sample = self._sample()
        if sample.hides_processes or sample.unsized:
            self._row("NVML shows processes and sizes", "yes", "no: attribution cannot be checked here", False)
            return
        external, held = self._books()
        for engine in (first, second):
            engine.context = held.get(engine.name, 0) - engine.size
            fits = -TOLERANCE <= engine.context <= CONTEXT_LIMIT
            self._row(f"{engine.name} engine's memory, by its pids", f"{_size(engine.size)} + context",
                      _size(held.get(engine.name, 0)), fits)  # fmt: skip
        taken = sample.used - before.used
        self._row("what the device lost = what both hold", _size(sum(held.values())), _size(taken),
                  abs(taken - sum(held.values())) <= 2 * TOLERANCE + CONTEXT_LIMIT // 4)  # fmt: skip
        known = _strangers(before)
        self._row("strangers hold what they held", _size(known), _size(external),
                  abs(external - known) <= 2 * TOLERANCE + CONTEXT_LIMIT // 4)  # fmt: skip

    def _asleep(self, engine: Engine, before: DeviceSample) -> None:
        awake = self._sample().used
        status = engine.call("POST", "/sleep?level=1")
        self._row("sleep at level 1", "200", str(status), status == 200)
        self._until(f"asleep it keeps its context only, within {RETURN_LIMIT:.0f} s", engine.context,
                    lambda: self._books()[1].get(engine.name, 0))  # fmt: skip
        self._until("the device has the rest back", awake - engine.size, lambda: self._sample().used)

    def _awake(self, engine: Engine) -> None:
        status = engine.call("POST", "/wake_up")
        self._row("wake", "200", str(status), status == 200)
        self._until("awake it holds what it held", engine.size + engine.context,
                    lambda: self._books()[1].get(engine.name, 0))  # fmt: skip

    def _ended(self, engine: Engine, signum: signal.Signals, left: int) -> None:
        engine.process.send_signal(signum)
        engine.process.wait(timeout=60)
        self._until(f"after {signum.name} to the {engine.name} engine its memory is back", left,
                    lambda: self._sample().used)  # fmt: skip

    # -- reading ---------------------------------------------------------------------------

    def _sample(self) -> DeviceSample:
        sample = self.devices.sample()
        if self.device.index not in sample.devices:
            raise RuntimeError(f"device {self.device.index} cannot be read: {sample.failed.get(self.device.index)}")
        return sample.devices[self.device.index]

    def _books(self) -> tuple[int, dict[str, int]]:
        """Strangers' bytes and each engine's, by the code that the daemon runs."""
        sample = self.devices.sample()
        external, held = attribute(sample, {name: engine.pids for name, engine in self.engines.items()})
        index = self.device.index
        return external.get(index, 0), {name: size for (name, at), size in held.items() if at == index}

    def _until(self, what: str, wanted: int, read: Callable[[], int]) -> None:
        """Wait until ``read`` is ``wanted``; the time it took is in the table."""
        began = time.monotonic()
        held = wait_for(lambda: abs(read() - wanted) <= 2 * TOLERANCE, RETURN_LIMIT)
        self._row(what, _size(wanted), f"{_size(read())} after {time.monotonic() - began:.1f} s", held)

    def _row(self, what: str, wanted: str, seen: str, held: bool) -> None:
        self.rows.append(Row(what, wanted, seen, held))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the table, return the exit status."""
    options = _parser().parse_args(arguments)
    devices = open_devices(Config(), os.environ)
    print(f"devices: {devices.source} ({devices.note})")
    if devices.source != "nvml":
        print("gpu-check: there is no NVIDIA GPU to check here")
        return NO_GPU
    if importlib.util.find_spec("torch") is None:
        print("gpu-check: torch is not installed for this Python, so nothing can hold device memory")
        return NO_GPU
    device, sample = _chosen(devices, options.device)
    size = options.engine_memory or min(8 * GiB, (sample.free - 2 * CONTEXT_LIMIT) // 3)
    if size < 256 * MiB:
        print(f"gpu-check: only {_size(sample.free)} are free on device {device.index}: too little to check with")
        return NO_GPU
    print(f"device {device.index}: {device.name} {device.id}, {_size(device.memory)}, {_size(sample.used)} in use, "
          f"{sample.power} W, {sample.utilisation} % busy, {len(sample.processes)} processes")  # fmt: skip
    env = {"CUDA_VISIBLE_DEVICES": device.id, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    with _folder() as folder:
        check = Check(devices, device, lambda size: ["--cuda", "0"], env, folder)
        return report(check, size)


def report(check: Check, size: int) -> int:
    """Run it and print the table, as far as it came."""
    failure = ""
    try:
        check.run(size)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        failure = str(error)
    print(table(check.rows))
    good = not failure and all(row.held for row in check.rows)
    print(f"gpu-check: {failure or ('all held' if good else 'something did not hold')}")
    return 0 if good else 1


def table(rows: Sequence[Row]) -> str:
    """The rows in columns."""
    cells = [("", "what", "wanted", "seen")]
    cells += [("ok" if row.held else "NO", row.what, row.wanted, row.seen) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def wait_for(true: Callable[[], bool], limit: float) -> bool:
    """Whether it became true within ``limit`` seconds."""
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(POLL)
    return True


def _chosen(devices: Devices, index: int | None) -> tuple[Device, DeviceSample]:
    """The device asked for, or the one with the most free memory."""
    sample = devices.sample()
    for failed, why in sample.failed.items():
        print(f"device {failed} cannot be read: {why}")
    readable = [device for device in devices.inventory() if device.index in sample.devices]
    wanted = [device for device in readable if index in (None, device.index)]
    if not wanted:
        raise SystemExit(f"gpu-check: no readable device {'' if index is None else index}")
    device = max(wanted, key=lambda device: sample.devices[device.index].free)
    return device, sample.devices[device.index]


def _strangers(sample: DeviceSample) -> int:
    """Before any engine of ours: everything in use."""
    return sample.used


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        yield Path(folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Check vllmd's view of a real NVIDIA GPU.")
    parser.add_argument(
        "--device", type=int, help="its number, as nvidia-smi has it; default: the one with most free memory"
    )
    parser.add_argument("--engine-memory", type=_bytes, help="what the larger engine holds, such as 4GiB")
    return parser


def _bytes(text: str) -> int:
    for unit, scale in (("GiB", GiB), ("MiB", MiB)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * scale)
    raise argparse.ArgumentTypeError(f"{text!r} is no size such as 4GiB or 512MiB")


def _size(size: int) -> str:
    return f"{size / GiB:.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
