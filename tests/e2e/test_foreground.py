"""``vllmd serve`` at a terminal: signals, alone and twice, to it and to its whole group, while it loads or answers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

LIMIT = 60.0  # seconds
BODY = {"model": "a", "prompt": "one two three four five six seven eight", "max_tokens": 16}
# The leader of a session, as a shell is, with vllmd in the foreground of its terminal.
SHELL = """
import os, signal, subprocess, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
os.setsid()
terminal = os.open(os.environ["TERMINAL"], os.O_RDWR)
child = subprocess.Popen(sys.argv[1:], stdin=terminal)
print(child.pid, flush=True)
child.wait()
"""


class Serve:
    """A daemon in a process group of its own, and its one model ``a``."""

    def __init__(self, folder: Path, **options: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = int(probe.getsockname()[1])
        self.admin_path = folder / "admin.sock"
        model = {"engine": "sim", "stop_timeout": 2, "options": {"load_time": "0s", **options}}
        config = {"server": {"idle_exit": "never"}, "devices": [], "models": {"a": model}}
        (folder / "vllmd.yaml").write_text(json.dumps(config))
        (folder / "vllmd.yaml").chmod(0o600)
        self.argv = [sys.executable, "-m", "vllmd", "serve", "--config", str(folder / "vllmd.yaml")]
        self.argv += ["--port", str(self.port)]
        self.env = {**os.environ, "VLLMD_ADMIN_SOCKET": str(self.admin_path)}
        self.log = folder / "log"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=LIMIT)
        self.admin = httpx.Client(transport=httpx.HTTPTransport(uds=str(self.admin_path)), base_url="http://x")

    @contextlib.contextmanager
    def running(self) -> Iterator[Serve]:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env, start_new_session=True
            )
        try:
            self.until(lambda: self.answers("/health"))
            yield self
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()

    def answers(self, path: str) -> bool:
        try:
            return self.http.get(path).status_code == 200
        except httpx.HTTPError:
            return False

    def until(self, condition: Any) -> Any:
        end = time.monotonic() + LIMIT
        while not (value := condition()):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        return value

    def view(self) -> dict[str, Any]:
        views = self.until(lambda: self.admin.get("/admin/status").json()["models"])  # it has opened
        return dict(views[0])

    def engine(self) -> int:
        """The pid of the model's engine, once it has one."""
        return int(self.until(lambda: self.view()["pid"]))

    def ask(self) -> tuple[threading.Thread, list[httpx.Response]]:
        """Ask in the background; returns once the daemon knows of the request."""
        answers: list[httpx.Response] = []
        url = f"http://127.0.0.1:{self.port}/v1/completions"

        def post() -> None:
            with contextlib.suppress(httpx.HTTPError):
                answers.append(httpx.post(url, json=BODY, timeout=LIMIT))

        asking = threading.Thread(target=post)
        asking.start()
        self.until(lambda: self.admin.get("/admin/status").json()["requests"])
        return asking, answers

    def late(self) -> httpx.Response:
        """The answer to a client that comes now."""
        return httpx.post(f"http://127.0.0.1:{self.port}/v1/completions", json={**BODY, "max_tokens": 1})

    def ended(self) -> int:
        """The exit status."""
        return self.process.wait(LIMIT)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between the opening and the reading
        return True


def test_waiters_are_told_at_once(tmp_path: Path) -> None:
    """Ctrl-C while a model loads for minutes: nobody comes after us whom the client could wait for."""
    serve = Serve(tmp_path, load_time="300s")
    with serve.running():
        asking, answers = serve.ask()
        engine = serve.engine()
        serve.process.send_signal(signal.SIGTERM)
        asking.join(LIMIT)
        assert (answers[0].status_code, answers[0].headers["connection"]) == (503, "close")
        assert "shutting down" in answers[0].text
        assert serve.ended() == 0
        assert gone(engine)


def test_what_has_begun_is_finished_and_whoever_comes_late_is_told(tmp_path: Path) -> None:
    """While it drains, new clients get 503 at once, on kept connections as well, and vllmctl is still answered."""
    serve = Serve(tmp_path, tokens_per_second=2)
    with serve.running():
        kept = httpx.Client(base_url=f"http://127.0.0.1:{serve.port}", timeout=LIMIT)
        assert kept.get("/health").status_code == 200
        serve.http.post("/v1/completions", json={**BODY, "max_tokens": 1})
        asking, answers = serve.ask()
        serve.process.send_signal(signal.SIGTERM)
        serve.until(lambda: serve.late().status_code == 503)
        for client in (kept, httpx.Client(base_url=kept.base_url, timeout=LIMIT)):
            late = client.post("/v1/completions", json=BODY)
            assert (late.status_code, late.headers["connection"]) == (503, "close")
            assert late.elapsed.total_seconds() < 1
        assert serve.view()["in_flight"] == 1
        asking.join(LIMIT)
        assert (answers[0].status_code, answers[0].json()["usage"]["completion_tokens"]) == (200, 8)
        assert serve.ended() == 0


def test_a_second_signal_ends_it_now(tmp_path: Path) -> None:
    """Whoever presses Ctrl-C twice does not want to wait for an answer of minutes."""
    serve = Serve(tmp_path, tokens_per_second=0.01)
    with serve.running():
        with httpx.stream("POST", f"{serve.http.base_url}/v1/completions", json={**BODY, "stream": True}) as answer:
            assert answer.status_code == 200
            engine = serve.engine()
            serve.process.send_signal(signal.SIGINT)
            serve.until(lambda: serve.late().status_code == 503)
            began = time.monotonic()
            serve.process.send_signal(signal.SIGINT)
            assert serve.ended() == 0
            assert time.monotonic() - began < 10  # and not the drain_timeout of 60
        assert gone(engine)


def test_a_killed_process_group_leaves_no_engine(tmp_path: Path) -> None:
    """As `timeout -k` or a supervisor does: the launcher has a session of its own, and ends what it must clean up."""
    serve = Serve(tmp_path, load_time="300s")
    with serve.running():
        asking, _ = serve.ask()
        engine = serve.engine()
        os.killpg(serve.process.pid, signal.SIGKILL)
        serve.until(lambda: gone(engine))
        asking.join(LIMIT)


def test_a_closed_terminal_ends_it_and_a_hangup_without_one_reloads(tmp_path: Path) -> None:
    """The window is closed while a client waits: the answer is finished, nothing is left. A daemon's SIGHUP reloads."""
    serve = Serve(tmp_path, tokens_per_second=4)
    with serve.running():
        serve.process.send_signal(signal.SIGHUP)
        serve.until(lambda: "configuration reloaded" in serve.log.read_text())
        serve.process.send_signal(signal.SIGTERM)
        assert serve.ended() == 0

    master, slave = pty.openpty()
    env = {**serve.env, "TERMINAL": os.ttyname(slave)}
    with serve.log.open("w") as log:
        argv = [sys.executable, "-c", SHELL, *serve.argv]
        shell = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, env=env, text=True)
    assert shell.stdout
    pid = int(shell.stdout.readline())
    os.close(slave)
    serve.until(lambda: serve.answers("/health"))
    assert serve.late().status_code == 200  # loaded
    asking, answers = serve.ask()
    engine = serve.engine()
    os.close(master)
    asking.join(LIMIT)
    assert answers[0].status_code == 200
    serve.until(lambda: gone(pid) and gone(engine))
    shell.wait(LIMIT)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))


def test_where_it_listens_is_said_at_the_start(tmp_path: Path) -> None:
    """A port of 0 is one that nobody could know otherwise."""
    serve = Serve(tmp_path)
    serve.argv[-1] = "0"
    env = {**serve.env, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(serve.argv, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr
            said = next(line for line in process.stderr if "listening on " in line)
            url = said.partition("listening on ")[2].split(" and ")[0].split(", ")[0].strip()
            assert not url.endswith(":0") and str(serve.admin_path) in said
            assert httpx.get(f"{url}/health/live", timeout=LIMIT).status_code == 200
        finally:
            process.terminate()
            process.communicate(timeout=LIMIT)
