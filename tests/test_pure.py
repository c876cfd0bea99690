"""The tests that `make unit` runs keep what their list promises."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest

from tests import pure


def test_every_pattern_finds_a_file() -> None:
    """A renamed file would silently leave `make unit`."""
    folder = Path(pure.__file__).parent
    assert [each for each in (*pure.PURE, *pure.SLOW) if not list(folder.glob(each))] == []


def test_a_test_that_is_listed_cannot_start_a_process_or_connect() -> None:
    """Else a busy machine could fail it."""
    pure.begin("here")
    try:
        with pytest.raises(AssertionError, match="listed as pure"):
            subprocess.Popen(["true"])
        with pytest.raises(AssertionError, match="listed as pure"), socket.socket() as unbound:
            unbound.bind(("127.0.0.1", 0))
    finally:
        pure.begin("")
    subprocess.run(["true"], check=True)


def test_the_random_worlds_are_not_waited_for_at_each_save() -> None:
    """They are in `make fast`."""
    folder = Path(pure.__file__).parent
    assert pure.is_pure(folder / "core/test_idle.py")
    assert not pure.is_pure(folder / "core/test_random.py")
    assert not pure.is_pure(Path("/elsewhere/core/test_idle.py"))
