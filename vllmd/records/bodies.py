"""Bodies of requests and answers, kept in memory while an administrator has them recorded: of a model or a key.

Clients would rather not have them kept. So nothing is kept without an order, nothing for ever and nothing on disk; a
field of the answer tells the client; only administrators see bodies; and files and what looks like a secret is cut out
before a body is kept at all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from vllmd.api.answers import RecordedBodies
from vllmd.errors import BadRequest
from vllmd.frozen import frozen
from vllmd.proxy.account import Account, Tap
from vllmd.proxy.framing import BadFraming, Chunked

MOST_RECORDINGS = 50
LOOKED_AT = 4  # so many times what is kept of a body is looked through for what is to be cut
LONGEST_TIME = 7 * 86400.0  # seconds that a recording may go on

# Compiled by ``re`` for the first body in which there may be such: most daemons keep none.
FILES = rb"(;base64,|\"(?:data|b64_json|image|audio)\"\s*:\s*\")([A-Za-z0-9+/=_-]{200,})"
MEMBERS = (
    rb'(?i)("[^"\\]{0,40}(?:api_?key|authorization|password|passwd|secret|access_?token|auth_?token)"'
    rb'\s*:\s*)"(?:[^"\\]|\\.)*"?'
)
SECRETS = (
    rb"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{12,}"
    rb"|xox[abpr]-[A-Za-z0-9-]{10,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*)"
    rb"|Bearer [A-Za-z0-9._~+/=-]{12,}|-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(?:-----END [A-Z ]*PRIVATE KEY-----)?"
)

# Without one of these words nothing is to be cut; a search for them is a hundred times faster than the patterns.
IN_FILES = (b";base64,", b'"data"', b'"b64_json"', b'"image"', b'"audio"')
IN_MEMBERS = (b"api_key", b"apikey", b"authorization", b"password", b"passwd", b"secret", b"access_token",
              b"accesstoken", b"auth_token", b"authtoken")  # fmt: skip
IN_SECRETS = (b"sk-", b"hf_", b"ghp_", b"gho_", b"ghu_", b"ghr_", b"ghs_", b"AKIA", b"xox", b"eyJ", b"Bearer ",
              b"-----BEGIN ")  # fmt: skip


@frozen
class Bodies:
    """The kept parts of a request's body and its answer's. ``request_size``: bytes of the whole, as far as it came."""

    request: bytes
    answer: bytes
    request_size: int
    answer_cut: bool  # more of it came than is kept

    @property
    def size(self) -> int:
        """Bytes of memory that both bodies take."""
        return len(self.request) + len(self.answer)


class KeptBodies:
    """Bodies by the numbers of their requests, at most ``most`` bytes of them all; the oldest go first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = 0
        self._kept: dict[int, Bodies] = {}  # the oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, number: int) -> Bodies | None:
        """The bodies of a request, if they are kept."""
        return self._kept.get(number)

    def keep(self, number: int, bodies: Bodies) -> None:
        """Keep them, for a request that is younger than all others here."""
        self._kept[number] = bodies
        self.size += bodies.size
        while self.size > self.most:
            self._drop()

    def forget_before(self, number: int) -> None:
        """Drop the bodies of older requests."""
        while self._kept and next(iter(self._kept)) < number:
            self._drop()

    def clear(self) -> None:
        """Drop all bodies that are kept."""
        self._kept.clear()
        self.size = 0

    def _drop(self) -> None:
        self.size -= self._kept.pop(next(iter(self._kept))).size


@frozen
class Recording:
    """An order to keep bodies of a model's or a key's requests until ``until`` (monotonic), ``most`` bytes of each."""

    number: int
    model: str
    key: str
    until: float
    most: int

    def takes(self, model: str, key: str) -> bool:
        """Whether the order is for a request of this model and key."""
        return self.model in ("", model) and self.key in ("", key)


class Recordings:
    """Implements ``proxy.account.Recorder``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._numbers = itertools.count(1)
        self._running: list[Recording] = []

    @property
    def active(self) -> bool:
        """Whether any recording is running."""
        return bool(self._running)

    def start(self, model: str, key: str, seconds: float, most: int) -> Recording:
        """Keep bodies of this model's requests, this key's, or of both together. Raises BadRequest."""
        if not model and not key:
            raise BadRequest("say whose bodies are to be recorded: model, key, or both")
        self.present()
        if len(self._running) >= MOST_RECORDINGS:
            raise BadRequest(f"{MOST_RECORDINGS} recordings go on already; end one first")
        recording = Recording(next(self._numbers), model, key, self._clock() + min(seconds, LONGEST_TIME), most)
        self._running.append(recording)
        return recording

    def stop(self, number: int) -> bool:
        """End a recording; returns whether it was running."""
        before = len(self._running)
        self._running = [each for each in self._running if each.number != number]
        return len(self._running) < before

    def present(self) -> list[Recording]:
        """The recordings that are running now."""
        now = self._clock()
        self._running = [each for each in self._running if each.until > now]
        return list(self._running)

    def begin(self, account: Account, model: str, key: str, body: bytes) -> bool:
        """Whether this model's or this key's bodies are recorded; if so note this one, and have the answer's noted."""
        most = max((each.most for each in self.present() if each.takes(model, key)), default=0)
        if not most:
            return False
        account.request = body[: LOOKED_AT * most]
        account.answer = Tap(most)
        return True


def of(account: Account | None, received: int) -> Bodies | None:
    """What is kept of a request that has ended; None if nothing is."""
    if account is None or account.request is None or account.answer is None:
        return None
    tap = account.answer
    cut = len(tap.data) >= tap.most
    return Bodies(cleaned(account.request)[: tap.most], cleaned(_payload(tap)), received, cut)


def as_answer(bodies: Bodies) -> RecordedBodies:
    """Both as text; what is no UTF-8 in them is replaced."""
    return RecordedBodies(
        request=bodies.request.decode("utf-8", "replace"),
        answer=bodies.answer.decode("utf-8", "replace"),
        request_cut=bodies.request_size > len(bodies.request),
        answer_cut=bodies.answer_cut,
    )


def cleaned(body: bytes) -> bytes:
    """``body`` without files and without what looks like a secret; what was there is said."""
    if any(mark in body for mark in IN_FILES):
        body = re.sub(FILES, lambda m: m[1] + b"(%d bytes cut)" % len(m[2]), body)
    lower = body.lower()
    if any(mark in lower for mark in IN_MEMBERS):
        body = re.sub(MEMBERS, rb'\1"(cut)"', body)
    if any(mark in body for mark in IN_SECRETS):
        body = re.sub(SECRETS, b"(cut)", body)
    return body


def _payload(tap: Tap) -> bytes:
    """The answer without its framing."""
    data = bytes(tap.data)
    if not tap.chunked:
        return data
    framing = Chunked(keep=True)
    try:
        framing.scan(data)
    except BadFraming:
        return data
    return b"".join(framing.pieces)
