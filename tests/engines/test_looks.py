"""What the machine has is looked at once for many models, and again for the next ones."""

from __future__ import annotations

import pytest

from vllmd.engines import looks


def test_a_look_is_shared_for_a_while() -> None:
    """An engine that is started looks for itself: a program may have been installed since."""
    seen: list[str] = []

    @looks.looked_at_once
    def look(name: str) -> str | None:
        seen.append(name)
        return None

    look("a"), look("a")
    with looks.shared():
        look("a"), look("b"), look("a")
    look("b")
    assert seen == ["a", "a", "a", "b", "b"]


def test_functions_share_nothing_with_each_other_and_an_error_is_no_answer() -> None:
    """The same argument means something else to each; what failed once may work for the next model."""
    calls = 0

    @looks.looked_at_once
    def fails(name: str) -> str:
        nonlocal calls
        calls += 1
        raise OSError(name)

    @looks.looked_at_once
    def works(name: str) -> str:
        return f"{name} is there"

    with looks.shared():
        assert works("a") == "a is there"
        for _ in range(2):
            with pytest.raises(OSError, match="a"):
                fails("a")
    assert calls == 2
