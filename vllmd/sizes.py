"""Amounts of memory, written and read. KiB, MiB, GiB are powers of 1024, and so are K, M, G; kB, MB, GB of 1000."""

from __future__ import annotations

import math
import re

KiB, MiB, GiB, TiB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
UNITS = (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB))

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def parse(text: str) -> int | None:
    """Bytes, of ``20GiB``, ``1.5 G`` or a bare number of them; None for what is no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    number, prefix, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024  # G alone is systemd's
    amount = float(number) * base ** _POWERS[prefix.lower()]
    return int(amount) if amount < math.inf else None


def in_words(amount: float, *, gap: str = " ", digits: str = ".2f") -> str:
    """An amount of bytes in the largest unit that it fills: ``1.5 GiB``, ``512 MiB``, ``12 B``."""
    for unit, scale in UNITS:
        if abs(amount) >= scale:
            number = f"{amount / scale:{digits}}"
            return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{gap}{unit}"
    return f"{amount:.0f}{gap}B"
