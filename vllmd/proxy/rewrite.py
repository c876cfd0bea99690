"""Put the name that the client asked for into an answer that has the engine's own.

Only where they differ: an alias or a suffix of a name. In sound JSON the bytes ``"model":"NAME"`` cannot occur
inside a string (the quotes would be escaped), so they are replaced wherever they stand, nested objects included
(Anthropic's and Responses' streams have the name inside another object).
"""

from __future__ import annotations

import json
import re

MAX_HELD = 64 << 20  # bytes; a longer line passes as it is


class Rewriter:
    """Bytes of one answer in, renamed bytes out; a line (all of a JSON answer, one of SSE) is held until whole."""

    def __init__(self, served: str, asked: str) -> None:
        forms = {json.dumps(served), json.dumps(served, ensure_ascii=False)}
        names = b"|".join(re.escape(form.encode()) for form in sorted(forms))
        self._pattern = re.compile(rb'(?<!\\)"model"(\s*):(\s*)(?:' + names + rb")")
        self._asked = json.dumps(asked).encode()
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What of ``data`` and of what was held is whole."""
        end = data.rfind(b"\n") + 1
        if not end and len(self._held) + len(data) <= MAX_HELD:
            self._held += data
            return b""
        end = end or len(data)
        whole, self._held = self._held + data[:end], data[end:]
        return self.renamed(whole)

    def rest(self) -> bytes:
        """What is left at the end."""
        rest, self._held = self._held, b""
        return self.renamed(rest)

    def renamed(self, data: bytes) -> bytes:
        """``data`` with the name replaced."""
        return self._pattern.sub(lambda m: b'"model"' + m[1] + b":" + m[2] + self._asked, data)
