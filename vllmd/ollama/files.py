"""Bodies of megabytes: images and sounds are taken out before the body is read, and put back into what is sent.

They are long runs of base64, which no reader of JSON has to look at: a run has no quotes and no escapes, so it may be
replaced by a mark wherever it stands, and whatever the text around it becomes, the mark is where the run belongs. The
mark is a new random one for each body, so no client has it in its text. What remains is read and written at once.
"""

from __future__ import annotations

import os
import re

from vllmd.errors import TooLarge
from vllmd.proxy.peek import Turns

RUN = re.compile(rb"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/=_-]{32768,}")
SLICE_BYTES = 1 << 20  # bytes looked through between two turns of the loop
LEFT = 64  # bytes of a run that stay where they are: they tell what kind of file it is
MOST_TEXT = 8 << 20  # bytes of what is no file; more than any model reads, and a tenth of a second to translate


class Files:
    """The images of one body, kept apart from its JSON while that is translated."""

    def __init__(self) -> None:
        self._mark = os.urandom(12).hex().encode()
        self._runs: list[memoryview] = []

    def take_out(self, body: bytes) -> Turns[bytes]:
        """The body with marks in the places of its files. Raises TooLarge if there is too much else in it."""
        view, kept, done = memoryview(body), list[bytes | memoryview](), 0
        for at in range(0, len(body), SLICE_BYTES):
            for run in RUN.finditer(body[at : at + SLICE_BYTES]):
                start, end = at + run.start() + LEFT, at + run.end()
                kept += [view[done:start], b"%b.%d." % (self._mark, len(self._runs))]
                self._runs.append(view[start:end])
                done = end
            yield
        kept.append(view[done:])
        if sum(map(len, kept)) > MOST_TEXT:
            raise TooLarge(f"the body has more than {MOST_TEXT} bytes that are no image or sound")
        return b"".join(kept)

    def put_back(self, text: bytes) -> bytes:
        """The text with its files where their marks are."""
        parts: list[bytes | memoryview] = list(re.split(rb"%b\.(\d+)\." % self._mark, text))
        parts[1::2] = [self._runs[int(bytes(number))] for number in parts[1::2]]
        return b"".join(parts)
