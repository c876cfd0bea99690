"""How long a model takes to start: through vllmd, and the same command line by itself.

What is started by itself is what the daemon starts, as the kernel has it: argv and environment of the engine's main
process, run as the same user and with a run directory of its own. So the two differ in nothing but vllmd. Root can
read that, and the engine's own user. A first start, which is not counted, shows it, and leaves both with files that are
in the page cache and with whatever the engine compiles once.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vllmd.api.answers import ModelLine
from vllmd.api.verbs import verb
from vllmd.cli import models, show
from vllmd.cli.admin import SYSTEM_SOCKET, Admin, UnixConnection
from vllmd.cli.failures import EX_NOPERM, EX_UNAVAILABLE, EX_USAGE, Failure
from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of
from vllmd.engines.base import Engine, Progress
from vllmd.engines.start_phases import StartPhases
from vllmd.engines.start_times import first_phase

PROBE, POLL, END, LONGEST = 5.0, 0.02, 30.0, 3600.0  # seconds: for an answer, between looks, for its end, for a start


@dataclass(frozen=True, slots=True)
class Cold:
    """One start: seconds from the order until it served, and of which each phase took so many."""

    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Command:
    """What runs as a model's engine. ``address``: its socket's path, or HOST:PORT."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    address: str


def measure(admin: Admin, name: str, told: Callable[[str], None]) -> dict[str, Cold]:
    """Start it alone and through vllmd, by turns; it is left as vllmd started it. Raises Failure.

    ``told`` is called with what goes on.
    """
    if admin.url:
        raise Failure(
            "--cold starts a command of this machine: it asks the daemon by its socket, not by --url", EX_USAGE
        )
    line = models.find(admin.status(), name)
    if line.replicas:
        raise Failure(f"{line.name} has several engines, name one: {', '.join(each.name for each in line.replicas)}",
                      EX_USAGE)  # fmt: skip
    if not line.pid:
        told(f"starting {line.name} once, to see how")
        line = _through(admin, line.name)[0]
    command = read_command(line)
    # Which process it is the daemon says, who is not trusted with root; its launcher runs no engine as root.
    if command.uid == 0 and admin.path == SYSTEM_SOCKET:
        raise Failure(f"process {line.pid} is root's, and so no engine: its command is not run", EX_NOPERM)
    engine = engine_of(ModelConfig(line.name, engine=line.config.engine or "", model=line.config.model or ""))
    _stopped(admin, line.name)
    told(f"starting {line.name} alone")
    alone = start_alone(command, engine, line)
    told(f"starting {line.name} through vllmd")
    _, through = _through(admin, line.name)
    return {"vllmd": through, "alone": alone}


def table(measured: Mapping[str, Cold]) -> str:
    """A row for each phase, and one for the whole; what takes no time is left out."""
    phases = dict.fromkeys(phase for cold in measured.values() for phase in cold.phases)
    rows = [
        (phase, *(_seconds(cold.phases.get(phase)) for cold in measured.values()))
        for phase in phases
        if any(cold.phases.get(phase, 0.0) >= show.MOMENT for cold in measured.values())
    ]
    whole = ("in all", *(_seconds(cold.seconds) for cold in measured.values()))
    names = tuple(name.upper() for name in measured)
    ratio = measured["vllmd"].seconds / measured["alone"].seconds if measured["alone"].seconds else 0.0
    return f"{show.table(('PHASE', *names), [*rows, whole], names)}\nvllmd takes {ratio:.2f} times as long"


def read_command(line: ModelLine, proc: Path = Path("/proc")) -> Command:
    """The command line of the engine's main process. Raises Failure where it may not be read."""
    here = proc / str(line.pid)
    try:
        argv, environment = _words(here / "cmdline"), _words(here / "environ")
        status = dict(text.split(":\t", 1) for text in (here / "status").read_text().splitlines() if ":\t" in text)
        cwd = os.readlink(here / "cwd")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Failure(f"what the engine of {line.name} was started with cannot be read ({why}): only root and the "
                      "engine's user may; sudo vllmctl bench --cold", EX_NOPERM) from None  # fmt: skip
    variables = dict(word.split("=", 1) for word in environment if "=" in word)
    groups = tuple(int(group) for group in status.get("Groups", "").split())
    return Command(argv, variables, cwd, int(status["Uid"].split()[0]), int(status["Gid"].split()[0]), groups,
                   line.socket)  # fmt: skip


def _words(path: Path) -> tuple[str, ...]:
    return tuple(os.fsdecode(word) for word in path.read_bytes().split(b"\0")[:-1])


def start_alone(command: Command, engine: Engine, line: ModelLine) -> Cold:
    """Start it, wait until it serves, and end it. Raises Failure where it ends before."""
    with _own_place(command) as here:
        phases = StartPhases()
        began = time.monotonic()
        as_user = {"user": here.uid, "group": here.gid, "extra_groups": here.groups} if os.geteuid() == 0 else {}
        process = subprocess.Popen(here.argv, env=here.environment, cwd=here.cwd, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                   errors="replace", **as_user)  # type: ignore[call-overload] # fmt: skip
        phases.enter(Progress(first_phase(engine.kind)))
        last: list[str] = []
        reader = threading.Thread(target=_read, args=(process.stdout, engine, phases, last), daemon=True)
        reader.start()
        try:
            while not _answers(here.address, engine, line):
                if process.poll() is not None or time.monotonic() - began > LONGEST:
                    reader.join(1.0)
                    raise Failure(f"{line.name} did not start alone; its last lines:\n" + "\n".join(last),
                                  EX_UNAVAILABLE)  # fmt: skip
                time.sleep(POLL)
            return Cold(time.monotonic() - began, phases.end())
        finally:
            _end(process)


@contextlib.contextmanager
def _own_place(command: Command) -> Iterator[Command]:
    """The command with a run directory of its own instead of the one that the daemon's engine had."""
    theirs = os.path.dirname(command.address) if command.address.startswith("/") else ""
    if not theirs:
        yield command
        return
    own = tempfile.mkdtemp(prefix="vllmd-", dir="/tmp")
    try:
        if os.geteuid() == 0:
            os.chown(own, command.uid, command.gid)
        environment = {name: value.replace(theirs, own) for name, value in command.environment.items()}
        argv = tuple(word.replace(theirs, own) for word in command.argv)
        cwd = own if command.cwd.startswith(theirs) else command.cwd
        address = command.address.replace(theirs, own)
        yield Command(argv, environment, cwd, command.uid, command.gid, command.groups, address)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _read(lines: IO[str], engine: Engine, phases: StartPhases, last: list[str]) -> None:
    """Read its log to the end, and note which phase it is in."""
    for text in lines:
        last[:] = [*last, text.rstrip()][-10:]
        if progress := engine.progress(text):
            phases.enter(progress)


def _answers(address: str, engine: Engine, line: ModelLine) -> bool:
    """Whether it serves, by its kind's own probe."""
    probe = engine.ready(ModelConfig(line.name, engine=engine.kind))
    host, _, port = address.rpartition(":")
    connection = (UnixConnection(address, PROBE) if address.startswith("/")
                  else http.client.HTTPConnection(host, int(port), timeout=PROBE))  # fmt: skip
    try:
        connection.request(probe.method, probe.path)
        return connection.getresponse().status == probe.expect
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[str]) -> None:
    """End the process, and whatever it has started."""
    with contextlib.suppress(OSError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END)
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _through(admin: Admin, name: str) -> tuple[ModelLine, Cold]:
    """Start it through vllmd; its line then, and how long that took whoever asked."""
    began = time.monotonic()
    models.change(admin, name, verb("load"), {}, quiet=True)
    seconds = time.monotonic() - began
    line = models.find(admin.status(), name)
    if not line.pid:
        raise Failure(f"{name} has no engine of its own here that could be started alone", EX_UNAVAILABLE)
    return line, Cold(seconds, line.start_phases)


def _stopped(admin: Admin, name: str) -> None:
    models.change(admin, name, verb("unload"), {}, quiet=True)


def _seconds(seconds: float | None) -> str:
    return show.EMPTY if seconds is None else f"{seconds:.2f}s"
