"""Deterministic tokens and answers, so that a test can compare bytes.

A token is a word with the white space before it, at most 64 bytes long. Its
number is those bytes as an integer, so ``detokenize`` needs no vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import Any

_WORD = re.compile(r"\s*\S+|\s+")
_LONGEST = 16  # characters; at most 64 bytes in UTF-8


def tokens(text: str) -> list[str]:
    """Cut a text into tokens; joined they are the text again."""
    words = _WORD.findall(text)
    return [word[i : i + _LONGEST] for word in words for i in range(0, len(word), _LONGEST)]


def token_id(token: str) -> int:
    """The number that stands for a token; the same token has always the same."""
    return int.from_bytes(b"\x01" + token.encode())


def token_text(number: int) -> str:
    """The token of a number; a number that is none becomes U+FFFD."""
    data = number.to_bytes((max(number, 0).bit_length() + 7) // 8) if number > 0 else b""
    return data[1:].decode(errors="replace") if data[:1] == b"\x01" else "\ufffd"


def answer(prompt: str, *, limit: int | None, fill: bool) -> tuple[list[str], str]:
    """The answer's tokens and its finish reason: the prompt's own words, or "ok" for an empty prompt.

    ``limit`` is the most tokens wanted; ``fill`` (``ignore_eos``, ``min_tokens``) repeats the words up to it.
    """
    words = tokens(prompt.strip()) or ["ok"]
    if fill and limit is not None:
        again = [word if word[0].isspace() else f" {word}" for word in words]
        return list(itertools.islice(itertools.chain(words, itertools.cycle(again)), limit)), "length"
    if limit is not None and len(words) > limit:
        return words[:limit], "length"
    return words, "stop"


IMAGES = frozenset(("image_url", "input_image", "image"))  # chat's, responses' and Anthropic's parts with a picture


def content_text(content: Any) -> str:
    """The text of a message's content: a string, or parts; a picture stands in it as ``[image]``."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(_part_text(part) for part in content)
    return ""


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return ""
    return "[image]" if part.get("type") in IMAGES else str(part.get("text") or "")


def vector(text: str, dimensions: int) -> list[float]:
    """A vector of unit length that depends on the text only."""
    blocks = (hashlib.sha256(f"{i}:{text}".encode()).digest() for i in range(dimensions // 32 + 1))
    raw = [byte / 127.5 - 1 for byte in itertools.islice(itertools.chain.from_iterable(blocks), dimensions)]
    length = sum(x * x for x in raw) ** 0.5 or 1.0
    return [x / length for x in raw]


def similarity(a: str, b: str) -> float:
    """How many words two texts share, from 0 to 1."""
    left, right = set(a.lower().split()), set(b.lower().split())
    return len(left & right) / len(left | right) if left | right else 0.0
