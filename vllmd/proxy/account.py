"""Notes about one request for a model, for the request log, traces and ``vllmd.records``."""

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
    """One request: when it was admitted, to which replica it was sent last, how often, and its tokens.

    ``admitted`` is in seconds of the monotonic clock, None before. ``answered``: the first byte of the replica's answer
    has come. ``request`` and ``answer`` are set only while bodies are recorded.
    """

    __slots__ = ("admitted", "answer", "answered", "replica", "request", "sends", "stream", "tokens", "trace")

    def __init__(self, stream: bool) -> None:
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
    """Decides whether bodies are recorded."""

    @property
    def active(self) -> bool:
        """Whether bodies of any requests are being recorded."""

    def begin(self, account: Account, model: str, key: str, body: bytes) -> bool:
        """Whether the bodies of this model or key are recorded; if so, notes ``body``, and sets ``account.answer``."""


class Tracer(Protocol):
    """Decides which requests are traced."""

    def begin(self, request: Request) -> Trace | None:
        """The trace of a request that has just arrived, None if it is not traced."""
