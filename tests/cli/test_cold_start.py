"""``bench --cold`` runs what the daemon names only where that can be an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.api.answers import ModelLine
from vllmd.cli import cold
from vllmd.cli.admin import SYSTEM_SOCKET
from vllmd.cli.failures import Failure
from vllmd.core.types import State


@pytest.fixture(autouse=True)
def _of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that names one of root's processes; nothing that it says is run."""

    def never(*_: Any) -> None:
        raise AssertionError("it is gone on with")

    named = cold.Command(("/bin/true",), {}, "/", 0, 0, (), "/run/x/s")
    monkeypatch.setattr(cold.models, "find", lambda status, name: ModelLine(name, State.READY, pid=1))
    monkeypatch.setattr(cold, "read_command", lambda line: named)
    monkeypatch.setattr(cold.models, "change", never)
    monkeypatch.setattr(cold, "start_alone", never)


@pytest.mark.parametrize(
    ("url", "path", "told"), [("", SYSTEM_SOCKET, "is root's"), ("http://elsewhere", "", "not by --url")]
)
def test_it_runs_no_command_of_root_nor_of_another_machine(url: str, path: str, told: str) -> None:
    """A daemon that is taken over would have root's process of its choice run anew, as root."""
    admin: Any = SimpleNamespace(url=url, path=path, status=lambda: None)
    with pytest.raises(Failure, match=told):
        cold.measure(admin, "m", lambda text: None)
