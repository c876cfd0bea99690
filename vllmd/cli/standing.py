"""The state of a model in words that several verbs print."""

from __future__ import annotations

from vllmd.api.answers import ModelLine
from vllmd.cli import show

SILENT_SECONDS = 30.0  # without a byte of any answer, after which an engine is reported as silent


def now(line: ModelLine, made: bool) -> str:
    """The state of a model in a sentence. ``made``: whether any decision about it is known."""
    name, ago = line.name, "" if line.since is None else show.age(line.since)
    if line.state == "error":
        text = f"{name} has failed{f' {ago} ago' if ago else ''}: {line.failure}"
    else:
        text = f"{name} is {show.state(line.state)}{f' since {ago}' if ago else ''}"
    if line.replicas or line.health:
        text += f" ({replicas_of(line)})"
    if line.state != "error" and line.failure:
        text += f"; it failed: {line.failure}"
    if "\n" in line.failure:
        text += f"\nvllmctl logs {name} shows all of its output"
    if line.never:
        text += f"; it can never be loaded: {line.never}"
    if quiet := silence(line):
        text += f"; {quiet}, with {show.counted(line.in_flight, 'request')} in it"
        text += f" (vllmctl logs {name}; vllmctl restart {name} --force if it hangs)"
    if line.disabled:
        text += f"; an operator has disabled it: {line.disabled}"
    if line.waiting_for:
        queued = line.queued
        waiting = f"{show.counted(queued, 'request')} wait{'s' * (queued == 1)} for" if queued else "it waits for"
        text += f"; {waiting} {line.waiting_for}"
    return text if made or line.waiting_for else f"{text}; nothing has been decided about it yet"


def is_broken(line: ModelLine) -> bool:
    """Whether a request to it would fail until somebody mends something: it has failed, or can never be loaded."""
    return line.state == "error" or bool(line.never)


def replicas_of(line: ModelLine) -> str:
    """How many of a model's replicas serve; of a replica its health status and the time to its first byte."""
    if line.replicas:
        return f"{line.serving} of {len(line.replicas)} replicas serve{', degraded' * line.degraded}"
    if not line.health:
        return ""
    latency = f" ({line.latency * 1000:.0f} ms to the first byte)" if line.latency is not None else ""
    return f"{line.health}{latency}"


def silence(line: ModelLine) -> str:
    """How long an engine has answered nothing although requests run in it; "" for less than ``SILENT_SECONDS``."""
    return f"no answer for {show.age(line.silent)}" if line.silent is not None and line.silent >= SILENT_SECONDS else ""
