"""What a request asks for, checked: flags, numbers and objects. Whatever is wrong raises BadRequest that names it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vllmd.errors import BadRequest
from vllmd.proxy.http import Request

TRUE, FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
LONGEST_LEASE = 1e9  # seconds; some thirty years
LONGEST_NAME = 200


def flag(request: Request, name: str) -> bool:
    """A query parameter that is true or false (or absent: false)."""
    value = request.query.get(name, "false").lower()
    if value not in TRUE | FALSE:
        raise BadRequest(f"{name} must be true or false, not {value!r}", param=name)
    return value in TRUE


def number(request: Request, name: str, default: int, most: int) -> int:
    """A query parameter that is a whole number up to ``most``."""
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(most)) or int(text) > most:
        raise BadRequest(f"{name} must be a number from 0 to {most}, not {text!r}", param=name)
    return int(text)


def duration(request: Request, name: str, most: float) -> float | None:
    """A query parameter that is a time in seconds, up to ``most``; None without it."""
    text = request.query.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= most:
        raise BadRequest(f"{name} must be a number of seconds above 0, up to {most:g}, not {text!r}", param=name)
    return seconds


def fields(request: Request, known: Sequence[str]) -> dict[str, Any]:
    """The JSON object in the body (none: an empty one), which has no other fields than these."""
    body = request.json() if request.body else {}
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for name in body:
        if name not in known:
            raise BadRequest(f"there is no field {name!r}; there are {', '.join(known)}", param=name)
    return body


def truth(body: dict[str, Any], name: str, default: bool) -> bool:
    """A field that is true or false."""
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false", param=name)
    return value


def text(body: dict[str, Any], name: str, what: str) -> str:
    """A field that is a word."""
    value = body.get(name)
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= LONGEST_NAME:
        raise BadRequest(f"{name} must be {what}", param=name)
    return value


def index(body: dict[str, Any], name: str) -> int | None:
    """A field that is a whole number, or null."""
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise BadRequest(f"{name} must be a number from 0, or null", param=name)
    return value


def seconds(body: dict[str, Any], name: str) -> float | None:
    """A field that is a time, or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_LEASE:
        raise BadRequest(f"{name} must be a number of seconds from 0 to {LONGEST_LEASE:g}, or null", param=name)
    return float(value) if math.isfinite(value) else None
