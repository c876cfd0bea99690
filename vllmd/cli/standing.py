"""How a model stands, in words that several verbs share."""

from __future__ import annotations

from vllmd.api.answers import ModelLine
from vllmd.cli import show

SILENT = 30.0  # seconds without a byte of any answer that are remarkable


def now(line: ModelLine, made: bool) -> str:
    """How it stands at present, in a sentence."""
    name, ago = line.name, "" if line.since is None else show.age(line.since)
    if line.state == "error":
        told = f"{name} has failed{f' {ago} ago' if ago else ''}: {line.failure}"
    else:
        told = f"{name} is {show.state(line.state)}{f' since {ago}' if ago else ''}"
    if line.replicas or line.health:
        told += f" ({replicas_of(line)})"
    if line.state != "error" and line.failure:
        told += f"; it failed: {line.failure}"
    if "\n" in line.failure:
        told += f"\nvllmctl logs {name} shows all of its output"
    if line.never:
        told += f"; it can never be loaded: {line.never}"
    if quiet := silence(line):
        told += f"; {quiet}, with {show.counted(line.in_flight, 'request')} in it"
        told += f" (vllmctl logs {name}; vllmctl restart {name} --force if it hangs)"
    if line.disabled:
        told += f"; an operator has disabled it: {line.disabled}"
    if line.waiting_for:
        queued = line.queued
        who = f"{show.counted(queued, 'request')} wait{'s' * (queued == 1)} for" if queued else "it waits for"
        told += f"; {who} {line.waiting_for}"
    return told if made or line.waiting_for else f"{told}; nothing has been decided about it yet"


def replicas_of(line: ModelLine) -> str:
    """How many of a model's replicas serve; of a replica what its answers have earned it, and how soon they begin."""
    if line.replicas:
        return f"{line.serving} of {len(line.replicas)} replicas serve{', degraded' * line.degraded}"
    if not line.health:
        return ""
    latency = f" ({line.latency * 1000:.0f} ms to the first byte)" if line.latency is not None else ""
    return f"{line.health}{latency}"


def silence(line: ModelLine) -> str:
    """That an engine which seems well has answered nothing for long, though requests wait in it."""
    return f"no answer for {show.age(line.silent)}" if line.silent is not None and line.silent >= SILENT else ""
