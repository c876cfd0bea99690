"""Answers as responses."""

from __future__ import annotations

from vllmd.api.codec import encoded
from vllmd.proxy.http import Response


def json(value: object, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """``value``, which may hold answers of ``vllmd.api.answers``, as compact JSON."""
    return Response(status, encoded(value), headers=headers)
