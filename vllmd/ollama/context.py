"""The conversation so far as the list of numbers that Ollama calls ``context``.

Ollama's are the tokens of it. Clients send back what they got and know nothing of what is in it, so these are the
conversation's text instead, which any engine can take: a mark, how many bytes there are, and three bytes a number.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

from vllmd.errors import BadRequest

MARK = 0x764C4D
MOST = 256 << 10  # bytes of a conversation's text; a longer one is not given
WIDTH = 3  # bytes in a number

Turn = tuple[str, str]  # role, text


def encoded(conversation: Sequence[Turn]) -> list[int] | None:
    """The numbers; None for a conversation that is too long for them."""
    text = json.dumps(conversation).encode()
    if len(text) > MOST:
        return None
    packed = zlib.compress(text)
    padded = packed + b"\0" * (-len(packed) % WIDTH)
    return [MARK, len(packed), *(int.from_bytes(padded[i : i + WIDTH]) for i in range(0, len(padded), WIDTH))]


def decoded(numbers: Any) -> list[Turn]:
    """The conversation; none for no numbers. Raises BadRequest for numbers that did not come from here."""
    if not numbers and (numbers is None or isinstance(numbers, list)):
        return []
    try:
        mark, size, *rest = numbers
        if mark != MARK or not 0 < size <= len(rest) * WIDTH:
            raise ValueError
        packed = b"".join(number.to_bytes(WIDTH) for number in rest)[:size]
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed, MOST)
        if not unpacker.eof:
            raise ValueError
        return [(str(role), str(content)) for role, content in json.loads(text)]
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, zlib.error):
        message = "'context' must be the numbers that an earlier answer of this server had; send messages to /api/chat"
        raise BadRequest(message, param="context") from None
