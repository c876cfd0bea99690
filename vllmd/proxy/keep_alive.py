"""How long a client will want a model again: ``keep_alive`` (Ollama's), ``ttl`` (LM Studio's), or a header.

The member is meant for the daemon, and taken out of the body before an engine gets it. What it does is decided by the
core (``core.events.KeptAlive``); how long it may be, by the configuration.
"""

from __future__ import annotations

import math
import re

from vllmd.config.types import RequestRules
from vllmd.errors import BadRequest
from vllmd.proxy.http import Request
from vllmd.proxy.peek import KEEP_ALIVE, ParsedBody

HEADER = "x-vllmd-keep-alive"
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
NUMBER = r"\d+\.?\d*|\.\d+"
STEP = re.compile(rf"({NUMBER})({'|'.join(UNITS)})", re.ASCII)
MAX_CHARACTERS = 64
MAX_SECONDS = 10**15
ACCEPTED = 'seconds such as 300, or a duration such as "5m"; -1 for as long as may be, 0 to let the model go'
WITHOUT_KEEP_ALIVE = RequestRules(strip=KEEP_ALIVE)


def requested_keep_alive(request: Request, parsed: ParsedBody) -> float | None:
    """Seconds; infinite for as long as may be, None if the request says nothing. The body counts before the header.

    Raises BadRequest.
    """
    if parsed.keep_alive and parsed.keep_alive[0] is not None:
        return seconds(parsed.keep_alive[0], "keep_alive")
    fields = request.headers
    if fields.keep_alive is None:
        fields.keep_alive = fields.get(HEADER)
    return seconds(fields.keep_alive, HEADER) if fields.keep_alive else None


def seconds(value: object, name: str) -> float:
    """Seconds from a number or a duration as Go writes them; negative is infinite. Raises BadRequest."""
    number: float | None = None
    if isinstance(value, str):
        number = _duration(value.strip())
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value:  # not NaN
        number = float(max(-1, min(value, MAX_SECONDS)))  # an int may be too large for a float
    if number is None:
        raise BadRequest(f"{name} must be {ACCEPTED}", param=name)
    return number if number >= 0 else math.inf


def _duration(text: str) -> float | None:
    sign, digits = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if not digits or len(digits) > MAX_CHARACTERS:
        return None
    if re.fullmatch(NUMBER, digits, re.ASCII):  # of a header, or of a client that writes numbers as strings
        return sign * float(digits)
    if STEP.sub("", digits):
        return None
    return sign * sum(float(number) * UNITS[unit] for number, unit in STEP.findall(digits))
