"""The one place in which error answers and httpx's exceptions become errors of the client library.

An error answer becomes the class of ``vllmd.errors`` that the daemon raised; a request that did not reach the daemon,
or whose answer broke off, has a class of its own below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

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
    """The error of an answer with a ``status`` of 300 or more, whichever server it is from."""
    # OpenAI has {"error": {...}}, others a flat object.
    try:
        answer = json.loads(body)
    except ValueError:
        answer = {}
    inner = answer.get("error", answer) if isinstance(answer, dict) else {}
    details = inner if isinstance(inner, dict) else {"message": inner}
    message = str(details.get("message") or details.get("detail") or body[:500].decode("utf-8", "replace").strip())
    message = message or f"HTTP status {status}"
    param = details.get("param") if isinstance(details.get("param"), str) else None
    # The class with this status and code, else the plainest one with this status.
    same = [each for each in _subclasses(VllmdError) if each.status == status and each.__module__ == errors.__name__]
    plain = sorted((each for each in same if each is not VllmdError), key=lambda each: each.code is not None)
    exact = [each for each in same if each.code == details.get("code")]
    if not (exact or plain):
        return AnswerError(status, message, param=param)
    seconds = headers.get("retry-after", "")
    retry_after = float(seconds) if seconds.isdecimal() else None
    return (exact or plain)[0](message, param=param, retry_after=retry_after)


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


def _subclasses(kind: type[VllmdError]) -> Iterator[type[VllmdError]]:
    """The class and all below it, those nearer to the root first."""
    level = [kind]
    while level:
        yield from level
        level = [below for each in level for below in each.__subclasses__()]
