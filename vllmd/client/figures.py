"""Figures that programs take from vllmd's answers: the fastest engine, replicas' latencies, running models."""

from __future__ import annotations

from collections.abc import Sequence

from vllmd.api.answers import ModelLine, Probed, Status
from vllmd.errors import UnknownModel


def fastest(probed: Probed) -> tuple[str, float] | None:
    """The name and the seconds of the engine that answered first; None if none did."""
    first = probed.replicas[0]
    return (first.name, first.seconds) if probed.fastest and first.seconds is not None else None


def latencies(status: Status, model: str | None) -> dict[str, float | None]:
    """Seconds to the first byte by replica, of one model or of all. Raises UnknownModel."""
    lines = [line for line in status.models if model is None or model in names(line)]
    if model is not None and not lines:
        raise UnknownModel(f"there is no model {model!r}", param="model")
    return {each.name: each.latency for line in lines for each in engines(line)}


def running(status: Status) -> list[str]:
    """The models of which an engine serves."""
    return [line.name for line in status.models if line.serving]


def engines(line: ModelLine) -> Sequence[ModelLine]:
    """The lines of a model's replicas, or its own."""
    return line.replicas or (line,)


def names(line: ModelLine) -> tuple[str, ...]:
    """A model's name and its aliases."""
    return line.name, *(line.config.aliases or ())
