"""How long a client will want a model again: ``keep_alive`` (Ollama's), ``ttl`` (LM Studio's), or a header.

The field is ours: it is taken out of the body before an engine sees it. What the wish does is the core's
(``core.events.KeptAlive``); how long it may be at most, the configuration's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllmd.errors import BadRequest
from vllmd.proxy.http import Request
from vllmd.proxy.peek import KEEP_ALIVE, Asked

HEADER = "x-vllmd-keep-alive"
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
NUMBER = r"\d+\.?\d*|\.\d+"
STEP = re.compile(rf"({NUMBER})({'|'.join(UNITS)})", re.ASCII)
LONGEST = 64  # characters
MOST = 10**15  # seconds
TAKEN = 'seconds such as 300, or a duration such as "5m"; -1 for as long as may be, 0 to let the model go'


@dataclass(frozen=True, slots=True)
class _Without:
    """Rules of a request (``gate.Rules``) that take the fields out."""

    strip: tuple[str, ...] = KEEP_ALIVE
    set: Mapping[str, object] = field(default_factory=dict)
    default: Mapping[str, object] = field(default_factory=dict)
    system: str = ""


WITHOUT = _Without()


def wish(request: Request, asked: Asked) -> float | None:
    """Seconds; infinite for as long as may be, None if the request says nothing. The field counts before the header.

    Raises BadRequest.
    """
    if asked.keep_alive and asked.keep_alive[0] is not None:
        return seconds(asked.keep_alive[0], "keep_alive")
    fields = request.headers
    if fields.keep_alive is None:
        fields.keep_alive = fields.get(HEADER)
    return seconds(fields.keep_alive, HEADER) if fields.keep_alive else None


def seconds(value: object, name: str) -> float:
    """A wish in seconds, from a number or a duration as Go writes them; negative is infinite. Raises BadRequest."""
    found = _number(value) if not isinstance(value, str) else _duration(value.strip())
    if found is None:
        raise BadRequest(f"{name} must be {TAKEN}", param=name)
    return found if found >= 0 else math.inf


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN is none
        return None
    return float(max(-1, min(value, MOST)))  # an int may be too large for a float


def _duration(text: str) -> float | None:
    sign, digits = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if not digits or len(digits) > LONGEST:
        return None
    if re.fullmatch(NUMBER, digits, re.ASCII):  # of a header, or of a client that makes strings of numbers
        return sign * float(digits)
    if STEP.sub("", digits):
        return None
    return sign * sum(float(number) * UNITS[unit] for number, unit in STEP.findall(digits))
