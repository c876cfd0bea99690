"""The admin API over its Unix socket, or over a URL with a key."""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode, urlsplit

from vllmd.api.answers import Answer, Status
from vllmd.api.codec import Unexpected, parse
from vllmd.cli.failures import EX_CONFIG, EX_SOFTWARE, EX_USAGE, Failure, of_answer, of_socket, of_url
from vllmd.cli.terminal import Working
from vllmd.text import printable_lines

if TYPE_CHECKING:
    from vllmd.api.verbs import Verb

T = TypeVar("T", bound=Answer)

SYSTEM_SOCKET, READ_SOCKET = "/run/vllmd/admin.sock", "/run/vllmd/read.sock"
OPENING_SECONDS = 10.0  # that a daemon which was just started may take to find devices and engines
TROUBLE_SECONDS = 2.0  # of these, where it says that something is wrong with the launcher
NDJSON = "application/x-ndjson"
ANSWER_SECONDS = 30.0  # that the daemon has for an answer which waits for nothing


def user_socket() -> str:
    """The path of the admin socket of a daemon under ``systemctl --user``."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return f"{runtime}/vllmd/admin.sock"


def socket_path(arguments: Namespace) -> str:
    """--socket, else $VLLMD_ADMIN_SOCKET, else the system's, unless only the user's own is there (or --user).

    Of the system's two sockets it is the admin one, unless the user may open the read-only one alone.
    """
    given = arguments.socket or os.environ.get("VLLMD_ADMIN_SOCKET")
    if given:
        return str(given)
    own = user_socket()
    mine = arguments.user or (os.path.exists(own) and not os.path.exists(SYSTEM_SOCKET))
    if mine:
        return own
    looks_on = os.access(READ_SOCKET, os.W_OK) and not os.access(SYSTEM_SOCKET, os.W_OK)
    return READ_SOCKET if looks_on else SYSTEM_SOCKET


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Admin:
    """One daemon's admin API. Every method raises Failure where the daemon cannot be reached or says no."""

    def __init__(self, arguments: Namespace) -> None:
        self.url: str = arguments.url or ""
        self.path = "" if self.url else socket_path(arguments)
        self.key: str = arguments.key or os.environ.get("VLLMD_API_KEY", "")

    def status(self, *, broken: bool = False) -> Status:
        """The daemon's status, once it has found its devices and engines; or after 10 s, or 2 s where it says why not.

        At an upgrade it says so for a moment: it has begun, and the launcher has not been restarted yet.

        A daemon whose configuration is invalid has no models to show: Failure, unless ``broken``.
        """
        begun = time.monotonic()
        with Working("vllmd is looking for devices and engines"):
            while True:
                status = understood(Status, self.get("/admin/status"))
                error = status.configuration.error
                if error and not broken:
                    raise Failure(f"no model is served, the configuration is invalid; vllmctl reload once it is "
                                  f"repaired:\n{error}", EX_CONFIG)  # fmt: skip
                patience = TROUBLE_SECONDS if status.launcher_trouble else OPENING_SECONDS
                if status.opened or time.monotonic() > begun + patience:
                    return status
                time.sleep(0.05)

    def get(self, path: str, **query: object) -> Any:
        """The JSON answer of a GET."""
        return self._json("GET", path, query, None, ANSWER_SECONDS)

    def post(self, path: str, body: object = None, **query: object) -> Any:
        """The JSON answer of a POST, waited for as long as it takes."""
        return self._json("POST", path, query, body, None)

    def put(self, path: str, body: object = None) -> Any:
        """The JSON answer of a PUT, waited for as long as it takes."""
        return self._json("PUT", path, {}, body, None)

    def delete(self, path: str, **query: object) -> Any:
        """The JSON answer of a DELETE."""
        return self._json("DELETE", path, query, None, ANSWER_SECONDS)

    def ask(self, verb: Verb, arguments: Mapping[str, object]) -> Any:
        """The JSON answer to an operator's verb; one that changes something is waited for as long as it takes."""
        call = verb.call(arguments)
        return self._json(
            call.method, call.path, dict(call.query), call.body, None if call.method == "POST" else ANSWER_SECONDS
        )

    def perform(self, verb: Verb, kind: type[T], arguments: Mapping[str, object]) -> T:
        """The same as an answer. Raises Failure for one that is none of vllmd's."""
        return understood(kind, self.ask(verb, arguments))

    def follow(self, verb: Verb, arguments: Mapping[str, object]) -> Iterator[str]:
        """The lines of how a model comes along, until it has come to rest."""
        call = verb.call({**arguments, "wait": True})
        return self.lines(call.method, call.path, NDJSON, call.body, **call.query)

    def lines(self, method: str, path: str, accept: str, body: object = None, **query: object) -> Iterator[str]:
        """The lines of an answer as they come; before they are shown they go through ``decoded`` or ``printable``."""
        with Working("waiting for vllmd", quiet=bool(self.url)):  # who asks a model says himself what he waits for
            answer = self._request(method, path, query, body, None, accept)
        try:
            for line in answer:
                yield line.decode("utf-8", "replace").rstrip("\r\n")
        except OSError as error:
            raise self._unreachable(error) from None

    def _json(self, method: str, path: str, query: dict[str, object], body: object, timeout: float | None) -> Any:
        with Working("waiting for vllmd"):
            answer = self._request(method, path, query, body, timeout, "application/json")
            try:
                return decoded(answer.read())
            except OSError as error:
                raise self._unreachable(error) from None

    def _request(
        self, method: str, path: str, query: dict[str, object], body: object, timeout: float | None, accept: str
    ) -> http.client.HTTPResponse:
        connection: http.client.HTTPConnection
        target, given = path, {name: value for name, value in query.items() if value is not None and value is not False}
        if given:
            target += "?" + urlencode({name: "true" if value is True else str(value) for name, value in given.items()})
        if not self.url:
            connection = UnixConnection(self.path, timeout)
        else:
            parts = urlsplit(self.url if "//" in self.url else f"http://{self.url}")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise Failure(f"{self.url!r} is no URL; one is http://127.0.0.1:33258", EX_USAGE)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection, target = kind(parts.hostname, parts.port, timeout=timeout), parts.path.rstrip("/") + target
        headers = {"Accept": accept, "Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, target, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status >= 300:
                raise of_answer(answer.status, decoded(answer.read()))
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        return answer

    def _unreachable(self, error: Exception) -> Failure:
        if not isinstance(error, OSError):
            error = ConnectionError(f"the answer broke off ({type(error).__name__})")
        return of_url(self.url, error) if self.url else of_socket(self.path, error)


def understood(kind: type[T], data: object) -> T:
    """An answer from decoded JSON. Raises Failure for JSON that vllmd does not send."""
    try:
        return parse(kind, data)
    except Unexpected as error:
        raise Failure(f"the answer is none of vllmd's: {error}", EX_SOFTWARE) from None


def decoded(data: bytes | str) -> Any:
    """JSON of a server, its texts fit for a terminal, as they may quote engines; {} where it is no JSON."""
    try:
        return _printable(json.loads(data))
    except (ValueError, RecursionError):
        return {}


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable_lines(value)
    if isinstance(value, list):
        return [_printable(each) for each in value]
    if isinstance(value, dict):
        return {printable_lines(key): _printable(each) for key, each in value.items()}
    return value
