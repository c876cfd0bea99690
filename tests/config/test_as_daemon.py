"""Root checks a configuration with the rights of the daemon's user, and has its own again afterwards."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from vllmd.config import as_daemon
from vllmd.config.as_daemon import problems_of_daemon
from vllmd.config.findings import Problem, Reading
from vllmd.config.nodes import Where
from vllmd.config.types import Config

CLOSED = Problem(Where("/etc/vllmd/vllmd.yaml", 3), "auth.keys[0].key_file", "/etc/vllmd/key: Permission denied")
UNFIT = Problem(Where("/etc/vllmd/vllmd.yaml", 9), "models.m.gpu_memory", "it needs 90 GiB", unfit="m")
OURS = {"euid": 0, "egid": 0, "groups": [0, 27]}


@pytest.fixture
def rights(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a process of root's is to the kernel, without one."""
    now: dict[str, Any] = dict(OURS)
    account = pwd.struct_passwd(("vllmd", "x", 801, 802, "", "/", "/bin/false"))
    monkeypatch.setattr(pwd, "getpwnam", lambda name: account)
    for name in ("euid", "egid", "groups"):
        monkeypatch.setattr(os, f"get{name}", lambda name=name: now[name])
        monkeypatch.setattr(os, f"set{name}", lambda value, name=name: now.update({name: value}))
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 803])
    monkeypatch.setattr(as_daemon, "_numbers_of", lambda groups: [804])
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("PATH", "/nowhere")  # no systemctl of this machine's
    return now


def test_it_is_read_with_the_daemons_rights(rights: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What only root may read is a problem then; that a model can never fit is none of reading. A fault, too, gives the
    rights back."""
    seen: list[dict[str, Any]] = []

    def read(**_: object) -> Reading:
        seen.append(dict(rights))
        assert os.environ["HOME"] == "/"  # what ``~`` is to the daemon
        return Reading(Config(), (CLOSED, UNFIT))

    monkeypatch.setattr(as_daemon, "read", read)
    assert problems_of_daemon(None, {}) == [CLOSED]
    assert seen == [{"euid": 801, "egid": 802, "groups": [802, 803, 804]}]
    assert rights == OURS
    monkeypatch.setattr(as_daemon, "read", lambda **_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        problems_of_daemon(None, {})
    assert (rights, os.environ["HOME"]) == (OURS, "/root")


@pytest.mark.parametrize("refused", ["setgroups", "setegid", "seteuid"])
def test_root_that_may_not_take_them_knows_nothing(
    refused: str, rights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as in a container: what it could read itself is valid, as far as it can tell."""

    def refuse(value: object) -> None:
        if value not in OURS.values():
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, refused, refuse)
    monkeypatch.setattr(as_daemon, "read", lambda **_: 1 // 0)
    assert list(problems_of_daemon(None, {})) == []
    assert rights == OURS


def test_a_named_file_is_a_draft(rights: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be root's alone, and is to be moved; and who is not root can read no more than the daemon."""
    monkeypatch.setattr(as_daemon, "read", lambda **_: 1 // 0)
    assert list(problems_of_daemon("/root/draft.yaml", {})) == []
    assert list(problems_of_daemon(None, {"VLLMD_CONFIG": "/root/draft.yaml"})) == []
    rights["euid"] = 1000
    assert list(problems_of_daemon(None, {})) == []


@pytest.mark.parametrize(("unit", "problems"), [
    ("[Service]\nLoadCredential=hub.token:/etc/vllmd/hub.token\n", []),
    ("[Service]\n#LoadCredential=hub.token:/etc/vllmd/hub.token\nLoadCredential=\n", [CLOSED]),
])  # fmt: skip
def test_what_systemd_hands_over_is_not_looked_for_in_the_files(
    unit: str, problems: list[Problem], tmp_path: Path, rights: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd reads the file of a credential as root, so that the daemon need not have the right to."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\n[ \"$*\" = 'cat vllmd.service' ] && printf '%s' '{unit}'\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(as_daemon, "read", lambda **_: Reading(Config(), (CLOSED,)))
    assert list(problems_of_daemon(None, {})) == problems
