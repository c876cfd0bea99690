"""Values that nobody changes, for what is made at each request.

``dataclass(frozen=True)`` sets each field by a call past its own guard: a value of six fields takes five times as long
to make as without, and a request makes eight of them. So here mypy is the guard, and at run time there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[T]) -> type[T]:
    """A dataclass with slots and a hash, whose fields mypy lets nobody set."""
    return dataclass(slots=True, unsafe_hash=True)(cls)
