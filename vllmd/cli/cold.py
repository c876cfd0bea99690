"""How long a model takes to start: through vllmd, and by the same command line without it.

The command line is that of the engine which the daemon has started, as the kernel has it: argv and environment of its
main process, run as the same user, with a run directory of its own. So the two starts differ in nothing but vllmd. Only
root and the engine's own user can read that. A first start, which is not counted, shows the command line, and leaves
both with files that are in the page cache and with whatever the engine compiles once.
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
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
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
from vllmd.frozen import frozen

PROBE_SECONDS, POLL_SECONDS = 5.0, 0.02  # for an answer of the engine, and between two probes
END_SECONDS, LONGEST_START_SECONDS = 30.0, 3600.0
LAST_LINES = 10  # of the engine's log, shown where it does not start


@frozen
class Cold:
    """One start: seconds from the order until the engine served, and the seconds of each phase."""

    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)


@frozen
class Command:
    """An engine's command line, environment and user. ``address``: its socket's path, or HOST:PORT."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    cwd: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    address: str


def measure(admin: Admin, name: str, say: Callable[[str], None]) -> dict[str, Cold]:
    """Start a model alone, then through vllmd, which is how it is left. Raises Failure.

    ``say`` is called with each step.
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
        say(f"starting {line.name} once, to see how")
        line = start_through_vllmd(admin, line.name)[0]
    command = read_command(line)
    # The pid comes from the daemon, which is not trusted with root; and its launcher runs no engine as root.
    if command.uid == 0 and admin.path == SYSTEM_SOCKET:
        raise Failure(f"process {line.pid} is root's, and so no engine: its command is not run", EX_NOPERM)
    engine = engine_of(ModelConfig(line.name, engine=line.config.engine or "", model=line.config.model or ""))
    models.change(admin, line.name, verb("unload"), {}, quiet=True)
    say(f"starting {line.name} alone")
    alone = start_alone(command, engine, line)
    say(f"starting {line.name} through vllmd")
    _, through = start_through_vllmd(admin, line.name)
    return {"vllmd": through, "alone": alone}


def table(measured: Mapping[str, Cold]) -> str:
    """A row for each phase that takes any time, and one for the whole start."""
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
    """Start the engine, wait until it serves, and end it. Raises Failure where it ends before it serves."""
    phases, last_lines = StartPhases(), deque[str](maxlen=LAST_LINES)

    def read_log(lines: IO[str]) -> None:
        for text in lines:
            last_lines.append(text.rstrip())
            if progress := engine.progress(text):
                phases.enter(progress)

    with own_run_directory(command) as here:
        began = time.monotonic()
        as_user = {"user": here.uid, "group": here.gid, "extra_groups": here.groups} if os.geteuid() == 0 else {}
        process = subprocess.Popen(here.argv, env=here.environment, cwd=here.cwd, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                                   errors="replace", **as_user)  # type: ignore[call-overload] # fmt: skip
        phases.enter(Progress(first_phase(engine.kind)))
        reader = threading.Thread(target=read_log, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            while not is_ready(here.address, engine, line):
                if process.poll() is not None or time.monotonic() - began > LONGEST_START_SECONDS:
                    reader.join(1.0)
                    raise Failure(f"{line.name} did not start alone; its last lines:\n" + "\n".join(last_lines),
                                  EX_UNAVAILABLE)  # fmt: skip
                time.sleep(POLL_SECONDS)
            return Cold(time.monotonic() - began, phases.end())
        finally:
            # The process itself first, in order; then whatever it has started.
            with contextlib.suppress(OSError):
                process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def own_run_directory(command: Command) -> Iterator[Command]:
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


def is_ready(address: str, engine: Engine, line: ModelLine) -> bool:
    """Whether the engine serves, by the readiness probe of its kind."""
    probe = engine.ready(ModelConfig(line.name, engine=engine.kind))
    host, _, port = address.rpartition(":")
    connection = (UnixConnection(address, PROBE_SECONDS) if address.startswith("/")
                  else http.client.HTTPConnection(host, int(port), timeout=PROBE_SECONDS))  # fmt: skip
    try:
        connection.request(probe.method, probe.path)
        return connection.getresponse().status == probe.expect
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start_through_vllmd(admin: Admin, name: str) -> tuple[ModelLine, Cold]:
    """Start a model through vllmd. Returns its line of the status then, and how long the start took a caller."""
    began = time.monotonic()
    models.change(admin, name, verb("load"), {}, quiet=True)
    seconds = time.monotonic() - began
    line = models.find(admin.status(), name)
    if not line.pid:
        raise Failure(f"{name} has no engine of its own here that could be started alone", EX_UNAVAILABLE)
    return line, Cold(seconds, line.start_phases)


def _seconds(seconds: float | None) -> str:
    return show.EMPTY if seconds is None else f"{seconds:.2f}s"
