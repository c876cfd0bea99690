"""What is kept of requests and of use: the daemon's side of ``vllmd.records``.

Theory of operation. ``ended`` is called at the end of every request and must cost a few microseconds: it notes a tuple
in the ring of the last requests (memory only), and another one of what counts as use. Each ``AT_A_TIME`` of these are
added to the sums of use and to the arrivals, by columns: one by one they would take five times as long. ``FLUSH``
seconds later a thread writes both to the store (SQLite, ``records.store``); the timer is armed by what comes in, so
that an idle daemon wakes for nothing. What the store cannot take (a full disk) stays in memory, in a bounded amount,
and is tried again after ``RETRY`` seconds; ``trouble`` says why, on every screen.

Use has two halves: tokens, counted when a request ends, and the devices that a model held, sampled by ``look`` at each
reading of the devices. The memory of a model is booked to the keys whose requests run in it, in equal parts; at rest,
to the key that used it last.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from vllmd.api import answers
from vllmd.api.answers import Cancelled, RequestEntry, RequestInFull, Requests, Usage
from vllmd.api.codec import encoded
from vllmd.config.checks import without_otlp
from vllmd.config.types import RecordsConfig
from vllmd.core.types import Snapshot
from vllmd.daemon.state_files import state_file
from vllmd.daemon.tasks import Tasks
from vllmd.errors import BadRequest, NotFound, RequestCancelled, TooManyRequests, Unavailable
from vllmd.proxy.access import ADMIN, MODELS, Caller
from vllmd.proxy.account import Account, Trace
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.http import Request
from vllmd.proxy.tokens import Tokens
from vllmd.records import bodies, ring
from vllmd.records.bodies import KeptBodies, Recordings
from vllmd.records.ring import Entry, Filter, Ring
from vllmd.records.sums import DAY, Ended, Sums
from vllmd.records.trace import Arrival, anonymous
from vllmd.sizes import MiB
from vllmd.systemd.throttle import Repeated

if TYPE_CHECKING:
    from vllmd.daemon.spans import Spans
    from vllmd.records.store import Store

log = logging.getLogger("vllmd.records")
access_log = logging.getLogger("vllmd.access")

FLUSH, RETRY = 2.0, 15.0  # seconds between writes, and after one that failed
AT_A_TIME = 256  # requests that are added up together
MOST_ARRIVALS = MOST_LINES = 20_000  # that wait to be written
MOST_AT_ONCE, WATCH_PAUSE = 10, 0.25  # requests that a watcher is sent, and the seconds until it is sent more
USAGE_SHOWN, TRACE_SHOWN = 30 * DAY, 7 * DAY  # seconds, where the question names no beginning
NO_TOKENS = Tokens(0, 0)
REFUSED = TooManyRequests.__name__  # the error of a request that used nothing: over a limit of its key, or of a queue
LONGEST_LOOK = 60.0  # seconds between two looks at the devices; after a longer time nobody knows who held what


class Watcher:
    """One caller's watch of requests that end. ``waiting``: the last ones that have not been sent to it."""

    def __init__(self, filter: Filter, caller: Caller) -> None:
        self._filter, self._caller = filter, caller
        self.waiting: deque[Entry] = deque(maxlen=MOST_AT_ONCE)
        self.has_entries = asyncio.Event()

    def offer(self, entry: Entry) -> None:
        """Keep a request that has ended until it is sent, if it passes the filter and the caller may see it."""
        if self._filter.takes(entry) and ring.may_see(self._caller, entry):
            self.waiting.append(entry)
            self.has_entries.set()


class Records:
    """Implements ``vllmd.admin.control.Records``."""

    def __init__(
        self,
        config: RecordsConfig,
        path: Path | None,
        base_of: Callable[[str], str] = lambda name: name,
        under_way: Callable[[], Iterable[Exchange]] = tuple,
        spend: Callable[[str, float], None] = lambda key, device_seconds: None,
    ) -> None:
        """``path``: of the store of use; None: none is kept.

        ``base_of`` gives the model that an adapter or a variant belongs to, ``under_way`` the requests for models that
        have not ended. ``spend`` is told for how many seconds more a key's models have held a device.
        """
        self.config = config
        self._base_of, self._live, self._spend = base_of, under_way, spend
        self._ring = Ring(config.requests, self._loading)
        self.recordings = Recordings(time.monotonic)
        self._bodies = KeptBodies(config.bodies)
        self._sums = Sums()
        self._fresh: list[Ended] = []  # not added up yet
        self._arrivals = _no_arrivals()
        self._lines: list[str] = []  # of the access log
        self._path = path
        self.keeps = path is not None and config.usage
        self._store: Store | None = None
        self._writing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = Tasks()
        self._trouble, self._log_trouble = Repeated(log), Repeated(log)
        self.trouble = ""  # why nothing can be written now
        self.log_trouble = ""  # the same of the access log
        self.spans: Spans | None = None  # None where none are sent
        self.configure_spans(config)
        self._watchers: set[Watcher] = set()
        self._came_up: dict[str, tuple[float, float]] = {}  # replica -> when it began to come up, and when it was there
        self._last_key: dict[str, str] = {}  # model -> the key that used it last
        self._looked: float | None = None

    def configure(self, config: RecordsConfig) -> None:
        """Apply a changed configuration; what is kept stays."""
        self.config = config
        self.keeps = self._path is not None and config.usage
        self._ring.resize(config.requests)
        self._bodies.most = config.bodies
        if config.access_log in (None, "journal"):  # there is no file any more that could not be written
            self.log_trouble = ""
        self.configure_spans(config)

    def configure_spans(self, config: RecordsConfig) -> None:
        """Send spans to the collector of the configuration, if it names one and OpenTelemetry's packages are there."""
        before = self.spans
        if before is not None and (before.endpoint, before.share) == (config.spans, config.spans_share):
            return
        self.spans = None
        if config.spans:
            from vllmd.daemon.spans import Spans  # most daemons send none

            if why := without_otlp():
                log.error("records.spans %s", why)
            else:
                self.spans = Spans(config.spans, config.spans_share)
        if before is not None:
            asyncio.get_running_loop().run_in_executor(None, before.close)

    def traced(self) -> dict[str, int]:
        """The number of requests whose spans were ``sent``, and were ``dropped``; {} where none are sent."""
        return {"sent": self.spans.sent, "dropped": self.spans.dropped} if self.spans is not None else {}

    def begin(self, request: Request) -> Trace | None:
        """The trace of a request that has just arrived; None if its spans are not to be sent."""
        return self.spans.begin(request) if self.spans is not None else None

    # -- requests and devices

    def ended(self, exchange: Exchange) -> Entry | None:
        """Note a request that has ended, if it was for a model or failed, and return what is kept of it."""
        # Of other requests (operators', probes, lists) only failures are kept, and those of clients with a key: without
        # one anybody could fill the ring with requests that are refused.
        if not exchange.model and (exchange.status < 400 or MODELS not in exchange.request.caller.scopes):
            return None
        account, config = exchange.account, self.config
        entry = self._ring.note(exchange)
        if account is not None and account.request is not None:
            self._keep_bodies(entry.number, account, exchange.request.received)
        if account is not None and account.trace is not None and self.spans is not None:
            self.spans.note(entry, account.trace)
        if exchange.model:
            if exchange.error != REFUSED:
                self._last_key[exchange.model] = entry.key
            if self.keeps:
                self._note_use(entry)
        if config.access_log:
            self._log(entry, config.access_log)
        for watcher in self._watchers:
            watcher.offer(entry)
        return entry

    def _note_use(self, entry: Entry) -> None:
        """Note what counts as use of a request that has ended."""
        waited, tokens = entry.waited, entry.tokens or NO_TOKENS
        engine_seconds = 0.0 if waited is None else entry.seconds - waited
        failed = (entry.error != "" or entry.status >= 400) and ring.failed(entry)
        self._fresh.append((
            entry.at * 1000, entry.model, entry.key, tokens.prompt, tokens.answer, tokens.cached,
            tokens.total if tokens.estimated else 0, engine_seconds, failed,
        ))  # fmt: skip
        if self._timer is None:
            self._flush_later(FLUSH)
        if len(self._fresh) >= AT_A_TIME:
            self._add_up()

    def _add_up(self) -> None:
        """Add what has ended to the sums of use, and to the arrivals."""
        if self._fresh:
            self._sums.add(self._fresh)
            self._arrivals.extend(self._fresh)
            self._fresh.clear()

    def engine_up(self, replica: str, took: float) -> None:
        """Note that a replica has started or woken, which took so many seconds."""
        now = time.monotonic()
        self._came_up[replica] = now - took, now

    def _loading(self, replica: str, began: float, ended: float) -> float:
        """The seconds between these moments in which the replica was starting or waking."""
        since, until = self._came_up.get(replica, (0.0, 0.0))
        return max(0.0, min(ended, until) - max(began, since))

    def look(self, snapshot: Snapshot, running: Mapping[tuple[str, str], int]) -> None:
        """Book the devices that models have held since the last look; ``running``: requests by model and key."""
        now, at = time.monotonic(), time.time()
        seconds = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        if not 0.0 < seconds <= LONGEST_LOOK:
            return
        sizes = {device.index: device.memory for device in snapshot.devices}
        users: dict[str, Counter[str]] = {}
        for (model, key), number in running.items():
            users.setdefault(model, Counter())[key] += number
        for view in snapshot.models:
            held = [(index, each.memory) for each in view.replicas for index in each.devices if each.memory]
            if not held:
                continue
            memory = sum(size for _, size in held) / MiB * seconds
            devices = sum(size / sizes[index] for index, size in held if sizes.get(index)) * seconds
            keys = users.get(view.name) or Counter({self._last_key.get(view.name, ""): 1})
            for key, number in keys.items():
                share = number / keys.total()
                self._spend(key, devices * share)
                if self.keeps:
                    self._sums.held(at, key, view.name, devices * share, memory * share)
        if self._sums:
            self._flush_later(FLUSH)

    # -- the access log

    def _log(self, entry: Entry, where: str) -> None:
        """Write a line of the access log, to the journal or (with the next flush) to the file ``where``."""
        shown = ring.as_answer(entry)
        if where == "journal":
            tokens = shown.tokens
            fields = {
                "REQUEST_ID": entry.id, "MODEL": entry.model, "VLLMD_KEY": entry.key, "VLLMD_STATUS": entry.status,
                "VLLMD_SECONDS": f"{entry.seconds:.3f}", "VLLMD_REPLICA": entry.replica,
                "VLLMD_QUEUE_SECONDS": shown.queue_seconds, "VLLMD_LOAD_SECONDS": shown.load_seconds,
                "VLLMD_PROMPT_TOKENS": tokens and tokens.prompt, "VLLMD_ANSWER_TOKENS": tokens and tokens.answer,
            }  # fmt: skip
            kept = {name: str(value) for name, value in fields.items() if value not in (None, "")}
            text = "%s %s %s %s %.3f s"
            access_log.info(text, entry.method, entry.path, entry.model or "-", entry.status, entry.seconds,
                            extra={"journal": kept})  # fmt: skip
            return
        if len(self._lines) < MOST_LINES:
            self._lines.append(encoded(shown).decode() + "\n")
        self._flush_later(FLUSH)

    # -- writing

    def _flush_later(self, seconds: float) -> None:
        """Have what has gathered written in so many seconds, unless that will be done anyway."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._tasks.spawn(self.flush())

    async def flush(self) -> None:
        """Write what has gathered; what cannot be written stays for the next time."""
        async with self._writing:
            lines, self._lines = self._lines, []
            if lines and self.config.access_log not in (None, "journal"):  # which it may have become since
                await asyncio.to_thread(self._append, Path(self.config.access_log), "".join(lines))
            self._add_up()
            sums, arrivals = self._sums, self._arrivals
            self._sums, self._arrivals = Sums(), _no_arrivals()
            if not sums and not arrivals:
                return
            failure = await asyncio.to_thread(self._write, sums, arrivals)
            if failure:
                self._sums.put_back(sums.take())
                arrivals.extend(self._arrivals)
                self._arrivals = arrivals
                self._trouble.say(logging.ERROR, "%s; requests are served all the same", failure)
                self._flush_later(RETRY)
            elif self.trouble:
                self._trouble.over()
                log.info("the record of use is written again")
            self.trouble = failure

    def _write(self, sums: Sums, arrivals: Iterable[Ended]) -> str:
        """Write to the store, in a thread. Returns why it failed, "" if it did not."""
        if self._path is None:
            return ""
        try:
            from vllmd.records.store import StoreError
        except ImportError as error:  # of another version's files, see ``replaced``: this daemon is about to give way
            return f"requests cannot be recorded: {error}"
        store = self._store_at(self._path)  # also if records.usage was switched off since: it was on when this came
        try:
            store.write(sums.rows, arrivals, self.config.usage_days * DAY, self.config.trace_days * DAY)
        except StoreError as error:
            return error.message
        finally:
            if store.began_anew:
                log.error("%s", store.began_anew)
                store.began_anew = ""
        return ""

    def _append(self, path: Path, text: str) -> None:
        """Append to the access log, in a thread; by its name, so that logs may be rotated without telling vllmd."""
        try:
            with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640), "w") as file:
                file.write(text)
            self._log_trouble.over()
            self.log_trouble = ""
        except OSError as error:
            self.log_trouble = f"the access log {path} cannot be written: {error.strerror}"
            self._log_trouble.say(logging.ERROR, "%s", self.log_trouble)

    async def close(self) -> None:
        """Write what has not been written yet, and close the store."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self.flush()
        if self.spans is not None:
            await asyncio.to_thread(self.spans.close)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    def _open_store(self) -> Store:
        """The store, opened once. Raises NotFound where none is kept."""
        if self._path is None or not self.config.usage:
            raise NotFound("use is not recorded here: records.usage is off, or the daemon has no state folder")
        return self._store_at(self._path)

    def _store_at(self, path: Path) -> Store:
        """The store, which is opened once."""
        if self._store is None:
            from vllmd.records.store import Store  # SQLite is not needed for the first answer

            self._store = Store(path)
        return self._store

    # -- answers: requests

    def requests(
        self,
        model: str,
        key: str | None,
        status: str,
        since: float | None,
        failed: bool,
        slower: float | None,
        limit: int,
        caller: Caller,
    ) -> Requests:
        """The last requests that pass the filter, the newest first, and those under way, the oldest first."""
        filter = Filter.of(model, key, status, since, failed, slower)
        ended = (each for each in self._ring.newest() if filter.takes(each) and ring.may_see(caller, each))
        live = sorted(_unfinished(exchange) for exchange in self._live())
        under_way = (each for each in live if filter.takes(each) and ring.may_see(caller, each))
        return Requests(tuple(map(self._as_answer, islice(ended, limit))), tuple(map(ring.as_answer, under_way)))

    def request(self, request_id: str, caller: Caller) -> RequestInFull:
        """One request with its head, and with recorded bodies for an administrator. Raises NotFound.

        A client may have sent one id twice: then the request under way comes before one that has ended.
        """
        live = (entry for _, entry in self._under_way(request_id, caller))
        ended = (entry for entry in self._ring.newest() if entry.id == request_id and ring.may_see(caller, entry))
        entry = next(chain(live, ended), None)
        if entry is None:
            raise NotFound(
                f"no request {request_id[:100]!r} is under way or among the last {self.config.requests} that ended"
            )
        kept = self._bodies.of(entry.number) if ADMIN in caller.scopes else None
        recorded = None if kept is None else bodies.as_answer(kept)
        return RequestInFull(**vars(self._as_answer(entry)), headers=ring.headers(entry), recorded=recorded)

    def cancel(self, request_id: str, caller: Caller) -> Cancelled:
        """End the requests under way that have this id, which clients may have chosen. Raises NotFound."""
        under_way = self._under_way(request_id, caller)
        if not under_way:
            raise NotFound(f"no request {request_id[:100]!r} is under way; vllmctl requests shows those that are")
        for exchange, _ in under_way:
            exchange.cancel(RequestCancelled("an administrator has cancelled the request"))
        return Cancelled(tuple(ring.as_answer(entry) for _, entry in under_way))

    def _under_way(self, request_id: str, caller: Caller) -> list[tuple[Exchange, Entry]]:
        """Requests under way with this id that the caller may see, each with its entry."""
        live = ((exchange, _unfinished(exchange)) for exchange in self._live() if exchange.request.id == request_id)
        return [(exchange, entry) for exchange, entry in live if ring.may_see(caller, entry)]

    async def watch(self, filter: Filter, caller: Caller) -> AsyncIterator[RequestEntry]:
        """Requests that pass the filter, as they end, until the caller stops.

        Nobody reads more than ``MOST_AT_ONCE`` in each ``WATCH_PAUSE`` seconds: where more end, the newest are sent.
        """
        watcher = Watcher(filter, caller)
        self._watchers.add(watcher)
        try:
            while True:
                await watcher.has_entries.wait()
                watcher.has_entries.clear()
                entries = list(watcher.waiting)
                watcher.waiting.clear()
                for entry in entries:
                    yield self._as_answer(entry)
                await asyncio.sleep(WATCH_PAUSE)
        finally:
            self._watchers.discard(watcher)

    # -- recordings

    def record(self, model: str | None, key: str | None, seconds: float, most_bytes: int) -> answers.Recordings:
        """Record the bodies of a model's or a key's requests for so long, ``most_bytes`` of each. Raises BadRequest."""
        self.recordings.start(model or "", key or "", seconds, min(most_bytes, self.config.bodies))
        return self.recorded()

    def stop_recording(self, number: int | None) -> answers.Recordings:
        """End a recording (None: all). The bodies are dropped with the last recording. Raises NotFound."""
        numbers = [each.number for each in self.recordings.present()] if not number else [number]
        ended = [self.recordings.stop(each) for each in numbers]
        if not all(ended):
            raise NotFound(f"there is no recording {number}")
        if not self.recordings.present():
            self._bodies.clear()
        return self.recorded()

    def recorded(self) -> answers.Recordings:
        """The recordings that are running, and how much is kept of them."""
        now = time.monotonic()
        running = (
            answers.Recording(each.number, each.model, each.key, each.most, round(each.until - now, 1))
            for each in self.recordings.present()
        )
        return answers.Recordings(tuple(running), len(self._bodies), self._bodies.size)

    def _keep_bodies(self, number: int, account: Account, received: int) -> None:
        """Keep a request's bodies for as long as the ring keeps its entry, or until newer ones need their memory."""
        recorded = bodies.of(account, received)
        if recorded is not None:
            self._bodies.forget_before(self._ring.oldest)
            self._bodies.keep(number, recorded)

    def _as_answer(self, entry: Entry) -> RequestEntry:
        return ring.as_answer(entry, bodies=self._bodies.of(entry.number) is not None)

    # -- answers: use

    async def usage(self, by: str, since: float | None, until: float | None, key: str | None, model: str) -> Usage:
        """Sums by the dimensions in ``by``; times in Unix time. Raises BadRequest, Unavailable, NotFound."""
        now = time.time()
        since, until = now - USAGE_SHOWN if since is None else since, now if until is None else until
        names = tuple(name.strip() for name in by.split(",") if name.strip())
        store = self._open_store()
        await self.flush()
        from vllmd.records.store import Question, StoreError

        key = "" if key == "-" else key
        try:
            rows = await asyncio.to_thread(store.ask, Question(names, since, until, key, model))
        except StoreError as error:
            if "nothing has been recorded" not in error.message:
                # Why nothing could be written says more than what is missing since then, such as a table.
                raise Unavailable(self.trouble or error.message) from None
            rows = []
        except ValueError as error:
            raise BadRequest(f"by: {error}", param="by") from None
        return Usage(names, since, until, self.trouble, tuple(rows))

    async def spent(self) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
        """The tokens and device seconds that each key has used today, and on the days of this month before (UTC)."""
        if not self.keeps:
            return {}, {}
        from vllmd.records.store import Question, StoreError

        now, store = time.time(), self._open_store()
        today = now // DAY * DAY
        month = now - (time.gmtime(now).tm_mday - 1) * DAY - now % DAY
        use = []
        for since, until in ((today, today + DAY), (month, today)):
            try:
                rows = await asyncio.to_thread(store.ask, Question(("key",), since, until)) if until > since else []
            except StoreError as error:
                if store.path.exists():
                    log.error("limits per day and month begin anew: %s", error.message)
                rows = []
            use.append({row.key or "": (row.prompt + row.answer, row.device_seconds) for row in rows})
        return use[0], use[1]

    async def arrivals(self, since: float, most: int) -> tuple[deque[Arrival], int]:
        """The last ``most`` arrivals since a Unix time, and how many there were. Raises Unavailable, NotFound."""
        store = self._open_store()
        await self.flush()
        from vllmd.records.store import StoreError

        def read() -> tuple[deque[Arrival], int]:
            last, number = deque[Arrival](maxlen=most), 0
            for number, each in enumerate(store.arrivals(since), 1):  # noqa: B007
                last.append(each._replace(model=self._base_of(each.model)))
            return last, number

        try:
            return await asyncio.to_thread(read)
        except StoreError as error:
            raise Unavailable(error.message) from None

    async def trace(self, since: float | None, *, anonymised: bool) -> AsyncIterator[answers.Arrival]:
        """Arrivals since a Unix time, as ``vllmctl simulate`` reads them. Raises Unavailable, NotFound."""
        store = self._open_store()
        await self.flush()
        from vllmd.records.store import StoreError

        since = time.time() - TRACE_SHOWN if since is None else since
        try:
            arrivals = await asyncio.to_thread(lambda: list(store.arrivals(since)))
        except StoreError as error:
            raise Unavailable(error.message) from None
        for each in anonymous(arrivals) if anonymised else arrivals:
            model = each.model if anonymised else self._base_of(each.model)
            yield answers.Arrival(each.at / 1000, model, each.prompt, each.answer, each.key or None)


def _no_arrivals() -> deque[Ended]:
    """None yet; of more than ``MOST_ARRIVALS`` the last ones stay."""
    return deque(maxlen=MOST_ARRIVALS)


def _unfinished(exchange: Exchange) -> Entry:
    """A request that is under way, in the form of an entry of the ring."""
    request, account = exchange.request, exchange.account
    elapsed = exchange.elapsed
    admitted = account.admitted if account is not None else None
    return Entry(
        0, exchange.at, request.id, request.method, request.path, request.route,
        exchange.offer or exchange.model, account.replica if account else "", request.caller.name, request.peer,
        exchange.status, "", "", account.stream if account else False, request.received, exchange.sent,
        None if admitted is None else admitted - exchange.began, 0.0, exchange.first_byte, elapsed,
        account.sends if account else 0, None, request.headers.onward or ring.unsent(request),
    )  # fmt: skip


def store_path(environment: Mapping[str, str], home: Path | None) -> Path | None:
    """The file in which use is recorded, see ``state_file``; VLLMD_USAGE may name another."""
    return state_file(environment, home, "VLLMD_USAGE", "usage/usage.db")
