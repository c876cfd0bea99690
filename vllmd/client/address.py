"""Where a vllmd is, and how httpx gets there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from vllmd.addresses import is_loopback
from vllmd.api.answers import Answer
from vllmd.api.codec import Unexpected, parse
from vllmd.client.calls import Call
from vllmd.client.errors import of_answer
from vllmd.errors import BadRequest, UpstreamFailed

T = TypeVar("T", bound=Answer)

CONNECT_TIMEOUT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Address:
    """An HTTP URL without the final ``/v1``, or the path of a Unix socket."""

    url: str
    socket: str = ""

    @classmethod
    def of(cls, text: str) -> Address:
        """``http://host:port``, with or without ``/v1`` at its end, or ``unix:/path``. Raises BadRequest."""
        if text.startswith("unix:"):
            return cls("http://localhost", "/" + text.removeprefix("unix:").lstrip("/"))
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadRequest(f"{text!r} is no address; right are http://127.0.0.1:33258 and unix:/run/vllmd/admin.sock")
        return cls(text.rstrip("/").removesuffix("/v1").rstrip("/"))

    def __str__(self) -> str:
        return self.socket or self.url

    @property
    def direct(self) -> bool:
        """Whether no proxy of the environment may come between: it is on this machine."""
        return bool(self.socket) or is_loopback(urlsplit(self.url).hostname or "")

    def options(self, api_key: str | None, timeout: float | None) -> dict[str, Any]:
        """What both of httpx's clients take alike."""
        return {
            "base_url": self.url,
            "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": httpx.Timeout(timeout, connect=CONNECT_TIMEOUT),
            "trust_env": not self.direct,
        }


def request_of(client: httpx.Client | httpx.AsyncClient, call: Call) -> httpx.Request:
    """The request of a call."""
    timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT) if call.patient else client.timeout
    return client.build_request(call.method, call.path, params=call.query, json=call.body, timeout=timeout)


def decoded(answer: httpx.Response) -> Any:
    """The JSON of an answer. Raises VllmdError for one that is an error, or no JSON."""
    check(answer)
    try:
        return json.loads(answer.content)
    except ValueError:
        raise UpstreamFailed(f"the answer is not JSON: {answer.text[:200]!r}") from None


def answer_of(kind: type[T], data: object) -> T:
    """The answer in decoded JSON. Raises UpstreamFailed for another."""
    try:
        return parse(kind, data)
    except Unexpected as error:
        raise UpstreamFailed(f"the answer is none of vllmd's: {error}") from None


def check(answer: httpx.Response) -> None:
    """Raise what an answer (wholly read) tells of an error."""
    if answer.status_code >= 300:
        raise of_answer(answer.status_code, answer.content, answer.headers)
