"""HTTP calls to engines: bounded in time, ended by the engine's exit, and described in words when they fail."""

from __future__ import annotations

import asyncio
import enum
import errno
import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from vllmd.api.json_types import ForeignJson
from vllmd.config.types import ReplicaConfig
from vllmd.daemon.engine_process import EngineProcess, log_fields
from vllmd.engines.base import Call, Listen
from vllmd.errors import VllmdError
from vllmd.proxy.peers import Impostor
from vllmd.proxy.upstream import OutOfFiles, QueueFull, Unreached, request

log = logging.getLogger("vllmd.engines")

PROBE_ANSWERED = frozenset({200, 400, 404, 405, 422})
COMPLETION_LIMIT = 120.0  # seconds for a short completion of our own
FILES_PAUSE = 0.2  # seconds until one more attempt where we had no file descriptor
T = TypeVar("T")


async def ask(listen: Listen, call: Call) -> tuple[int, Any, bytes]:
    """Make a call. Raises UpstreamFailed."""
    return await request(listen, call.method, call.path, call.json, timeout=call.timeout, headers=call.headers)


async def when_there_are_files(attempt: Callable[[], Awaitable[T]], limit: float) -> T:
    """What the attempt comes to; where we have no file descriptor for it, it is made again, for ``limit`` seconds.

    What an engine is told decides over its life, and clients' connections may have taken all for a moment. Raises
    OutOfFiles after that.
    """
    until = time.monotonic() + limit
    while True:
        try:
            return await attempt()
        except OutOfFiles:
            if time.monotonic() + FILES_PAUSE > until:
                raise
        await asyncio.sleep(FILES_PAUSE)


async def answers(listen: Listen, probe: Call) -> bool:
    """Whether the probe succeeds. Raises Impostor where another process than the engine would have answered."""
    try:
        status, _, _ = await ask(listen, probe)
    except Impostor:
        raise
    except (OSError, VllmdError):
        return False
    return status == probe.expect


def nobody_listens(listen: Listen) -> bool:
    """Whether a connection is refused at once: the kernel says so, for a small part of what asking costs.

    Not for servers on other machines, which are not refused so fast. False where the kernel does not say.
    """
    address = listen.uds or (listen.host, listen.port)
    family = socket.AF_UNIX if listen.uds else socket.AF_INET
    try:
        trial = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError:  # we have no file descriptor for it
        return False
    with trial:
        try:
            error = trial.connect_ex(address)
        except OSError:  # no address of this family, or a path that is too long; the probe itself reports that
            return False
        if error == errno.EINPROGRESS:
            error = trial.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return error in (errno.ECONNREFUSED, errno.ENOENT)


async def call_all(process: EngineProcess, calls: Iterable[Call]) -> str:
    """Make the calls in order, until one fails. Returns that failure in words, "" if there was none."""
    for step in calls:
        failure = await call(process, step)
        if failure and not step.optional:
            return failure
        if failure:
            log.warning("%s: %s (passed over)", process.model.name, failure, extra=log_fields(process))
    return ""


async def call(process: EngineProcess, step: Call) -> str:
    """Make the call; what went wrong, or "" if nothing did."""
    try:
        answer = await when_there_are_files(lambda: _unless_it_exits(process, step), step.timeout)
    except VllmdError as error:  # which says what was called
        return error.message
    except OSError as error:
        return f"{step.method} {step.path}: {error or type(error).__name__}"
    if answer is None:
        return f"{step.method} {step.path}: the engine died"
    status, body = answer
    if status == step.expect:
        return ""
    beginning = body[:300].decode("utf-8", "replace")
    return f"{step.method} {step.path} answered {status} instead of {step.expect}: {beginning}"


async def _unless_it_exits(process: EngineProcess, step: Call) -> tuple[int, bytes] | None:
    """The status and the body of the answer; None if the engine died before. Raises UpstreamFailed, OSError."""
    answer = asyncio.ensure_future(ask(process.listen, step))
    gone = asyncio.ensure_future(process.exited.wait())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return None
        status, _, body = answer.result()
        return status, body
    finally:  # also when a stop cancels this task
        answer.cancel()
        gone.cancel()


async def timed_probe(process: EngineProcess, limit: float) -> tuple[float | None, str]:
    """Send a replica its probe: the seconds until the answer, or None and why it failed.

    An answer that the engine does not serve such requests counts: the engine lives, and is as fast. That it does not
    know the model does not: it would say so to every client. Raises OutOfFiles if the probe could not be sent.
    """
    rules = process.model.replicas or ReplicaConfig()
    message = rules.probe or ReplicaConfig().probe or ""
    body = probe_body(rules.probe_route, process.engine.served_name(process.model), message)
    probe = Call("POST", rules.probe_route, body, timeout=limit, headers=tuple(process.engine.headers()))
    began = 0.0

    async def attempt() -> tuple[int, bytes] | None:
        nonlocal began
        began = time.monotonic()
        return await _unless_it_exits(process, probe)

    try:
        result = await when_there_are_files(attempt, limit)
    except OutOfFiles:
        raise
    except (OSError, VllmdError) as error:
        return None, str(error) or type(error).__name__
    if result is None:
        return None, "its engine died"
    status, answer = result
    if status in PROBE_ANSWERED and not (status == 404 and _is_about_the_model(answer)):
        return time.monotonic() - began, ""
    return None, f"POST {rules.probe_route} answered {status}: {in_words(answer)}"


def in_words(body: bytes) -> str:
    """The message of an error in OpenAI's form; of any other body the beginning."""
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return repr(body[:300])


def _is_about_the_model(body: bytes) -> bool:
    """Whether an error says that there is no such model, in the form of vLLM, vllmd and OpenAI."""
    try:
        error = json.loads(body)["error"]
        return bool(error["param"] == "model" or error["code"] == "model_not_found")
    except (ValueError, LookupError, TypeError):
        return False


def probe_body(route: str, model: str, message: str) -> ForeignJson:
    """The shortest question of its kind."""
    if route.endswith("/chat/completions"):
        return {"model": model, "messages": [{"role": "user", "content": message}], "max_tokens": 1}
    if route.endswith("/completions"):
        return {"model": model, "prompt": message, "max_tokens": 1}
    return {"model": model, "input": message}


class Liveness(enum.Enum):
    """How an engine answered a liveness check."""

    WELL = "it answers as it should"
    WRONG = "it answers otherwise"
    SILENT = "it does not answer"
    REFUSED = "nobody listens"
    UNKNOWN = "it could not be asked"


async def check_liveness(process: EngineProcess, limit: float) -> tuple[Liveness, str]:
    """Whether an engine answers, by a request that costs it nothing; and what went wrong, "" if nothing did."""
    question = replace(process.engine.alive(process.model), timeout=limit)
    try:
        status, _, _ = await ask(process.listen, question)
    except QueueFull as error:
        return Liveness.SILENT, error.message
    except Unreached as error:
        return Liveness.REFUSED, error.message
    except OutOfFiles as error:
        return Liveness.UNKNOWN, error.message
    except (OSError, VllmdError) as error:
        return Liveness.SILENT, str(error) or type(error).__name__
    if status == question.expect:
        return Liveness.WELL, ""
    return Liveness.WRONG, f"{question.method} {question.path} answered {status}"


async def is_busy(process: EngineProcess, probe: Call) -> bool:
    """Whether a list of the answer is not empty; an engine that does not answer has nothing to finish."""
    try:
        status, _, body = await when_there_are_files(lambda: ask(process.listen, probe), probe.timeout)
        answer = json.loads(body) if status == probe.expect else {}
    except (OSError, VllmdError, ValueError):
        return False
    return isinstance(answer, dict) and any(isinstance(value, list) and value for value in answer.values())


async def complete(process: EngineProcess, body: ForeignJson) -> str | None:
    """The text of a completion; None if it failed."""
    try:
        question = Call("POST", "/v1/completions", body, timeout=COMPLETION_LIMIT)
        status, _, answer = await when_there_are_files(lambda: ask(process.listen, question), COMPLETION_LIMIT)
        return str(json.loads(answer)["choices"][0]["text"]) if status == 200 else None
    except (OSError, VllmdError, ValueError, LookupError):
        return None


async def next_line(queue: asyncio.Queue[str], exited: asyncio.Event) -> str | None:
    """The next log line; None when the engine has exited and all its lines were read."""
    line, gone = asyncio.ensure_future(queue.get()), asyncio.ensure_future(exited.wait())
    try:
        await asyncio.wait({line, gone}, return_when=asyncio.FIRST_COMPLETED)
        return line.result() if line.done() else None
    finally:
        line.cancel()
        gone.cancel()


async def within(awaitable: Awaitable[Any], seconds: float) -> bool:
    """Whether it completed within ``seconds``; it is cancelled otherwise."""
    try:
        await asyncio.wait_for(awaitable, seconds)
    except TimeoutError:
        return False
    return True
