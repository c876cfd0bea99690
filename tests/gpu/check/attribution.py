"""Two engines' memory by their processes: while both hold it, asleep, awake again, stopped, killed."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu.check.bench import Bench, GiB, MiB, gib, wait_for
from vllmd.gpu import DeviceSample, attribute, pids_of

START_LIMIT = 120.0  # seconds; importing torch from a cold disk takes its time
RETURN_LIMIT = 10.0
WANTED_RETURN = 2.0
TOLERANCE = 64 * MiB  # what the driver may round, per process
CONTEXT_LIMIT = 2 * GiB  # CUDA's context of one process, beside what it allocated


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
        connection = Unix(str(self.uds))
        try:
            connection.request(method, path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()


class Unix(http.client.HTTPConnection):
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
    """The steps, in order, on one device. ``memory``: the flags that make an engine hold its memory there."""

    bench: Bench
    memory: tuple[str, ...] = ("--cuda", "0")
    engines: dict[str, Engine] = field(default_factory=dict)

    def run(self, size: int) -> None:
        """All steps with engines of ``size`` and half of it. Whatever happens, no engine is left."""
        try:
            self._steps(size)
        finally:
            for engine in self.engines.values():
                engine.process.kill()
                engine.process.wait()

    def _steps(self, size: int) -> None:
        before = self.bench.sample()
        first, second = self._start("first", size), self._start("second", size // 2)
        if not self._attributed(first, second, before):
            return
        self._asleep(first)
        self._awake(first)
        self._ended(first, signal.SIGTERM, before.used + second.size + second.context)
        self._ended(second, signal.SIGKILL, before.used)

    def _start(self, name: str, size: int) -> Engine:
        uds = self.bench.folder / f"{name}.sock"
        argv = [self.bench.python, "-m", "vllmd.simengine", "--uds", str(uds), "--model", name, "--quiet"]
        argv += ["--memory", str(size), "--memory-asleep", "0"]
        log = self.bench.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*argv, *self.memory],
                env=self.bench.environment(CUDA_VISIBLE_DEVICES=self.bench.device.id),
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        engine = self.engines[name] = Engine(name, size, process, uds)
        began = time.monotonic()
        ready = wait_for(lambda: process.poll() is not None or engine.call("GET", "/health") == 200, START_LIMIT)
        if not ready or process.poll() is not None:
            raise RuntimeError(f"the {name} engine did not start:\n{log.read_text()[-3000:]}")
        self._add(f"{name} engine ready", f"< {START_LIMIT:.0f} s", f"{time.monotonic() - began:.1f} s", True)
        return engine

    def _attributed(self, first: Engine, second: Engine, before: DeviceSample) -> bool:
        """Each engine's memory is its own, the sum is what the device lost, and strangers hold no more than before."""
        sample = self.bench.sample()
        if sample.hides_processes or sample.unsized:
            self._add("NVML shows processes and sizes", "yes", "no: attribution cannot be checked here", False)
            return False
        external, held = self._books()
        for engine in (first, second):
            engine.context = held.get(engine.name, 0) - engine.size
            fits = -TOLERANCE <= engine.context <= CONTEXT_LIMIT
            self._add(f"{engine.name} engine's memory, by its pids", f"{gib(engine.size)} + context",
                      f"{gib(engine.size)} + {gib(engine.context)}", fits)  # fmt: skip
        taken, slack = sample.used - before.used, 2 * TOLERANCE + CONTEXT_LIMIT // 4
        total = sum(held.values())
        self._add("what the device lost = what both hold", gib(total), gib(taken), abs(taken - total) <= slack)
        self._add("strangers hold what they held", gib(before.used), gib(external),
                  abs(external - before.used) <= slack)  # fmt: skip
        return True

    def _asleep(self, engine: Engine) -> None:
        awake = self.bench.sample().used
        status = engine.call("POST", "/sleep?level=1")
        self._add("sleep at level 1", "200", str(status), status == 200)
        self._until("asleep it keeps its context only", engine.context, lambda: self._books()[1].get(engine.name, 0))
        self._until("the device has the rest back", awake - engine.size, lambda: self.bench.sample().used)

    def _awake(self, engine: Engine) -> None:
        status = engine.call("POST", "/wake_up")
        self._add("wake", "200", str(status), status == 200)
        self._until("awake it holds what it held", engine.size + engine.context,
                    lambda: self._books()[1].get(engine.name, 0))  # fmt: skip

    def _ended(self, engine: Engine, signum: signal.Signals, left: int) -> None:
        engine.process.send_signal(signum)
        engine.process.wait(timeout=60)
        self._until(f"after {signum.name} to the {engine.name} engine its memory is back", left,
                    lambda: self.bench.sample().used)  # fmt: skip

    def _books(self) -> tuple[int, dict[str, int]]:
        """Strangers' bytes and each engine's, by the code that the daemon runs."""
        sample = self.bench.devices.sample()
        external, held = attribute(sample, {name: engine.pids for name, engine in self.engines.items()})
        index = self.bench.device.index
        return external.get(index, 0), {name: size for (name, at), size in held.items() if at == index}

    def _until(self, what: str, wanted: int, read: Callable[[], int]) -> None:
        """Wait until ``read`` is ``wanted``; the time it took is in the table."""
        began = time.monotonic()
        held = wait_for(lambda: abs(read() - wanted) <= 2 * TOLERANCE, RETURN_LIMIT)
        took = time.monotonic() - began
        self._add(what, f"{gib(wanted)} within {WANTED_RETURN:.0f} s", f"{gib(read())} after {took:.2f} s",
                  held and took <= WANTED_RETURN)  # fmt: skip

    def _add(self, what: str, wanted: str, seen: str, held: bool) -> None:
        self.bench.table.add(what, wanted, seen, held)


def size_of(bench: Bench) -> int:
    """Bytes of the larger engine: at most a third of what is free."""
    return min(8 * GiB, (bench.sample().free - 2 * CONTEXT_LIMIT) // 3)


def run(bench: Bench) -> None:
    """With two engines of the stand-in that hold real memory through torch."""
    size = size_of(bench)
    if size < 256 * MiB:
        bench.table.add("enough free memory", "1 GiB and more", gib(bench.sample().free), False)
        return
    Check(bench).run(size)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not, its memory is free."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False
