"""Answers as responses."""

from __future__ import annotations

from vllmd.api.answers import Answer
from vllmd.api.codec import encoded, fields, plain
from vllmd.proxy.http import MEMBERS_PER_TURN, Response, list_response


def json(value: object, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """``value``, which may hold answers of ``vllmd.api.answers``, as compact JSON."""
    return Response(status, encoded(value), headers=headers)


async def json_in_turns(value: object) -> Response:
    """The same of an answer that may list thousands: its long list is written in turns of the loop."""
    if isinstance(value, Answer):
        whole = fields(value)
        for name, member in whole.items():
            if isinstance(member, tuple | list) and len(member) > MEMBERS_PER_TURN:
                return await list_response(whole, name, plain)
    return json(value)
