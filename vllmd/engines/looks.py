"""What the machine has, looked at once for many models: programs in a PATH, environments, accelerators.

Each of ten thousand models would ask the file system thirty times for what is the same for all. Nothing is remembered
longer than the look at all of them takes, and in no other thread: an engine that is started looks for itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_seen: ContextVar[dict[tuple[object, ...], object] | None] = ContextVar("seen", default=None)


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """While it lasts, in this context, a function that is ``looked_at_once`` is called once for the same arguments."""
    token = _seen.set({})
    try:
        yield
    finally:
        _seen.reset(token)


def looked_at_once(function: Callable[P, T]) -> Callable[P, T]:
    """Share what the function returns while looks are ``shared``. Its arguments must be hashable; what it raises is
    not shared."""

    @wraps(function)
    def look(*args: P.args, **kwargs: P.kwargs) -> T:
        seen = _seen.get()
        if seen is None or kwargs:
            return function(*args, **kwargs)
        key = (function, *args)
        if key not in seen:
            seen[key] = function(*args, **kwargs)
        return seen[key]  # type: ignore[return-value]

    return look
