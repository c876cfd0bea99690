"""Answers and transport failures become errors here, and nowhere else.

What the daemon says becomes the class of ``vllmd.errors`` that it raised; what
never reached it, or broke off on the way, has a class of its own below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from vllmd import errors
from vllmd.errors import UpstreamFailed, VllmdError


class Unreachable(VllmdError):
    """Nobody answered at the address, or the connection broke before an answer began."""

    code = "unreachable"


class TimedOut(VllmdError):
    """No answer came within the client's own ``timeout``."""

    code = "timeout"


class StreamFailed(UpstreamFailed):
    """The answer broke off after it had begun. What was received until then is all there is; nothing is tried again."""

    code = "stream_failed"


class AnswerError(VllmdError):
    """An error answer that has no class of its own; ``http_status`` is its status."""

    def __init__(self, http_status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.http_status = http_status


def of_answer(status: int, body: bytes, headers: Mapping[str, str]) -> VllmdError:
    """The error that an answer of ``status`` 300 or more tells."""
    told = _told(body)
    message = str(told.get("message") or told.get("detail") or body[:500].decode("utf-8", "replace").strip())
    message = message or f"HTTP status {status}"
    param = told.get("param") if isinstance(told.get("param"), str) else None
    kind = _kind(status, told.get("code"))
    if kind is None:
        return AnswerError(status, message, param=param)
    return kind(message, param=param, retry_after=_seconds(headers.get("retry-after", "")))


def of_chunk(error: object) -> StreamFailed:
    """The error that a chunk of a stream carries in place of text."""
    message = error.get("message") if isinstance(error, dict) else error
    return StreamFailed(f"the answer broke off: {message}")


def of_transport(error: httpx.HTTPError | httpx.InvalidURL, where: str, *, begun: bool = False) -> VllmdError:
    """What httpx raised, in our words. ``begun``: the answer had begun to arrive."""
    what = str(error) or type(error).__name__
    if begun:
        return StreamFailed(f"the answer of {where} broke off: {what}")
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return TimedOut(f"{where} did not answer in time ({type(error).__name__})")
    return Unreachable(f"cannot reach vllmd at {where}: {what}")


def _told(body: bytes) -> dict[str, Any]:
    """``{"error": {...}}`` of OpenAI, or the flat object of others; {} where it is neither."""
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    inner = answer.get("error", answer) if isinstance(answer, dict) else {}
    return inner if isinstance(inner, dict) else {"message": inner}


def _kind(status: int, code: object) -> type[VllmdError] | None:
    """The class with this status and code, else the plainest one with this status."""
    same = [kind for kind in _tree(VllmdError) if kind.status == status and kind.__module__ == errors.__name__]
    plain = sorted((kind for kind in same if kind is not VllmdError), key=lambda kind: kind.code is not None)
    return next((kind for kind in same if kind.code == code), None) or next(iter(plain), None)


def _tree(kind: type[VllmdError]) -> Iterator[type[VllmdError]]:
    """The class and all below it, those nearer to the root first."""
    level = [kind]
    while level:
        yield from level
        level = [below for each in level for below in each.__subclasses__()]


def _seconds(text: str) -> float | None:
    return float(text) if text.isdecimal() else None
