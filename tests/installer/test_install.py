"""Real pip, wheels of our own: installed, proved, in use; and what is left when it does not come to that."""

from __future__ import annotations

import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.installer.wheels import LACKS_A_LIBRARY, wheel
from vllmd.cli import main
from vllmd.errors import BadRequest, Forbidden, InstallFailed
from vllmd.installer import folders, requests
from vllmd.installer.install import Wanted, install
from vllmd.installer.pip import Progress


def nothing(_: Progress) -> None:
    """Whoever wants to know how far it is."""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path / "engines"))
    return tmp_path / "engines"


def left(root: Path) -> list[str]:
    return sorted(os.listdir(root / "llama.cpp"))


def test_the_life_of_two_versions(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Installed from a folder of wheels, the newest, then one that is named; a broken one changes nothing."""
    wheels = str(tmp_path / "wheels")
    wheel(tmp_path / "wheels", "1.0")
    assert main(["engine", "install", "llama.cpp", "--offline", wheels]) == 0
    told, noted = capsys.readouterr()
    assert "without huggingface_hub, which was not to be had" in noted
    assert f"llama.cpp 1.0 for the CPU is installed in {root}/llama.cpp/1.0" in told
    assert "llama.cpp 1.0 is in use" in told
    script = (root / "llama.cpp/1.0/bin/pip").read_text()
    assert script.startswith(f"#!{root}/llama.cpp/1.0/bin/python")
    assert ".making" not in script
    wheel(tmp_path / "wheels", "2.0")
    done = install(Wanted("llama.cpp", "2.0", offline=wheels, env=os.environ), root, nothing)
    assert (done.version, done.before, done.fresh, done.build) == ("2.0", "1.0", True, "cpu")
    assert not install(Wanted("llama.cpp", "2.0", offline=wheels), root, nothing).fresh
    wheel(tmp_path / "wheels", "3.0", LACKS_A_LIBRARY)
    with pytest.raises(InstallFailed, match=r"needs libgomp\.so\.1: apt install libgomp1"):
        install(Wanted("llama.cpp", "3.0", offline=wheels, env=os.environ), root, nothing)
    assert left(root) == [".lock", "1.0", "2.0", "current", "previous"]
    assert main(["engine", "rollback", "llama.cpp"]) == 0
    assert main(["engine", "--json", "list"]) == 0
    listed = json.loads("[" + capsys.readouterr().out.partition("[")[2])
    assert [(line["version"], line["in_use"], line["size"] > 0) for line in listed] == [
        ("2.0", False, True), ("1.0", True, True)
    ]  # fmt: skip


def test_what_stops_it_leaves_nothing(root: Path, tmp_path: Path) -> None:
    """Ctrl-C, or an asker who has gone: what it raises ends pip's processes, too."""
    wheel(tmp_path / "wheels", "1.0")
    told: list[Progress] = []

    def enough(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(Wanted("llama.cpp", offline=str(tmp_path / "wheels"), env=os.environ), root, enough)
    assert left(root) == [".lock"]
    assert folders.running_from(root) == []


def fake_python(folder: Path, text: str) -> str:
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\n{text}\nexit 1\n")
    path.chmod(0o755)
    return str(path)


def test_a_python_without_venv_is_named_with_what_brings_it(root: Path, tmp_path: Path) -> None:
    """Debian's python3 alone has none."""
    python = fake_python(tmp_path, "echo 'The virtual environment was not created: ensurepip is not available.'")
    with pytest.raises(InstallFailed, match=f"no venv module for {python}: apt install python3-venv"):
        install(Wanted("llama.cpp", python=python), root, nothing)
    python = fake_python(tmp_path, "echo '[Errno 28] No space left on device'")
    with pytest.raises(InstallFailed, match=f"the disk is full: .* free in {root}/llama.cpp"):
        install(Wanted("llama.cpp", python=python), root, nothing)
    with pytest.raises(InstallFailed, match="/nowhere/python cannot be run"):
        install(Wanted("llama.cpp", python="/nowhere/python"), root, nothing)
    assert left(root) == [".lock"]


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it takes and what there is."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 12_000_000})())
    with pytest.raises(InstallFailed, match=r"vllm takes about 4\.66 GiB, and .*/vllm has 11\.44 MiB free"):
        install(Wanted("vllm", build="cpu"), root, nothing)


def test_only_root_says_where_packages_come_from() -> None:
    """Whoever chooses that chooses what engines run."""
    requests.check_allowed(
        {"verb": "install", "kind": "vllm", "version": "1", "build": "cpu", "env": {}}, trusted=False
    )
    for name, value in (("index_url", "http://x"), ("offline", "/x"), ("python", "/x"), ("env", {"HTTPS_PROXY": "x"})):
        with pytest.raises(Forbidden, match="only root may say"):
            requests.check_allowed({"verb": "install", name: value}, trusted=False)
        requests.check_allowed({"verb": "install", name: value}, trusted=True)


@pytest.mark.parametrize("line", [b"", b"[]", b"{", b'{"kind": 1}', b'{"env": {"A": 1}}', b'{"env": []}'])
def test_a_request_is_an_object_of_texts(line: bytes) -> None:
    """What comes over a socket is looked at first."""
    with pytest.raises(BadRequest):
        requests.read(line)


@contextmanager
def asked(
    root: Path, request: dict[str, Any], daemon: str = "vllmd"
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A connection to the service as systemd hands it over, with a request on its way; ``daemon``: its user."""
    ours, its = socket.socketpair()
    code = (
        f"import pathlib, sys; from vllmd.installer import service; service.DAEMON = {daemon!r}; "
        f"sys.exit(service.serve(pathlib.Path({str(root)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=its, stdout=its, stderr=subprocess.PIPE)
    its.close()
    with process, ours:
        ours.settimeout(60)
        ours.sendall(json.dumps(request).encode() + b"\n")
        yield ours, process


def test_the_service_answers_one_request(root: Path) -> None:
    """With a line that says what is wrong, and with what status."""
    with asked(root, {"verb": "use", "kind": "llama.cpp", "version": "1.0"}) as (connection, process):
        answer = json.loads(connection.makefile("rb").readline())
        assert answer["status"] == 404
        assert "llama.cpp 1.0 is not installed" in answer["failed"]
        assert process.wait(60) == 0


def test_the_daemons_user_changes_no_engine(root: Path) -> None:
    """It is in the group that the socket is open to, and the first that an attacker would have."""
    daemon = pwd.getpwuid(os.geteuid()).pw_name
    with asked(root, {"verb": "use", "kind": "llama.cpp", "version": "1.0"}, daemon) as (connection, process):
        answer = json.loads(connection.makefile("rb").readline())
        assert (answer["status"], "runs the daemon" in answer["failed"]) == (403, True), answer
        assert process.wait(60) == 0


def test_the_service_ends_with_its_asker(root: Path, tmp_path: Path) -> None:
    """Ctrl-C in vllmctl stops what it asked for, and leaves nothing."""
    wheel(tmp_path / "wheels", "1.0")
    request = {"verb": "install", "kind": "llama.cpp", "offline": str(tmp_path / "wheels")}
    with asked(root, request) as (connection, process):
        assert "progress" in json.loads(connection.makefile("rb").readline())
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert process.wait(60) == 1
        assert process.stderr is not None
        assert b"the client has disconnected" in process.stderr.read()
    assert left(root) == [".lock"]
