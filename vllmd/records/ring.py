"""The last requests, in memory: heads, times, sizes, tokens. Never a secret, and no body unless that was switched on.

Noting one must cost next to nothing, so an entry is a tuple of what the exchange has at hand, and is made an answer
only when an operator looks (``as_answer``). A head is kept as the bytes that went on to the engine: the client's key
and cookies are not in them (``proxy.forward.KEPT_BACK``), and what else looks like a secret is cut out when it is
shown.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from vllmd.api.answers import RequestEntry, RequestTokens
from vllmd.proxy.access import Caller
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.http import Peer, Request
from vllmd.proxy.tokens import Tokens

LONGEST_HEAD = 2048  # bytes that are kept of one
SECRET = r"(?i)key|token|secret|auth|passw|cookie|session|credential|signature"
CUT = "(cut)"
AGENT = rb"(?im)^user-agent:[ \t]*([^\r\n]{1,200})"
_new = tuple.__new__
GONE = 499  # the status, as it is counted, of a request whose client left before its answer


class Entry(NamedTuple):
    """One request. Times in seconds, ``at`` (of its arrival) in Unix time; sizes in bytes."""

    number: int
    at: float
    id: str
    method: str
    path: str
    route: str
    model: str
    replica: str
    key: str
    peer: Peer
    status: int
    error: str
    message: str
    stream: bool
    received: int
    sent: int
    waited: float | None
    loading: float
    first_byte: float | None
    seconds: float
    sends: int
    tokens: Tokens | None
    head: bytes


def field(*names: str) -> Callable[[Entry], Any]:
    """A function that gives this field of an entry, or a tuple of these; by its place, which is faster than by name."""
    return itemgetter(*map(Entry._fields.index, names))


class Ring:
    """The last ``size`` requests for models, in memory."""

    def __init__(self, size: int, loading: Callable[[str, float, float], float] = lambda replica, began, ended: 0.0):
        """``loading``: of the time between two moments (monotonic) how much a replica has spent in coming up."""
        self._entries: deque[Entry] = deque(maxlen=size)
        self._numbers = itertools.count(1)
        self._loading = loading

    def resize(self, size: int) -> None:
        """Keep so many from now on."""
        if size != self._entries.maxlen:
            self._entries = deque(self._entries, maxlen=size)

    def note(self, exchange: Exchange) -> Entry:
        """Note a request that has ended, and return its entry."""
        request, account = exchange.request, exchange.account
        elapsed = time.monotonic() - exchange.began
        head = request.headers.onward or unsent(request)
        waited, loading, replica, stream, sends, tokens = None, 0.0, "", False, 0, None
        if account is not None:
            replica, stream, sends, tokens = account.replica, account.stream, account.sends, account.tokens
            if account.admitted is not None:
                waited = account.admitted - exchange.began
                if waited > 0.01:  # nothing came up for a request that did not wait
                    loading = self._loading(replica, exchange.began, account.admitted)
        entry = _new(  # past the constructor, which costs as much again as all the rest
            Entry,
            (
                next(self._numbers),
                exchange.at,
                request.id,
                request.method,
                request.path,
                request.route,
                exchange.offer or exchange.model,
                replica,
                request.caller.name,
                request.peer,
                exchange.status or GONE,
                exchange.error,
                exchange.message,
                stream,
                request.received,
                exchange.sent,
                waited,
                loading,
                exchange.first_byte,
                elapsed,
                sends,
                tokens,
                head if len(head) <= LONGEST_HEAD else head[:LONGEST_HEAD],
            ),
        )
        self._entries.append(entry)
        return entry

    def newest(self) -> Iterator[Entry]:
        """All of them, the last one first."""
        return reversed(self._entries)

    @property
    def oldest(self) -> int:
        """The number of the oldest one, 0 if there is none."""
        return self._entries[0].number if self._entries else 0


def unsent(request: Request) -> bytes:
    """The head that is kept of a request that no engine was sent: the client's program only."""
    agent = request.headers.get("user-agent")
    return f"user-agent: {agent}".encode("latin-1", "replace") if agent else b""


class Filter(NamedTuple):
    """A filter of requests; "" and None take any."""

    model: str = ""
    key: str | None = None  # "": requests without a key
    status: str = ""  # 429, 5xx
    since: float = 0.0  # Unix time
    failed: bool = False  # only those
    slower: float = 0.0  # seconds

    @classmethod
    def of(
        cls, model: str, key: str | None, status: str, since: float | None, failed: bool, slower: float | None
    ) -> Filter:
        """A filter from a query's parameters, where ``-`` means requests without a key."""
        return cls(model, "" if key == "-" else key, status, since or 0.0, failed, slower or 0.0)

    def takes(self, entry: Entry) -> bool:
        """Whether the filter lets the entry through."""
        return (
            entry.at >= self.since
            and (not self.model or self.model in (entry.model, entry.replica))
            and (self.key is None or self.key == entry.key)
            and (not self.status or _has_status(entry.status, self.status))
            and (not self.failed or failed(entry))
            and entry.seconds >= self.slower
        )


def _has_status(status: int, wanted: str) -> bool:
    return str(status).startswith(wanted[0]) if wanted.endswith("xx") else str(status) == wanted


def failed(entry: Entry) -> bool:
    """Whether the client got an error or no whole answer, though it waited; lists, use and spans count by this."""
    return entry.error not in ("", "ClientGone") or (entry.status >= 400 and entry.status != GONE)


def may_see(caller: Caller, entry: Entry) -> bool:
    """Whether the caller may see a request: by its key, and by its model."""
    return caller.may_see_key(entry.key) and (caller.models is None or caller.may_use(entry.model))


def as_answer(entry: Entry, *, bodies: bool = False) -> RequestEntry:
    """The entry as an answer, without head and bodies. ``bodies``: whether those are kept."""
    took, waited = entry.tokens, entry.waited
    tokens = None if took is None else RequestTokens(took.prompt, took.cached, took.answer, took.estimated)
    return RequestEntry(
        id=entry.id,
        number=entry.number,
        at=round(entry.at, 3),
        method=entry.method,
        path=entry.path,
        model=entry.model,
        replica=entry.replica,
        key=entry.key,
        client=str(entry.peer),
        agent=match[1].decode("latin-1").strip() if (match := re.search(AGENT, entry.head)) else "",
        status=entry.status,
        error=entry.error,
        message=entry.message,
        stream=entry.stream,
        received=entry.received,
        sent=entry.sent,
        queue_seconds=None if waited is None else round(max(0.0, waited - entry.loading), 6),
        load_seconds=None if waited is None else round(entry.loading, 6),
        first_byte_seconds=None if entry.first_byte is None else round(entry.first_byte, 6),
        seconds=round(entry.seconds, 6),
        retries=max(0, entry.sends - 1),
        tokens=tokens,
        bodies=bodies,
    )


def headers(entry: Entry) -> tuple[tuple[str, str], ...]:
    """The head's fields as they went on to the engine, secrets cut out."""
    fields = []
    for line in entry.head.decode("latin-1").split("\r\n"):
        name, mark, value = line.partition(":")
        if mark:
            fields.append((name, CUT if re.search(SECRET, name) else value.strip()))
    return tuple(fields)
