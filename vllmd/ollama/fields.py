"""Reading a request's members. What is not of the type that it must be is refused with the member's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllmd.errors import BadRequest
from vllmd.proxy.http import parse_json


class Fields:
    """The members of one JSON object; ``where`` is what stands before their names in errors. null is absent."""

    def __init__(self, members: Mapping[str, Any], where: str = "") -> None:
        self._members = members
        self._where = where

    def get(self, name: str) -> Any:
        """The member as it is, None if it is absent."""
        return self._members.get(name)

    def text(self, name: str, default: str = "") -> str:
        """A member that is a string, or ``default``. Raises BadRequest."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool | None:
        """A member that is true or false, or ``default``. Raises BadRequest."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def whole(self, name: str) -> int | None:
        """A whole number, also one written as 3.0."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value % 1:
            raise self._wrong(name, "a whole number")
        return int(value)

    def number(self, name: str) -> float | None:
        """A number that is finite."""
        value = self.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self._wrong(name, "a number")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings, or one string alone."""
        value = self.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise self._wrong(name, "a string or a list of strings")
        return found

    def object(self, name: str) -> Fields:
        """The members of a member that is an object. Raises BadRequest."""
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Fields(value or {}, f"{self.path(name)}.")

    def objects(self, name: str) -> Iterator[Fields]:
        """Each object of a list."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, "a list")
        for place, each in enumerate(value or ()):
            if not isinstance(each, dict):
                raise self._wrong(f"{name}[{place}]", "an object")
            yield Fields(each, f"{self.path(name)}[{place}].")

    def __iter__(self) -> Iterator[str]:
        return (name for name, value in self._members.items() if value is not None)

    def path(self, name: str) -> str:
        """The member's whole name, as errors have it."""
        return self._where + name

    def _wrong(self, name: str, what: str) -> BadRequest:
        return wrong(self.path(name), what)


def wrong(name: str, what: str) -> BadRequest:
    """The refusal of a member that is not ``what`` it must be."""
    return BadRequest(f"{name!r} must be {what}", param=name)


def read(body: bytes) -> dict[str, Any]:
    """The body's object, whatever its Content-Type says: curl's default is what people copy. Raises BadRequest."""
    if not body.strip():
        raise BadRequest("the body is missing: it must be a JSON object")
    members = parse_json(body)
    if not isinstance(members, dict):
        raise BadRequest("the body must be a JSON object")
    return members
