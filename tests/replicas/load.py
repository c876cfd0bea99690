"""Clients of one model, many at once, every other one of them with a stream; and what became of their requests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import httpx

WORDS = [f"w{n}" for n in range(30)]
SHORTEST = 10  # words; no two clients in a row say as many, so that they are at different points of their answers
PATIENCE = 60.0  # seconds that only a defect exceeds


@dataclass(frozen=True)
class Outcome:
    """One request: ``said`` is what came of its answer, ``error`` what the client met instead of the rest."""

    asked: str
    stream: bool
    status: int
    said: str
    error: str

    @property
    def whole(self) -> bool:
        """The answer came to its end, and is right."""
        return self.status == 200 and not self.error and self.said == self.asked

    @property
    def truncated(self) -> bool:
        """A stream that had begun, all of it right, and broke off visibly."""
        begun = self.stream and self.status == 200 and self.asked.startswith(self.said)
        return begun and self.error.startswith("RemoteProtocolError: peer closed connection without sending complete")


class Load:
    """``clients`` ask one request after the other until the end of the ``with`` block."""

    def __init__(self, url: str, model: str, clients: int) -> None:
        self.outcomes: list[Outcome] = []
        self._url, self._model, self._clients = url, model, clients
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    @property
    def failed(self) -> Counter[str]:
        """What went wrong, but for streams that had begun, and how often: nothing, if all is well."""
        wrong = [o for o in self.outcomes if not o.whole and not o.truncated]
        return Counter(f"{'stream' if o.stream else 'JSON'} {o.status}: {o.said!r} {o.error}" for o in wrong)

    @property
    def truncated(self) -> Sequence[Outcome]:
        """Streams that broke off."""
        return [o for o in self.outcomes if o.truncated]

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=PATIENCE, limits=limits) as http:
            await asyncio.gather(*(self._client(http, number) for number in range(self._clients)))

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        while not self._over.is_set():
            number += 1
            words = " ".join(WORDS[: SHORTEST + number % (len(WORDS) - SHORTEST)])
            self.outcomes.append(await self._ask(http, words, stream=number % 2 == 0))

    async def _ask(self, http: httpx.AsyncClient, words: str, *, stream: bool) -> Outcome:
        body = {"model": self._model, "stream": stream, "messages": [{"role": "user", "content": words}]}
        status, answer, error = 0, "", ""
        try:
            async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                status = reply.status_code
                async for piece in reply.aiter_text():
                    answer += piece
        except httpx.HTTPError as failure:
            error = f"{type(failure).__name__}: {failure}"
        if status != 200:
            return Outcome(words, stream, status, "", error or answer)
        if not stream:
            return Outcome(words, stream, status, answer if error else _said(json.loads(answer), "message"), error)
        events = [line.removeprefix("data: ") for line in answer.split("\n\n") if line.startswith("data: ")]
        if not error and (not events or events.pop() != "[DONE]"):
            error = "it ended without [DONE]"
        return Outcome(words, stream, status, "".join(_said(json.loads(event), "delta") for event in events), error)


def _said(answer: dict[str, list[dict[str, dict[str, str]]]], where: str) -> str:
    if "choices" not in answer:
        return f"not an answer: {answer}"
    return "".join(choice[where].get("content") or "" for choice in answer["choices"])
