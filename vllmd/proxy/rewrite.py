"""Put the name that the client asked for into an answer that has the engine's own.

Only where they differ: an alias or a suffix of a name. In sound JSON the bytes ``"model":"NAME"`` cannot occur
inside a string (the quotes would be escaped), so they are replaced wherever they stand, nested objects included
(Anthropic's and Responses' streams have the name inside another object).

Only what may be the beginning of those bytes is held back until more has come. Holding a whole line would be simpler,
but an event may have 30 MiB (images, audio): the client would wait, and each piece would mean another search through
it. So the time for an answer grows with its bytes, however it is cut.
"""

from __future__ import annotations

import json
import re

KEY = b'"model"'
MOST_SPACE = 16  # bytes of white space before and after the colon; JSON is written with one at most
AFTER_KEY = re.compile(rb'"model"[ \t]{0,16}(:[ \t]{0,16})?')


class Rewriter:
    """Replaces the name ``served`` by ``requested`` in the bytes of one answer."""

    def __init__(self, served: str, requested: str) -> None:
        self._forms = sorted(form.encode() for form in {json.dumps(served), json.dumps(served, ensure_ascii=False)})
        names = b"|".join(re.escape(form) for form in self._forms)
        self._pattern = re.compile(rb'(?<!\\)"model"([ \t]{0,16}):([ \t]{0,16})(?:' + names + rb")")
        self._longest = len(KEY) + 1 + 2 * MOST_SPACE + max(map(len, self._forms))
        self._requested = json.dumps(requested).encode()
        self._held = b""  # perhaps the beginning of a name
        self._escape = b""  # the backslash before it, if there is one

    def feed(self, data: bytes) -> bytes:
        """The bytes of ``data``, and of those held back, that can pass now."""
        text = self._escape + self._held + data if self._held or self._escape else data
        skip, cut = len(self._escape), self._tail(text)
        whole, self._held = text[:cut], text[cut:]
        self._escape = whole[-1:] if whole.endswith(b"\\") else b""
        return self.renamed(whole)[skip:]

    def rest(self) -> bytes:
        """The bytes held back, at the end of the answer."""
        rest, self._held = self._held, b""
        return rest

    def renamed(self, data: bytes) -> bytes:
        """``data`` with the name replaced."""
        return self._pattern.sub(lambda m: b'"model"' + m[1] + b":" + m[2] + self._requested, data)

    def _tail(self, text: bytes) -> int:
        """The index in ``text`` where an unfinished name may begin; its length if there is none."""
        if text.endswith(b"\n"):  # of an event, or of an answer
            return len(text)
        at = text.find(b'"', max(0, len(text) - 2 * self._longest))
        while at >= 0:
            if whole := self._pattern.match(text, at):  # its last quote begins nothing
                at = whole.end() - 1
            elif self._may_begin(text[at:]):
                return at
            at = text.find(b'"', at + 1)
        return len(text)

    def _may_begin(self, tail: bytes) -> bool:
        if len(tail) < len(KEY):
            return KEY.startswith(tail)
        key = AFTER_KEY.match(tail)
        if key is None:
            return False
        rest = tail[key.end() :]
        if key[1] is None:
            return not rest
        return any(len(rest) < len(form) and form.startswith(rest) for form in self._forms)
