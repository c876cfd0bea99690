"""What programs ask of vllmd's figures: who is fastest, how soon each replica answers, what runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllmd.errors import UnknownModel

Line = Mapping[str, Any]


def fastest(probed: Mapping[str, Any]) -> tuple[str, float] | None:
    """The name and the seconds of who answered first; None if nobody did."""
    first = probed["replicas"][0]
    return (str(first["name"]), float(first["seconds"])) if probed["fastest"] else None


def latencies(status: Mapping[str, Any], model: str | None) -> dict[str, float | None]:
    """Seconds to the first byte by replica, of one model or of all. Raises UnknownModel."""
    lines = [line for line in status["models"] if model is None or model in _names(line)]
    if model is not None and not lines:
        raise UnknownModel(f"there is no model {model!r}", param="model")
    return {each["name"]: each["latency"] for line in lines for each in engines(line)}


def running(status: Mapping[str, Any]) -> list[str]:
    """The models of which an engine serves."""
    return [line["name"] for line in status["models"] if line["serving"]]


def engines(line: Line) -> Iterable[Line]:
    """The lines of a model's replicas, or its own."""
    return line["replicas"] or (line,)


def _names(line: Line) -> tuple[str, ...]:
    return line["name"], *line["config"].get("aliases", ())
