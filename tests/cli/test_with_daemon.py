"""vllmctl against the real daemon, with stand-in engines: what the fakes promise is what happens.

V is the Ollama-like manager: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BOOT = """
import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="http:admin")
os.execv(sys.executable, [sys.executable, "-m", "vllmd", "--config", sys.argv[3]])
"""
CONFIG = """\
devices: [{memory: 80GiB}]
server: {idle_exit: never}
models:
  org/tiny: {engine: sim, aliases: [t], gpu_memory: 20GiB}
  huge: {engine: sim, options: {memory: 90GiB}}
  broken: {engine: sim, command: /nonexistent/engine, gpu_memory: 1GiB}
"""


@dataclass(frozen=True)
class Site:
    """A running daemon, its configuration, and vllmctl pointed at it."""

    config: Path
    env: dict[str, str]

    def ctl(self, *argv: str, status: int = 0) -> str:
        """What vllmctl prints (stdout, then stderr), ended with ``status``."""
        done = subprocess.run(
            [sys.executable, "-m", "vllmd.cli", *argv], env=self.env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self, model: str) -> str:
        """The model's state, by ``ps --json``."""
        return next(str(line["state"]) for line in json.loads(self.ctl("ps", "--json")) if line["name"] == model)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The daemon with both its sockets given, as systemd gives them; engines in sessions."""
    folder = tmp_path_factory.mktemp("site")
    config, admin = folder / "vllmd.yaml", folder / "admin.sock"
    config.write_text(CONFIG)
    with (
        socket.create_server(("127.0.0.1", 0)) as http,
        socket.create_server(str(admin), family=socket.AF_UNIX) as control,
        (folder / "daemon.log").open("w") as log,
    ):
        url = f"http://127.0.0.1:{http.getsockname()[1]}"
        fds = (http.fileno(), control.fileno())
        command = [sys.executable, "-c", BOOT, *map(str, fds), str(config)]
        daemon = subprocess.Popen(command, pass_fds=fds, stdout=log, stderr=log)
    try:
        yield Site(config, {**os.environ, "VLLMD_ADMIN_SOCKET": str(admin), "VLLMD_URL": url})
    finally:
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(120)


def test_V_a_day_of_a_model(site: Site) -> None:
    """Start, look, sleep, wake, stop: each verb returns when it is so."""
    assert site.state("org/tiny") == "stopped"
    assert "t is running after" in site.ctl("start", "t")
    assert site.state("org/tiny") == "running"
    for level in ("1", "2"):
        site.ctl("sleep", "org/tiny", "--level", level)
        assert site.state("org/tiny") == f"sleeping_l{level}"
    site.ctl("wake_up", "tiny")
    assert site.state("org/tiny") == "running"
    site.ctl("sleep", "t", "--level", "3")
    assert site.state("org/tiny") == "stopped"


def test_chat_and_bench_go_through_the_front_door(site: Site) -> None:
    """As any client would."""
    assert site.ctl("chat", "t", "hello") == "hello\n"
    assert "tokens/s in all" in site.ctl("bench", "t", "-n", "3", "-c", "2", "--max-tokens", "5")


def test_a_start_is_measured_beside_the_engine_alone(site: Site) -> None:
    """Both pass through the same phases, and the model serves afterwards, from vllmd's own start."""
    measured = json.loads(site.ctl("bench", "--cold", "t", "--json"))
    assert site.state("org/tiny") == "running"
    for each in ("vllmd", "alone"):
        assert {"imports", "weights"} <= measured[each]["phases"].keys()
        assert sum(measured[each]["phases"].values()) <= measured[each]["seconds"] + 0.01
    assert "last start" in site.ctl("show", "t")
    assert "imports " in site.ctl("ps", "--starts")
    assert site.ctl("chat", "t", "hello") == "hello\n"


def test_what_is_shown_comes_from_the_daemon(site: Site) -> None:
    """Devices, decisions, the engine's lines."""
    site.ctl("start", "t")
    assert "engines run by: sessions" in site.ctl("info")
    assert "org/tiny" in site.ctl("gpus")
    assert "org/tiny is running" in site.ctl("why", "t")
    assert site.ctl("logs", "t", "-n", "3").strip()
    assert "holds for 5m" in site.ctl("lease", "t", "--name", "n", "--for", "5m")
    assert "leased to n" in site.ctl("ps")
    site.ctl("lease", "t", "--name", "n", "--release")
    assert "leased" not in site.ctl("ps")


def test_an_engine_that_cannot_start_says_why(site: Site) -> None:
    """The command's name is in the message; stop forgets the failure."""
    assert "/nonexistent/engine" in site.ctl("start", "broken", status=69)
    assert site.state("broken") == "error"
    site.ctl("stop", "broken")
    assert site.state("broken") == "stopped"


def test_the_lines_of_an_engine_that_has_ended_are_shown(site: Site) -> None:
    """Also to whoever may not read the journal, or where there is none."""
    site.ctl("start", "t")
    site.ctl("stop", "t")
    said = site.ctl("logs", "t")
    assert said.splitlines()[-1].startswith("-- its engine ended at ") and len(said.splitlines()) > 2


def test_a_model_that_can_never_fit_is_a_failure(site: Site) -> None:
    """With status 69 and 400, however it is asked for, and not a model that has stopped."""
    assert "'huge' needs 90 GiB" in site.ctl("start", "huge", status=69)
    assert "'huge' needs 90 GiB" in site.ctl("start", "--no-wait", "huge", status=69)
    assert "huge can never be loaded: 'huge' needs 90 GiB" in site.ctl("doctor", status=69)
    assert "broken" not in site.ctl("status").partition("MODEL")[0]


def test_reload_of_a_broken_file_changes_nothing(site: Site) -> None:
    """The message names line and key, the models stay."""
    site.config.write_text(CONFIG + "polcy: lru\n")
    try:
        assert f"{site.config}:7: polcy: there is no such setting" in site.ctl("reload", status=78)
        assert site.state("org/tiny") in ("running", "stopped", "sleeping_l1")
        assert f"a restart would serve no model: {site.config}:7: polcy" in " ".join(site.ctl("status").split())
    finally:
        site.config.write_text(CONFIG)
    assert "the configuration is loaded" in site.ctl("reload")
    assert "not in force" not in site.ctl("status")


def test_reload_takes_what_it_says_that_it_takes(site: Site) -> None:
    """Policy, devices and reserve at once; under systemd an address is said to be a socket unit's."""
    try:
        changed = CONFIG.replace("80GiB", "90GiB").replace("server: {", "server: {port: 1024, ")
        site.config.write_text(changed + "policy: lru\nreserve: 3GiB\n")
        said = site.ctl("reload")
        assert "server.listen is not used: vllmd.socket says where to listen" in said
        status = json.loads(site.ctl("info", "--json"))
        assert status["policy"] == "lru"
        assert [(each["memory"] >> 30, each["reserve"] >> 30) for each in status["devices"]] == [(90, 3)]
    finally:
        site.config.write_text(CONFIG)
    site.ctl("reload")


def test_V_assign_restart_of_a_running_model(site: Site) -> None:
    """The new memory is in force when it returns."""
    site.ctl("start", "t")
    assert "it runs with that" in site.ctl(
        "assign", "t", "--gpu-memory", "30GiB", "--restart", "--config", str(site.config)
    )
    line = next(line for line in json.loads(site.ctl("ps", "--json")) if line["name"] == "org/tiny")
    assert line["state"] == "running"
    assert line["memory"] >= 30 << 30
    site.ctl("stop", "t")
    argv = ("assign", "t", "--gpu-memory", "20GiB", "--restart", "--config", str(site.config))
    assert "org/tiny is not loaded, its next start goes by it" in site.ctl(*argv)


def test_a_model_that_is_not_there(site: Site) -> None:
    """The daemon's words, whichever verb asks."""
    assert "did you mean 'org/tiny'" in site.ctl("start", "org/tini", status=65)
