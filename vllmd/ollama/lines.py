"""Translate a stream of OpenAI's events into Ollama's NDJSON. Pure.

The events of a stream differ in one string, the text of a token or two. So when an event has been parsed, its bytes
before and after that string are kept. A later event with the same bytes around a JSON string differs in that text
alone, which is copied into the line as it is, without parsing. That is a tenth of the work, and most of the stream; any
other event is parsed. If many such events come at once, as from an engine that is faster than the daemon, one regular
expression checks all their texts, and one ``join`` makes the lines.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from functools import lru_cache

from vllmd.errors import UpstreamFailed
from vllmd.ollama.answers import Object, Piece, Reply, error_text

PLAIN = rb'[^"\\\x00-\x1f]*+'
STRING = re.compile(rb'"(?!")%b(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})%b)*+"' % (PLAIN, PLAIN))  # one that is not empty
TEXT_KEY = re.compile(rb'"(?:content|text)"[ \t]*:[ \t]*(?=")')
BLANK_TIME, BLANK_TEXT = "\ue000", "\ue001"  # placeholders in a line; no model's name has these characters
ENCODE = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each line
END = b"\n\n"  # of an event
NEVER = b"\n"  # no event begins with it
MAX_EVENT_BYTES = 32 << 20
STRINGS = re.compile(rb"%b(?:\x00%b)*+" % (STRING.pattern, STRING.pattern))  # no JSON string has a NUL


@lru_cache(maxsize=2)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def stamp() -> str:
    """Now, as ``created_at`` has it."""
    now = time.time()
    return f"{_second(int(now))}.{int(now % 1 * 1e6):06d}Z"


class Lines:
    """The lines of one answer: bytes of events in, bytes of lines out."""

    def __init__(self, model: str, reply: Reply, now: Callable[[], str] = stamp) -> None:
        """``model``: the client's name for it."""
        self.reply = reply
        self.over = False  # the last line has been returned
        self._now = now
        self._model = model
        self._held: list[bytes] = []  # the beginning of an event
        self._held_size = 0
        self._before, self._after = NEVER, b""  # the bytes around the text of the last event that was parsed

    def feed(self, data: bytes) -> bytes:
        """The lines for more of the stream. Raises UpstreamFailed for an event that is too large."""
        end = data.rfind(b"\n") + 1
        if not end:
            self._hold(data)
            return b""
        head, rest = data[:end], data[end:]
        if self._held:
            head = b"".join((*self._held, head))
            self._held.clear()
            self._held_size = 0
        if rest:
            self._hold(rest)
        now = self._now()
        made: list[bytes] = []
        texts: list[bytes] = []  # of consecutive events like the last one that was parsed
        before, after = self._before, self._after
        start, end, around = len(before), -len(after), len(before) + len(after)
        for event in head.strip(b"\n").split(END):
            if event.startswith(before) and event.endswith(after) and len(event) > around:
                texts.append(event[start:end])
                continue
            if texts:
                made.append(self._from_texts(texts, now))
                texts = []
            made += [self._from_line(line, now) for line in event.split(b"\n") if line]
            before, after = self._before, self._after
            start, end, around = len(before), -len(after), len(before) + len(after)
        if texts:
            made.append(self._from_texts(texts, now))
        return b"".join(made)

    def feed_pieces(self, pieces: Sequence[bytes]) -> bytes:
        """As ``feed``, for the engine's chunks: mostly each is an event, and the last one is the end of the stream.

        They need not be joined then, only to be split again.
        """
        made = b""
        if not self._held and len(pieces) > 1 and not self._is_alike(pieces[0]):
            # A stream's first event, to learn the bytes around the text.
            made, pieces = self.feed(pieces[0]), pieces[1:]
        before, after = self._before, self._after + END
        start, end = len(before), -len(after)
        texts = [each[start:end] for each in pieces if each.startswith(before) and each.endswith(after)]
        if self._held or len(pieces) - len(texts) > 1 or (len(texts) < len(pieces) and self._is_alike(pieces[-1])):
            return made + self.feed(b"".join(pieces))
        if texts:
            made += self._from_texts(texts, self._now())
        return made if len(texts) == len(pieces) else made + self.feed(pieces[-1])

    def _is_alike(self, event: bytes) -> bool:
        """Whether an event has the same bytes around its text as the last one that was parsed."""
        return event.startswith(self._before) and event.endswith(self._after + END)

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > MAX_EVENT_BYTES:
            raise UpstreamFailed(f"the engine sent an event of more than {MAX_EVENT_BYTES} bytes")

    def end(self) -> bytes:
        """The lines that close the answer, unless an error has."""
        return b"" if self.over else self._last(self._now())

    def whole(self, body: bytes) -> bytes:
        """The one line for an answer that is no stream. Raises UpstreamFailed if it is no JSON object."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise UpstreamFailed("the engine's answer is not a JSON object")
        return self._written(self.reply.whole(answer), self._now())

    def broken(self, why: str) -> bytes:
        """The last line of an answer that failed."""
        self.over, self._before = True, NEVER
        return json.dumps({"error": why}).encode() + b"\n"

    def _from_texts(self, texts: list[bytes], now: str) -> bytes:
        """The lines for events with these bytes between ``_before`` and ``_after``, if each is one JSON string."""
        joined = b"\x00".join(texts)
        if joined.count(b"\x00") >= len(texts) or STRINGS.fullmatch(joined) is None:
            before, after = self._before, self._after
            return b"".join([self._from_line(before + text + after, now) for text in texts])
        if self.reply.texts is not None:
            self.reply.texts.extend(map(json.loads, texts))
        return self._copied(texts, now)

    def _copied(self, texts: list[bytes], now: str) -> bytes:
        """The lines with these JSON strings as their texts."""
        before, between, after = form(self._model, self.reply.piece)
        before += now.encode() + between
        return b"".join((before, (after + before).join(texts), after))

    def _from_line(self, line: bytes, now: str) -> bytes:
        """The lines for one line of the stream, which is parsed."""
        if line.startswith(b":"):
            return self._written(self.reply.heartbeat(), now)
        if not line.startswith(b"data:") or self.over:
            return b""
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return self._last(now)
        return self.parse_event(line, payload, now)

    def parse_event(self, line: bytes, payload: bytes, now: str) -> bytes:
        """The lines for an event that ``_from_texts`` does not cover; its ``payload`` is parsed."""
        try:
            event = json.loads(payload)
        except (ValueError, RecursionError):
            return self.broken("the engine sent an event that is not JSON")
        if not isinstance(event, dict):
            return b""
        if event.get("error") or event.get("object") == "error":
            return self.broken(error_text(event, "the engine failed"))
        objects = list(self.reply.event(event))
        if self.reply.plain and (text := self._learn(line, objects[0])):
            return self._copied([text], now)
        return b"".join([self._written(each, now) for each in objects])

    def _learn(self, line: bytes, read: Object) -> bytes:
        """Keep the bytes around the text of ``line``, and return that text; "" if it is not the text of ``read``."""
        keys = list(TEXT_KEY.finditer(line))
        text = STRING.match(line, keys[0].end()) if len(keys) == 1 else None
        if text is None or self.reply.piece(json.loads(text[0])) != read:
            return b""
        self._before, self._after = line[: text.start()], line[text.end() :]
        return text[0]

    def _written(self, what: Object, now: str) -> bytes:
        return written(self._model, what, now)

    def _last(self, now: str) -> bytes:
        self.over, self._before = True, NEVER
        return b"".join([self._written(each, now) for each in (*self.reply.gathered(), self.reply.last())])


def written(model: str, what: Object, created_at: str) -> bytes:
    """One object of a stream, as a line of JSON."""
    return ENCODE({"model": model, "created_at": created_at, "done": False, **what}).encode() + b"\n"


@lru_cache(maxsize=256)
def form(model: str, piece: Piece) -> tuple[bytes, bytes, bytes]:
    """The bytes of a line with a piece of text: before the time, between that and the text, after the text."""
    before, rest = written(model, piece(BLANK_TEXT), BLANK_TIME).split(json.dumps(BLANK_TIME).encode())
    between, after = rest.split(json.dumps(BLANK_TEXT).encode())
    return before + b'"', b'"' + between, after
