"""The usage of a stream: requested where the client did not, and taken out of the answer again.

An engine tells the usage of a stream only if the request has ``stream_options.include_usage``, and then in an event
of its own before the last one, whose list of choices is empty. Most clients do not set that option. The relay sets it
for them and takes that event out again, so that the client gets the stream that it would have had.

The invariant: no event is held back. What may be held is the beginning of an event that is not whole yet, which no
client could read, and no more of it than a usage is long. Whole events that are no usage pass as the bytes that they
came in, framing and all; ``WithoutUsage`` parses only the others, which are a stream's last ones.

Some servers refuse the option. The request is then sent once more without it, and the option is not sent to that engine
again (``Relay.forward``). Without a usage the tokens are estimated from sizes, and marked so (``tokens.estimate``).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from vllmd.config.types import RequestRules
from vllmd.proxy.exchange import LAST_CHUNK, Exchange, chunk
from vllmd.proxy.framing import Chunked
from vllmd.proxy.peek import ParsedBody, Parts, apply_rules

if TYPE_CHECKING:
    from vllmd.proxy.rewrite import Rewriter

OPTION = b'"stream_options":{"include_usage":true},'
ROUTES = frozenset({"/v1/chat/completions", "/v1/completions"})  # whose streams have a usage only with the option
UNKNOWN_MEMBER = frozenset({400, 422})  # statuses of a server that refuses a member which it does not know
MAX_USAGE_BYTES = 4096  # of the event that tells it
EVENT_END = re.compile(rb"(?:\r?\n){2}")
NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')

# -- requesting


def must_request_usage(parsed: ParsedBody, path: str, rules: RequestRules | None = None) -> bool:
    """Whether the option has to be added, because the client did not set it; ``rules`` may forbid it."""
    if not parsed.stream or path not in ROUTES or (rules is not None and "stream_options" in rules.strip):
        return False
    options = parsed.stream_options[0] if parsed.stream_options else None
    if options is None:
        return True
    return isinstance(options, dict) and options.get("include_usage") is not True


def with_usage_option(parsed: ParsedBody, name: str) -> Parts:
    """The body with ``name`` as its model's, as ``ParsedBody.with_model`` has it, and with the option."""
    if parsed.stream_options:  # its other options are kept; rare, so it may cost reading the body again
        client_options = parsed.stream_options[0]
        options = {**client_options} if isinstance(client_options, dict) else {}
        members: dict[str, object] = {"stream_options": {**options, "include_usage": True}}
        if parsed.name_end:
            members["model"] = name
        return (apply_rules(parsed.raw, RequestRules(set=members)),)
    first, *rest = parsed.with_model(name)
    at = bytes(first[:64]).find(b"{") + 1
    return (OPTION, first, *rest) if not at else (bytes(first[:at]) + OPTION, memoryview(first)[at:], *rest)


# -- taking it out again


class UsageFilter:
    """Takes the event that has nothing but the usage out of one stream."""

    def __init__(self) -> None:
        self._held = b""  # the beginning of an event, perhaps the usage's
        self._inside = False  # what comes next is the rest of an event that began to pass

    @property
    def holds(self) -> bool:
        """Whether bytes are held back, or an event has passed in part."""
        return bool(self._held) or self._inside

    def feed(self, data: bytes) -> bytes:
        """The bytes of ``data``, and of those held back, that can pass now."""
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
        """The bytes held back, at the end of the stream."""
        rest, self._held = self._held, b""
        return rest

    def _rest(self, text: bytes) -> bytes:
        """Hold ``text``, the beginning of an event, if it may become a usage; else return it, to pass at once."""
        if not self._inside and len(text) <= MAX_USAGE_BYTES:
            self._held = text
            return b""
        self._inside = self._inside or bool(text)
        return text


class FilterChain:
    """The usage filter, and behind it the one that replaces the model's name, if there is one."""

    def __init__(self, first: UsageFilter, second: Rewriter | None) -> None:
        self._first, self._second = first, second

    def feed(self, data: bytes) -> bytes:
        """The bytes that can pass now."""
        passed = self._first.feed(data)
        return passed if self._second is None else self._second.feed(passed)

    def rest(self) -> bytes:
        """The bytes held back, at the end of the stream."""
        rest = self._first.rest()
        return rest if self._second is None else self._second.feed(rest) + self._second.rest()


def is_usage(event: bytes) -> bool:
    """Whether an event tells the usage and nothing else."""
    if len(event) > MAX_USAGE_BYTES or NO_CHOICES.search(event) is None or not event.startswith(b"data:"):
        return False
    try:
        data = json.loads(event[len(b"data:") :])
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and data.get("choices") == [] and isinstance(data.get("usage"), dict)


class WithoutUsage:
    """An ``answer.Answer``: a chunked stream that passes as it comes, without the usage that the relay requested.

    It is in one of three modes. As long as the engine's chunks end where its events do (``_between``), they pass
    untouched. From a piece on that may hold the usage, the chunks are taken apart and written anew (``_own``), until
    nothing is held back any more. The last chunk is either the engine's, or (``_writes_end``) ours.
    """

    def __init__(self, exchange: Exchange, framing: Chunked, head: bytes) -> None:
        self._exchange = exchange
        self._framing = framing
        self._head = head
        self._filter = UsageFilter()
        self._between = True  # the next byte begins a chunk, and an event
        self._own: Chunked | None = None  # reads the engine's chunks while they are written anew
        self._writes_end = False  # the last chunk was read by ``_own``

    def more(self, data: bytes) -> None:
        """Pass on what may pass, the first piece along with the head."""
        # ``find``, because ``in`` first takes the bytes for a number, and pays for the exception that they are none.
        if self._between and data.find(b"[]") < 0 and (data[-4:] == b"\n\n\r\n" or self._framing.over):
            self._between = self._framing.between  # whole events, and none of them without choices
        elif data:
            data = self._filtered(data)
        if self._head:
            head, self._head = self._head, b""
            self._exchange.start(200, head + data)
        elif data:
            self._exchange.write(data)

    def _filtered(self, data: bytes) -> bytes:
        """The payload of ``data`` without a usage, in chunks of our own."""
        if not self._between and self._own is None:  # an engine that ends its chunks within events: leave it alone
            return data
        own = self._own = self._own or Chunked(keep=True)
        self._between = False
        self._writes_end = own.scan(data) >= 0
        payload = self._filter.feed(b"".join(own.pieces))
        own.pieces.clear()
        if not self._writes_end and own.between and not self._filter.holds:
            self._between, self._own = True, None
        return chunk(payload) if payload else b""

    def end(self) -> None:
        """Write the last chunk, if the engine's was not passed on, and end the answer."""
        if self._writes_end:
            rest = self._filter.rest()
            self._exchange.write((chunk(rest) if rest else b"") + LAST_CHUNK)
        self._exchange.finish()
