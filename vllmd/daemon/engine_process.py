"""One engine and what the daemon knows of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import time
from collections import deque
from dataclasses import field, fields, is_dataclass
from functools import cache
from itertools import compress
from operator import attrgetter, is_not
from typing import TYPE_CHECKING, Any

from vllmd.config.settings import of_the_engine
from vllmd.config.types import ModelConfig
from vllmd.daemon.failure_text import how_it_ended, tells_error, with_last_lines, with_root, without_leaks
from vllmd.engines import environments
from vllmd.engines.start_phases import StartPhases
from vllmd.errors import ConfigError
from vllmd.frozen import mutable

if TYPE_CHECKING:
    from vllmd.core.commands import StartEngine
    from vllmd.core.types import Placement
    from vllmd.daemon.loaders import Loading
    from vllmd.daemon.logfile import LogFile
    from vllmd.engines.base import Engine, Listen, Progress
    from vllmd.engines.standby import Standby
    from vllmd.launcher.client import ExitReport, Running

LOG_LINES = 1000  # kept of a start: each of several worker processes tells its own traceback of the one root error
LINES_AFTERWARDS = 50
ERRORS = 3  # answers with 5xx in a row, after which an engine is in doubt


@mutable
class Health:
    """What is known of one engine's health; times by ``time.monotonic``."""

    heard: float = field(default_factory=time.monotonic)  # when it last answered a request well
    errors: int = 0  # answers with 5xx since then
    doubt: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, status: int, failed: bool) -> None:
        """Note that a request was answered with ``status`` by the engine, or ``failed`` on the way to it or back."""
        if failed:
            self.doubt.set()
        elif status >= 500:
            self.errors += 1
            if self.errors >= ERRORS:
                self.doubt.set()
        else:
            self.heard, self.errors = time.monotonic(), 0


@mutable
class EngineProcess:
    """One engine and what the daemon knows of it; owned by the EngineManager."""

    model: ModelConfig
    engine: Engine
    instance: str
    listen: Listen
    placement: Placement
    fingerprint: str
    running: Running | None = None
    ordered: asyncio.Future[Running] | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    phases: StartPhases = field(default_factory=StartPhases)
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)  # the same in Unix time, for people
    ready_after: float | None = None  # seconds its start took
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    report: ExitReport | None = None
    task: asyncio.Task[None] | None = None
    file: LogFile | None = None
    stop: tuple[str, ...] = ()  # Launch.stop
    stop_signal: int = signal.SIGTERM
    self_managed: bool = False
    watch: float = 0.0  # Launch.watch
    environment: str | None = None  # that it was started in; "": it has none; None: an older version noted nothing
    standby: Standby | None = None  # what a standby has to be to become it
    given: str = ""  # the instance of the standby that its order names
    command: StartEngine | None = None  # that it was started by; None: it cannot be started once more
    ports_lost: int = 0  # attempts at this start whose TCP port another process took before the engine listened
    loading: Loading | None = None  # how its weights are read, where that is to be measured
    is_first_start: bool = False  # no start of such an engine is known that came through
    ending: bool = False  # it has been ordered to stop
    asleep: bool = False
    health: Health = field(default_factory=Health)
    watcher: asyncio.Task[None] | None = None  # of its health
    verdict: str = ""  # why we killed it, if we did
    listeners: set[asyncio.Queue[str]] = field(default_factory=set)
    adapters: dict[str, asyncio.Task[str]] = field(default_factory=dict)  # loaded, or being loaded: what went wrong

    @property
    def phase(self) -> Progress:
        """The phase of its start, with the log line that shows the phase."""
        return self.phases.now

    @property
    def phase_text(self) -> str:
        """The phase in words, for clients who wait."""
        return f"{self.phase.phase}, first time only" if self.phase.once and self.is_first_start else self.phase.phase

    @property
    def loader(self) -> str:
        """The load format that was chosen for it; "" for the engine's own choice."""
        return self.loading.format if self.loading else ""

    @property
    def is_special(self) -> bool:
        """Whether it was not started in the plain way, but from a standby or with a loader that vllmd has chosen."""
        return bool(self.running and (self.running.standby or self.loader))

    @property
    def compiled_with(self) -> str:
        """What another start must have in common with this one to find what this one has compiled."""
        return f"{self.fingerprint} {self.environment or ''}".rstrip()

    @property
    def name(self) -> str:
        """The id of its replica. It changes when the model gets replicas or loses them, so do not keep it."""
        return self.model.name

    def restart_as(self, other: EngineProcess) -> None:
        """Go on as another attempt at this start, once the one before has exited; the time of both counts."""
        for name in ("model", "instance", "listen", "fingerprint", "environment", "stop", "stop_signal"):
            setattr(self, name, getattr(other, name))
        self.running = self.ordered = self.report = self.watcher = self.file = self.command = self.loading = None
        self.exited, self.health, self.ending, self.verdict = asyncio.Event(), Health(), False, ""
        self.lines.clear()

    def reason(self) -> str:
        """Why it is gone, with the last lines of its log where they are at hand."""
        lines, how = self.last_lines(), self.verdict or how_it_ended(self.report)
        if not lines:
            return how
        failure = self.engine.failure(lines)
        return with_last_lines(with_root(how, failure) if tells_error(failure.reason) else how, lines, failure.reason)

    def forget_start(self) -> None:
        """Drop the log lines of the start, once the engine is ready."""
        while len(self.lines) > LINES_AFTERWARDS:
            self.lines.popleft()

    def all_lines(self) -> list[str]:
        """The log lines that came while it was followed, completed by the launcher's copy of the last ones."""
        read, end = list(self.lines), list(self.report.log_tail) if self.report else []
        if end and end[0] in read:
            read = read[: len(read) - 1 - read[::-1].index(end[0])]
        return without_leaks(read + end)

    def last_lines(self) -> list[str]:
        """The engine's last log lines; the launcher has them all."""
        return without_leaks(self.report.log_tail if self.report and self.report.log_tail else self.lines)


def log_fields(process: EngineProcess) -> dict[str, dict[str, str]]:
    """The journal fields that say which engine a record is about."""
    unit = {"VLLMD_UNIT": process.running.unit} if process.running else {}
    model = process.model.replica_of or process.name
    replica = {"VLLMD_REPLICA": process.name} if process.name != model else {}
    return {"journal": {"MODEL": model, **replica, **unit}}


def environment_now(model: ModelConfig) -> str:
    """The environment that an engine of this model would be started in now; "" where it has none."""
    try:
        used = environments.chosen(model)
    except ConfigError:  # which its start will say
        return ""
    return str(used.path) if used else ""


def is_outdated(process: EngineProcess, model: ModelConfig) -> bool:
    """Whether a reload is to replace it, because another version of its engine is in use since its start."""
    now = environment_now(model)
    return process.environment is not None and now not in ("", process.environment)


def fingerprint(model: ModelConfig) -> str:
    """What of a model's settings its engine depends on; another value means another engine."""
    return _fingerprint(model, model.replica_of or model.name)


def noted_by_older(model: ModelConfig) -> str:
    """The fingerprint as written by versions up to 0.1.0, which knew each replica but the first by its own name."""
    return _fingerprint(model, model.name)


def _plain(value: Any) -> Any:
    """``value`` as ``asdict`` makes it, without the deep copy, which took most of a start with 10,000 models."""
    if value is None or isinstance(value, str | int | float):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value


_encode = json.JSONEncoder(sort_keys=True, default=str).encode  # json.dumps makes another one for each value


def _json(value: Any) -> str:
    return _encode(_plain(value))


class _Written:
    """A model that has nothing but defaults, as it is written: of each setting, in order of their names."""

    def __init__(self) -> None:
        self.names = sorted({*of_the_engine(), "name", "request", "adapters"})
        self.values = attrgetter(*self.names)
        self.defaults = self.values(ModelConfig(""))
        self.members = [_member(name, _json(value)) for name, value in zip(self.names, self.defaults, strict=True)]
        self.members[self.names.index("request")] = _member("request", _NO_RULES)


@cache
def _written() -> _Written:
    return _Written()


def _member(name: str, text: str) -> str:
    """A setting with its value, which is JSON; "" if it is as if there were no such setting."""
    return "" if text == _SINCE_0_1_0.get(name) else f'"{name}": {text}'  # so an older version's engine is kept


def _fingerprint(model: ModelConfig, name: str) -> str:
    """A digest of the engine's settings, as JSON in the order of their names; most are defaults, and encoded once."""
    written = _written()
    values, members = written.values(model), written.members.copy()
    others = map(is_not, values, written.defaults)
    for place in compress(range(len(values)), others):
        setting, value = written.names[place], values[place]
        if setting == "name":
            value = name
        elif setting == "adapters":
            value = {adapter: config.path for adapter, config in value.items()}
        if setting != "request":
            members[place] = _member(setting, _json(value))
    whole = ", ".join(filter(None, members))
    return hashlib.sha256(f"{{{whole}}}".encode()).hexdigest()[:16]


# Settings that 0.1.0 did not have, with the value that means what it did.
_SINCE_0_1_0 = {"user": '""', "adapters": "{}", "engine_version": '""', "runtime_adapters": "false"}
# 0.1.0 took the rules for requests for the engine's: engines without any are kept.
_NO_RULES = '{"default": {}, "set": {}, "strip": []}'
