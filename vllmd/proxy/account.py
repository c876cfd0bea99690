"""What is noted of a request for a model on its way, for whoever looks into it later: ``vllmd.records``."""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from vllmd.proxy.http import Request
from vllmd.proxy.tokens import Tokens


class Tap:
    """The beginning of an answer as the engine sent it, framing and all; at most ``most`` bytes."""

    __slots__ = ("chunked", "data", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.data = bytearray()
        self.chunked = False

    def more(self, data: bytes) -> None:
        """Note more of the answer, in bytes as framed by the engine."""
        room = self.most - len(self.data)
        if room > 0:
            self.data += data[:room]


class Trace(NamedTuple):
    """Where a request's span belongs: ids in hex, as a ``traceparent`` has them. ``parent``: "" without one."""

    trace_id: str
    span_id: str
    parent: str

    @property
    def field(self) -> str:
        """The ``traceparent`` that makes an engine's spans children of ours."""
        return f"00-{self.trace_id}-{self.span_id}-01"


class Account:
    """One request: when it was let through, to whom, how often it was sent, what it took.

    ``admitted`` is in seconds of the monotonic clock, None before that; ``replica`` the one that it was sent to last;
    ``answered``: that one's answer has begun, with a byte of its body.
    ``request`` and ``answer`` are there only while bodies are recorded.
    """

    __slots__ = ("admitted", "answer", "answered", "replica", "request", "sends", "stream", "tokens", "trace")

    def __init__(self, *, stream: bool) -> None:
        self.stream = stream
        self.admitted: float | None = None
        self.answered = False
        self.replica = ""
        self.sends = 0
        self.tokens: Tokens | None = None
        self.trace: Trace | None = None
        self.request: bytes | None = None
        self.answer: Tap | None = None

    def admit(self, replica: str) -> None:
        """The request was admitted to this replica."""
        self.admitted, self.answered = time.monotonic(), False
        self.replica = replica
        self.sends += 1


class Recorder(Protocol):
    """What decides whether bodies are recorded."""

    @property
    def active(self) -> bool:
        """Whether bodies of any requests are being recorded."""

    def begin(self, account: Account, model: str, key: str, body: bytes) -> bool:
        """Whether this model's or this key's bodies are recorded; if so note this one, and have the answer's noted."""


class Tracer(Protocol):
    """What decides which requests are traced."""

    def begin(self, request: Request) -> Trace | None:
        """The trace of a request that has just arrived, None if it is not to be recorded."""
