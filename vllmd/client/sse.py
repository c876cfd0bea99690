"""Server-sent events of OpenAI's streams: bytes in, chunks out; and what text a chunk carries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vllmd.client.errors import StreamFailed, of_chunk

DONE = "[DONE]"


class Events:
    """Takes an answer's bytes as they come, however they are cut."""

    def __init__(self) -> None:
        self._rest = bytearray()  # a line that is not whole yet
        self._scanned = 0  # bytes of it that were searched for its end
        self._data: list[str] = []
        self.done = False

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The chunks that are now whole. Raises StreamFailed for one that is an error, or is not JSON."""
        self._rest += data
        while (end := self._rest.find(b"\n", self._scanned)) >= 0:
            text = self._rest[:end].rstrip(b"\r").decode("utf-8", "replace")
            del self._rest[: end + 1]
            self._scanned = 0
            if text.startswith("data:"):
                self._data.append(text[5:].removeprefix(" "))
            elif not text and self._data:
                event, self._data = "\n".join(self._data), []
                if event == DONE:
                    self.done = True
                elif not self.done:
                    yield chunk_of(event)
        self._scanned = len(self._rest)

    def end(self) -> None:
        """The answer ended. Raises StreamFailed unless it said ``[DONE]``."""
        if not self.done:
            raise StreamFailed("the answer broke off: it ended without [DONE]")


def chunk_of(event: str) -> dict[str, Any]:
    """The chunk in an event's data. Raises StreamFailed for one that is an error, or no JSON object."""
    try:
        chunk = json.loads(event)
    except ValueError:
        raise StreamFailed(f"the answer holds an event that is not JSON: {event[:200]!r}") from None
    if not isinstance(chunk, dict):
        raise StreamFailed(f"the answer holds an event that is no object: {event[:200]!r}")
    if chunk.get("error"):
        raise of_chunk(chunk["error"])
    return chunk


def text_of(chunk: dict[str, Any]) -> str:
    """What a chunk adds to the answer; "" for one without choices, such as the last one with the usage."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        return str(delta.get("content") or choice.get("text") or "")
    return ""
