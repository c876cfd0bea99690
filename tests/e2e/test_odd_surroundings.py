"""``vllmd serve`` where containers, cron jobs and odd machines put it: it serves, or says what is missing."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from vllmd.config.sources import default_file
from vllmd.config.user_home import user_home
from vllmd.daemon.main import learnt_of

LIMIT = 60.0  # seconds
ENGINE = {"engine": "sim", "options": {"load_time": "0s", "tokens_per_second": 200}}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may look into, with a configuration in it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "vllmd.yaml").write_text(json.dumps({"devices": [], "models": {"a": ENGINE}}))
        yield Path(folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def argv(place: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "vllmd", "serve", "--config", str(place / "vllmd.yaml"), *more]


def surroundings(**more: str) -> dict[str, str]:
    """Nothing but where the code is."""
    return {"PYTHONPATH": os.environ["PYTHONPATH"], **more}


@contextlib.contextmanager
def served(place: Path, port: int, env: Mapping[str, str], *before: str) -> Iterator[Path]:
    """A daemon that answers a chat; yields its log."""
    with (place / "log").open("w") as log:
        process = subprocess.Popen(
            [*before, *argv(place, "--port", str(port))], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env
        )
    body, end, answer = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}, time.monotonic() + LIMIT, None
    try:
        while answer is None:
            assert process.poll() is None and time.monotonic() < end, (place / "log").read_text()
            with contextlib.suppress(httpx.ConnectError):
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=LIMIT)
        assert answer.status_code == 200, answer.text
        yield place / "log"
    finally:
        process.terminate()
        process.wait(LIMIT)


@pytest.mark.parametrize(
    "more", [{}, {"LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"HOME": "/proc/none", "PATH": ""}]
)
def test_it_serves_with_hardly_any_environment(place: Path, more: dict[str, str]) -> None:
    """A cron job has neither HOME nor a locale to speak of."""
    with served(place, free_port(), surroundings(VLLMD_ADMIN_SOCKET=str(place / "admin.sock"), **more)) as log:
        assert "Traceback" not in log.read_text()


def test_a_user_whom_the_system_does_not_know_has_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers run as bare numbers: nothing is kept, and the system's configuration is read."""

    def getpwuid(number: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert user_home({}) is None
    assert learnt_of({}) is None
    assert default_file({}) == Path("/etc/vllmd/vllmd.yaml")
    assert learnt_of({"XDG_CACHE_HOME": "/c"}) == Path("/c/vllmd/learnt.json")


def failure(place: Path, env: Mapping[str, str], *more: str) -> tuple[int, str]:
    done = subprocess.run(argv(place, *more), capture_output=True, text=True, env=env, timeout=LIMIT)
    return done.returncode, done.stderr


def test_a_port_that_is_taken_is_told_with_its_holder(place: Path) -> None:
    """By name and number, so that nobody has to look for it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, error = failure(place, surroundings(HOME=str(place)), "--port", str(port))
    assert status == 69
    assert f"127.0.0.1:{port}: Address already in use: " in error
    assert f"(process {os.getpid()}, user " in error
    assert "Traceback" not in error


def test_an_address_that_is_not_there_yet_is_waited_for(place: Path) -> None:
    """A VPN comes up later than the daemon; clients of the other addresses need not wait for it."""
    port = free_port()
    listen = {"listen": ["192.0.2.9:1", "[2001:db8::9]:1", f"127.0.0.1:{port}"]}
    config = {"server": listen, "auth": {"allow_anonymous": True}, "devices": [], "models": {"a": ENGINE}}
    (place / "vllmd.yaml").write_text(json.dumps(config))
    with (place / "log").open("w") as log:
        process = subprocess.Popen(argv(place), stdout=log, stderr=log, env=surroundings(HOME=str(place)))
    try:
        end = time.monotonic() + LIMIT
        while True:
            assert process.poll() is None and time.monotonic() < end, (place / "log").read_text()
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=LIMIT).status_code == 200
                break
        told = (place / "log").read_text()
        assert "192.0.2.9 is no address of this machine now" in told
        assert "2001:db8::9 is no address of this machine now" in told
    finally:
        process.terminate()
        process.wait(LIMIT)


def test_without_a_folder_for_temporary_files_it_says_what_helps(place: Path) -> None:
    """A container with a read-only file system."""
    nowhere = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/none']; "
    run = nowhere + "import sys, vllmd.daemon.main as m; sys.exit(m.main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, *argv(place, "--port", str(free_port()))[3:]]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings(HOME=str(place)), timeout=LIMIT)
    assert done.returncode == 78
    assert "TMPDIR or VLLMD_ENGINE_RUN_DIR names one that can be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tilde_without_a_home_is_told_with_its_place(place: Path) -> None:
    """The configuration's line, and what to write instead."""
    config = {"engines": {"run_dir": "~nobody-here/run"}, "models": {"a": ENGINE}}
    (place / "vllmd.yaml").write_text(json.dumps(config))
    status, error = failure(place, surroundings(), "--check")
    assert status == 78
    assert "engines.run_dir" in error
    assert "no home directory that ~ could mean" in error
