"""A stream of OpenAI's events in, NDJSON out. Pure.

The events of a stream differ in one string, the text of a token or two. So when an event has been read whole, its
bytes before and after that string are kept: a later one with the same bytes around a JSON string says the same with
another text, and its text goes on as it is written, without being read. That is a tenth of the work, and most of the
stream; whatever looks different is read whole again. Where many such events come at once, as from an engine that is
faster than we, one look tells of all their texts that they are sound, and one step puts what is between them.
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
BLANK_TIME, BLANK_TEXT = "\ue000", "\ue001"  # stand in a line's pattern for what differs; no model's name has them
WRITTEN = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make another one for each line
END = b"\n\n"  # of an event
NEVER = b"\n"  # what no event begins with
MOST_LINE = 32 << 20  # bytes of one event
STRINGS = re.compile(rb"%b(?:\x00%b)*+" % (STRING.pattern, STRING.pattern))  # no string holds what is between them


@lru_cache(maxsize=2)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def stamp() -> str:
    """Now, as ``created_at`` has it."""
    now = time.time()
    return f"{_second(int(now))}.{int(now % 1 * 1e6):06d}Z"


class Lines:
    """The lines of one answer. Bytes of the events in, bytes of lines out."""

    def __init__(self, model: str, reply: Reply, now: Callable[[], str] = stamp) -> None:
        """``model``: what the client called it."""
        self.reply = reply
        self.over = False  # the last line has been given
        self._now = now
        self._model = model
        self._held: list[bytes] = []  # of an event that has not come whole
        self._held_size = 0
        self._before, self._after = NEVER, b""  # the bytes around the text of an event like the last one

    def feed(self, data: bytes) -> bytes:
        """What follows from more of the stream. Raises UpstreamFailed for an event that is endless."""
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
        texts: list[bytes] = []  # of events in a row that look like the last one that was read
        before, after = self._before, self._after
        start, end, around = len(before), -len(after), len(before) + len(after)
        for event in head.strip(b"\n").split(END):
            if event.startswith(before) and event.endswith(after) and len(event) > around:
                texts.append(event[start:end])
                continue
            if texts:
                made.append(self._alike(texts, now))
                texts = []
            made += [self._other(line, now) for line in event.split(b"\n") if line]
            before, after = self._before, self._after
            start, end, around = len(before), -len(after), len(before) + len(after)
        if texts:
            made.append(self._alike(texts, now))
        return b"".join(made)

    def feed_pieces(self, pieces: Sequence[bytes]) -> bytes:
        """The same of a stream that is cut as the engine cut it: mostly a piece is an event, the last one the end.

        Nothing is put together then only to be taken apart again.
        """
        made = b""
        if not self._held and len(pieces) > 1 and not self._is_alike(pieces[0]):
            made, pieces = self.feed(pieces[0]), pieces[1:]  # a stream's first event, which tells what others look like
        before, after = self._before, self._after + END
        start, end = len(before), -len(after)
        texts = [each[start:end] for each in pieces if each.startswith(before) and each.endswith(after)]
        if self._held or len(pieces) - len(texts) > 1 or (len(texts) < len(pieces) and self._is_alike(pieces[-1])):
            return made + self.feed(b"".join(pieces))
        if texts:
            made += self._alike(texts, self._now())
        return made if len(texts) == len(pieces) else made + self.feed(pieces[-1])

    def _is_alike(self, event: bytes) -> bool:
        """Whether an event looks like the last one that was read."""
        return event.startswith(self._before) and event.endswith(self._after + END)

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > MOST_LINE:
            raise UpstreamFailed(f"the engine sent an event of more than {MOST_LINE} bytes")

    def end(self) -> bytes:
        """The lines that close the answer, unless an error has."""
        return b"" if self.over else self._last(self._now())

    def whole(self, body: bytes) -> bytes:
        """The one line that an answer becomes that is no stream. Raises UpstreamFailed if it is no such answer."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise UpstreamFailed("the engine's answer is not a JSON object")
        return self._written(self.reply.whole(answer), self._now())

    def broken(self, why: str) -> bytes:
        """The line that says that there is no more to come."""
        self.over, self._before = True, NEVER
        return json.dumps({"error": why}).encode() + b"\n"

    def _alike(self, texts: list[bytes], now: str) -> bytes:
        """What events become that have, around these JSON strings, the bytes of the last one that was read."""
        joined = b"\x00".join(texts)
        if joined.count(b"\x00") >= len(texts) or STRINGS.fullmatch(joined) is None:
            before, after = self._before, self._after
            return b"".join([self._other(before + text + after, now) for text in texts])
        if self.reply.heard is not None:
            self.reply.heard.extend(map(json.loads, texts))
        return self._moved(texts, now)

    def _moved(self, texts: list[bytes], now: str) -> bytes:
        """The lines of sound JSON strings."""
        before, between, after = form(self._model, self.reply.piece)
        before += now.encode() + between
        return b"".join((before, (after + before).join(texts), after))

    def _other(self, line: bytes, now: str) -> bytes:
        """What a line of the stream becomes that is not like the last event."""
        if line.startswith(b":"):
            return self._written(self.reply.heartbeat(), now)
        if not line.startswith(b"data:") or self.over:
            return b""
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return self._last(now)
        return self._read(line, payload, now)

    def _read(self, line: bytes, payload: bytes, now: str) -> bytes:
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
            return self._moved([text], now)
        return b"".join([self._written(each, now) for each in objects])

    def _learn(self, line: bytes, read: Object) -> bytes:
        """Remember what is around the text of ``line``, which is given, if its text is what it was ``read`` as."""
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
    return WRITTEN({"model": model, "created_at": created_at, "done": False, **what}).encode() + b"\n"


@lru_cache(maxsize=256)
def form(model: str, piece: Piece) -> tuple[bytes, bytes, bytes]:
    """The bytes of a line with a piece of text: before the time, between that and the text, after the text."""
    before, rest = written(model, piece(BLANK_TEXT), BLANK_TIME).split(json.dumps(BLANK_TIME).encode())
    between, after = rest.split(json.dumps(BLANK_TEXT).encode())
    return before + b'"', b'"' + between, after
