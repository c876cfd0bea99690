"""A stream of OpenAI's events in, NDJSON out. Pure.

The events of a stream differ in one string, the text of a token or two. So when an event has been read whole, its
bytes before and after that string are kept: a later one with the same bytes around a JSON string says the same with
another text, and its text goes on as it is written, without being read. That is a tenth of the work, and most of the
stream; whatever looks different is read whole again.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from functools import lru_cache

from vllmd.errors import UpstreamFailed
from vllmd.ollama.answers import Object, Reply, error_text

STRING = re.compile(rb'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+"')  # one that is not empty
TEXT_KEY = re.compile(rb'"(?:content|text)"[ \t]*:[ \t]*(?=")')
BLANK_TIME, BLANK_TEXT = "\ue000", "\ue001"  # stand in a line's pattern for what differs; no model's name has them
MOST_LINE = 32 << 20  # bytes of one event


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
        self._before = self._after = b""  # the bytes around the text of an event like those
        self._line = (b"", b"", b"")  # before the time of its line, between that and the text, after the text

    def feed(self, data: bytes) -> bytes:
        """What follows from more of the stream. Raises UpstreamFailed for an event that is endless."""
        head, newline, rest = data.rpartition(b"\n")
        if not newline:
            self._hold(data)
            return b""
        if self._held:
            head = b"".join((*self._held, head))
            self._held.clear()
            self._held_size = 0
        if rest:
            self._hold(rest)
        now = self._now().encode()
        return b"".join([self._of(line, now) for line in head.split(b"\n") if line and line != b"\r"])

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_size += len(data)
        if self._held_size > MOST_LINE:
            raise UpstreamFailed(f"the engine sent an event of more than {MOST_LINE} bytes")

    def end(self) -> bytes:
        """The lines that close the answer, unless an error has."""
        return b"" if self.over else self._last()

    def whole(self, body: bytes) -> bytes:
        """The one line that an answer becomes that is no stream. Raises UpstreamFailed if it is no such answer."""
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise UpstreamFailed("the engine's answer is not a JSON object")
        return self._written(self.reply.whole(answer))

    def broken(self, why: str) -> bytes:
        """The line that says that there is no more to come."""
        self.over, self._before = True, b""
        return json.dumps({"error": why}).encode() + b"\n"

    def _of(self, line: bytes, now: bytes) -> bytes:
        """What one line of the stream becomes, that came at this time."""
        size = len(self._before)
        if size and line.startswith(self._before) and line.endswith(self._after):
            text = line[size : len(line) - len(self._after)]
            if STRING.fullmatch(text):
                if self.reply.heard is not None:
                    self.reply.heard.append(json.loads(text))
                before, between, after = self._line
                return b"".join((before, now, between, text, after))
        if line.startswith(b":"):
            return self._written(self.reply.sign_of_life())
        if not line.startswith(b"data:") or self.over:
            return b""
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return self._last()
        return self._read(line, payload)

    def _read(self, line: bytes, payload: bytes) -> bytes:
        try:
            event = json.loads(payload)
        except (ValueError, RecursionError):
            return self.broken("the engine sent an event that is not JSON")
        if not isinstance(event, dict):
            return b""
        if event.get("error") or event.get("object") == "error":
            return self.broken(error_text(event, "the engine failed"))
        objects = list(self.reply.event(event))
        if self.reply.plain:
            self._learn(line, objects[0])
        return b"".join(map(self._written, objects))

    def _learn(self, line: bytes, read: Object) -> None:
        """Remember what is around the text of ``line``, if its text is what it was ``read`` as."""
        keys = TEXT_KEY.findall(line)
        if len(keys) != 1 or (key := TEXT_KEY.search(line)) is None or (text := STRING.match(line, key.end())) is None:
            return
        if self.reply.piece(json.loads(text[0])) != read:
            return
        self._before, self._after = line[: text.start()], line[text.end() :]
        pattern = self._object(self.reply.piece(BLANK_TEXT), BLANK_TIME)
        before, rest = pattern.split(json.dumps(BLANK_TIME).encode())
        between, after = rest.split(json.dumps(BLANK_TEXT).encode())
        self._line = before + b'"', b'"' + between, after

    def _written(self, what: Object) -> bytes:
        return self._object(what, self._now())

    def _object(self, what: Object, created_at: str) -> bytes:
        line = {"model": self._model, "created_at": created_at, "done": False, **what}
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"

    def _last(self) -> bytes:
        self.over, self._before = True, b""
        return b"".join(map(self._written, (*self.reply.gathered(), self.reply.last())))
