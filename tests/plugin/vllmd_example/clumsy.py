"""A kind that raises wherever it is asked."""

from __future__ import annotations

from typing import Any


class Clumsy:
    kind = "clumsy"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "bind":
            raise AttributeError(name)

        def stumble(*args: Any, **more: Any) -> Any:
            raise ZeroDivisionError(f"stumbled in {name}")

        return stumble
