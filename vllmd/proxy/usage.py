"""The usage of a stream: asked for where the client did not, and taken out of the answer again.

An engine tells the usage of a stream only where the request has ``stream_options.include_usage``, and then in an event
of its own before the last one, whose list of choices is empty. Most clients do not ask, so we do, and take that event
out again: the client gets the stream that it would have had.

The invariant: no event is held back. What may be held is the beginning of an event that is not whole yet, which no
client could read, and no more of it than a usage is long. As long as whole events come that are not the usage's, they
pass as the bytes that they came in, framing and all; ``WithoutUsage`` looks closer only at the others, which are a
stream's last ones.

Some servers refuse the option. The request is then sent once more without it, and that engine is not asked again
(``Relay.forward``). What nobody tells is reckoned from sizes and marked as such (``tokens.reckoned``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllmd.proxy.exchange import LAST_CHUNK, Exchange, chunk
from vllmd.proxy.framing import Chunked
from vllmd.proxy.gate import Rules
from vllmd.proxy.peek import Asked, Parts, ruled

if TYPE_CHECKING:
    from vllmd.proxy.rewrite import Rewriter

OPTION = b'"stream_options":{"include_usage":true},'
ASKED_ON = frozenset({"/v1/chat/completions", "/v1/completions"})  # routes whose streams tell no usage unasked
UNKNOWN_MEMBER = frozenset({400, 422})  # statuses of a server that refuses a member which it does not know
LONGEST_USAGE = 4096  # bytes of the event that tells it
EVENT_END = re.compile(rb"(?:\r?\n){2}")
NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')

# -- asking


def to_be_asked(asked: Asked, path: str, rules: Rules | None = None) -> bool:
    """Whether the usage of the answer has to be asked for, because the client did not; ``rules`` may forbid it."""
    if not asked.stream or path not in ASKED_ON or (rules is not None and "stream_options" in rules.strip):
        return False
    options = asked.stream_options[0] if asked.stream_options else None
    if options is None:
        return True
    return isinstance(options, dict) and options.get("include_usage") is not True


@dataclass(frozen=True)
class _Options:
    """Rules (``gate.Rules``) that give a request these ``stream_options``."""

    set: Mapping[str, object]
    strip: tuple[str, ...] = ()
    default: Mapping[str, object] = field(default_factory=dict)
    system: str = ""


def asking(asked: Asked, name: str) -> Parts:
    """The body with ``name`` as its model's, as ``Asked.renamed`` has it, that asks for the usage."""
    if asked.stream_options:  # others of its options are kept; rare, so it may cost a second look at the body
        options = asked.stream_options[0]
        told = {**options, "include_usage": True} if isinstance(options, dict) else {"include_usage": True}
        members: dict[str, object] = {"stream_options": told, **({"model": name} if asked.end else {})}
        return (ruled(asked.body, _Options(members)),)
    first, *rest = asked.renamed(name)
    at = bytes(first[:64]).find(b"{") + 1
    return (OPTION, first, *rest) if not at else (bytes(first[:at]) + OPTION, memoryview(first)[at:], *rest)


# -- taking it out again


class UsageFilter:
    """Events of one stream in, the same without the one that has nothing but the usage out."""

    def __init__(self) -> None:
        self._held = b""  # the beginning of an event, perhaps the usage's
        self._inside = False  # what comes next is the rest of an event that began to pass

    @property
    def holds(self) -> bool:
        """Whether something waits for more to come."""
        return bool(self._held) or self._inside

    def feed(self, data: bytes) -> bytes:
        """What of ``data`` and of what was held can be told already."""
        text, self._held = self._held + data, b""
        ends = [match.end() for match in EVENT_END.finditer(text)]
        if not ends:
            return self._rest(text)
        kept, start = [], 0
        if self._inside:
            kept.append(text[: ends[0]])
            start, ends, self._inside = ends[0], ends[1:], False
        for end in ends:
            event, start = text[start:end], end
            if not is_usage(event):
                kept.append(event)
        return b"".join(kept) + self._rest(text[start:])

    def rest(self) -> bytes:
        """What is left at the end."""
        rest, self._held = self._held, b""
        return rest

    def _rest(self, text: bytes) -> bytes:
        """Of what is no whole event, what goes out at once."""
        if not self._inside and len(text) <= LONGEST_USAGE:
            self._held = text
            return b""
        self._inside = self._inside or bool(text)
        return text


class Both:
    """A filter behind a filter."""

    def __init__(self, first: UsageFilter, second: Rewriter | None) -> None:
        self._first, self._second = first, second

    def feed(self, data: bytes) -> bytes:
        """What of the data can be told already."""
        passed = self._first.feed(data)
        return passed if self._second is None else self._second.feed(passed)

    def rest(self) -> bytes:
        """What is left at the end."""
        rest = self._first.rest()
        return rest if self._second is None else self._second.feed(rest) + self._second.rest()


def is_usage(event: bytes) -> bool:
    """Whether an event tells the usage and nothing else."""
    if len(event) > LONGEST_USAGE or NO_CHOICES.search(event) is None or not event.startswith(b"data:"):
        return False
    try:
        told = json.loads(event[len(b"data:") :])
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and told.get("choices") == [] and isinstance(told.get("usage"), dict)


class WithoutUsage:
    """An ``answer.Answer``: a chunked stream that passes as it comes, but for the usage that we have asked for."""

    def __init__(self, exchange: Exchange, framing: Chunked, head: bytes) -> None:
        self._exchange = exchange
        self._framing = framing
        self._head = head
        self._filter = UsageFilter()
        self._between = True  # what comes next begins with a chunk, and with an event
        self._own: Chunked | None = None  # while we look closer
        self._ours_to_end = False

    def more(self, data: bytes) -> None:
        """Pass it on, the first piece along with the head."""
        if self._between and b"[]" not in data and (data[-4:] == b"\n\n\r\n" or self._framing.over):
            self._between = self._framing.between
        elif data:
            data = self._closer(data)
        if self._head:
            head, self._head = self._head, b""
            self._exchange.start(200, head + data)
        elif data:
            self._exchange.write(data)

    def _closer(self, data: bytes) -> bytes:
        """What of ``data`` the client gets, in chunks of our own."""
        if not self._between and self._own is None:  # an engine that ends its chunks within events: leave it alone
            return data
        own = self._own = self._own or Chunked(keep=True)
        self._between = False
        self._ours_to_end = own.scan(data) >= 0
        payload = self._filter.feed(b"".join(own.pieces))
        own.pieces.clear()
        if not self._ours_to_end and own.between and not self._filter.holds:
            self._between, self._own = True, None
        return chunk(payload) if payload else b""

    def end(self) -> None:
        """Everything has been passed on."""
        if self._ours_to_end:
            rest = self._filter.rest()
            self._exchange.write((chunk(rest) if rest else b"") + LAST_CHUNK)
        self._exchange.finish()
