"""The kinds of values that a verb takes: how each is checked, and how it is described.

``of_text`` reads a value from a path or a query, ``of_json`` from a body; both raise ValueError for a value that is not
acceptable, and ``accepts`` says in words what would be.
"""

from __future__ import annotations

import math
import re
import time
from typing import ClassVar, Protocol

from vllmd.api.json_types import Schema
from vllmd.frozen import frozen

TRUE, FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
LONGEST_TEXT = 200  # characters
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
AGO = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(s|m|h|d|w)")
STATUS = re.compile(r"[1-5]\d\d|[1-5]xx")
LATEST = 1e11  # Unix time; some three thousand years from now


class Kind(Protocol):
    """The kind of a parameter's value: how it is checked, documented and typed."""

    @property
    def annotation(self) -> str:
        """The value's type in Python, as the clients' methods are annotated."""

    @property
    def accepts(self) -> str:
        """What it may be, in words that follow "must be"."""

    def schema(self, *, text: bool) -> Schema:
        """The value's JSON Schema; ``text``: as it is written in a path or a query."""

    def of_text(self, text: str) -> object:
        """Read the value from a path or a query. Raises ValueError."""

    def of_json(self, value: object) -> object:
        """Read the value from decoded JSON. Raises ValueError."""


@frozen
class Flag:
    """A parameter that is true or false."""

    annotation: ClassVar[str] = "bool"
    accepts: ClassVar[str] = "true or false"

    def schema(self, *, text: bool) -> Schema:
        words = ["true", "false", "1", "0", "yes", "no", "on", "off"]
        return {"type": "string", "enum": words} if text else {"type": "boolean"}

    def of_text(self, text: str) -> bool:
        if text.lower() not in TRUE | FALSE:
            raise ValueError
        return text.lower() in TRUE

    def of_json(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@frozen
class Text:
    """A word or several, in printable characters. ``what`` it is, in words."""

    what: str = "a text"
    longest: int = LONGEST_TEXT
    annotation: ClassVar[str] = "str"

    @property
    def accepts(self) -> str:
        return f"{self.what}, up to {self.longest} printable characters"

    def schema(self, *, text: bool) -> Schema:
        return {"type": "string", "minLength": 1, "maxLength": self.longest, "pattern": "^[^\\x00-\\x1f\\x7f]+$"}

    def of_text(self, text: str) -> str:
        return self.of_json(text)

    def of_json(self, value: object) -> str:
        if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= self.longest:
            raise ValueError
        return value


@frozen
class ModelName:
    """A model's name, alias, or the end of a name that only one model has; the daemon resolves it."""

    annotation: ClassVar[str] = "str"
    accepts: ClassVar[str] = "the name of a model"

    def schema(self, *, text: bool) -> Schema:
        return {"type": "string", "minLength": 1}

    def of_text(self, text: str) -> str:
        return self.of_json(text)

    def of_json(self, value: object) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value


@frozen
class Count:
    """A parameter that is a whole number, within bounds."""

    least: int = 0
    most: int = 999_999_999
    what: str = ""
    annotation: ClassVar[str] = "int"

    @property
    def accepts(self) -> str:
        return self.what or f"a number from {self.least} to {self.most}"

    def schema(self, *, text: bool) -> Schema:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}

    def of_text(self, text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or len(text) > len(str(self.most)):
            raise ValueError
        return self.of_json(int(text))

    def of_json(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            raise ValueError
        return value


@frozen
class Choice:
    """A number out of a few."""

    among: tuple[int, ...]
    annotation: ClassVar[str] = "int"

    @property
    def accepts(self) -> str:
        return f"{', '.join(map(str, self.among[:-1]))} or {self.among[-1]}"

    def schema(self, *, text: bool) -> Schema:
        return {"type": "string", "enum": [str(each) for each in self.among]} if text else {"enum": list(self.among)}

    def of_text(self, text: str) -> int:
        found = next((each for each in self.among if str(each) == text), None)
        if found is None:
            raise ValueError
        return found

    def of_json(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value not in self.among:
            raise ValueError
        return value


@frozen
class Word:
    """A word out of a few."""

    among: tuple[str, ...]
    annotation: ClassVar[str] = "str"

    @property
    def accepts(self) -> str:
        return f"{', '.join(self.among[:-1])} or {self.among[-1]}"

    def schema(self, *, text: bool) -> Schema:
        return {"type": "string", "enum": list(self.among)}

    def of_text(self, text: str) -> str:
        return self.of_json(text)

    def of_json(self, value: object) -> str:
        if value not in self.among:
            raise ValueError
        return str(value)


@frozen
class JsonObject:
    """An object whose fields the verb itself checks."""

    what: str = "an object"
    annotation: ClassVar[str] = "Mapping[str, object]"

    @property
    def accepts(self) -> str:
        return self.what

    def schema(self, *, text: bool) -> Schema:
        return {"type": "object"}

    def of_text(self, text: str) -> object:
        raise ValueError

    def of_json(self, value: object) -> dict[str, object]:
        if not isinstance(value, dict):
            raise ValueError
        return value


@frozen
class Seconds:
    """A time. ``above_zero``: no time at all is too short."""

    most: float
    above_zero: bool = False
    annotation: ClassVar[str] = "float"

    @property
    def accepts(self) -> str:
        return f"a number of seconds {'above' if self.above_zero else 'from'} 0, up to {self.most:g}"

    def schema(self, *, text: bool) -> Schema:
        least = "exclusiveMinimum" if self.above_zero else "minimum"
        return {"type": "number", least: 0, "maximum": self.most}

    def of_text(self, text: str) -> float:
        return self.of_json(float(text))

    def of_json(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError
        if not 0 <= value <= self.most or (self.above_zero and value == 0):
            raise ValueError
        return float(value)


@frozen
class Moment:
    """A moment in Unix time; in a query also how long before now."""

    annotation: ClassVar[str] = "float"
    accepts: ClassVar[str] = "a Unix time, or how long ago, such as 90m, 12h or 30d"

    def schema(self, *, text: bool) -> Schema:
        return {"type": "string", "minLength": 1} if text else {"type": "number"}

    def of_text(self, text: str) -> float:
        ago = AGO.fullmatch(text)
        return time.time() - float(ago[1]) * UNITS[ago[2]] if ago else self.of_json(float(text))

    def of_json(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise ValueError
        return min(max(float(value), 0.0), LATEST)


@frozen
class StatusClass:
    """An HTTP status, or all that begin with its digit."""

    annotation: ClassVar[str] = "str"
    accepts: ClassVar[str] = "an HTTP status such as 429, or several such as 4xx"

    def schema(self, *, text: bool) -> Schema:
        return {"type": "string", "pattern": f"^({STATUS.pattern})$"}

    def of_text(self, text: str) -> str:
        return self.of_json(text.lower())

    def of_json(self, value: object) -> str:
        if not isinstance(value, str) or STATUS.fullmatch(value) is None:
            raise ValueError
        return value
