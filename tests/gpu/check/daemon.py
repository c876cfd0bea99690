"""vllmd itself, with a launcher that outlives it, on a machine without systemd."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.check.attribution import Unix
from tests.gpu.check.bench import REPOSITORY, Bench, wait_for

START_LIMIT = 60.0
ANSWER_LIMIT = 240.0


@dataclass
class Site:
    """A configuration, its launcher, and the daemons that come and go."""

    bench: Bench
    folder: Path
    config: Mapping[str, Any]
    port: int
    daemon: subprocess.Popen[bytes] | None = None
    launcher: subprocess.Popen[bytes] | None = None
    daemons: int = 0

    def open(self) -> None:
        """Start launcher and daemon."""
        for name in ("run", "home", "log", "cache"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        listener = self.folder / "l.sock"
        self.launcher = self._run("launcher", "-m", "tests.gpu.check.launcher", str(listener))
        if not wait_for(listener.exists, START_LIMIT):
            raise RuntimeError(f"the launcher did not start:\n{self.log('launcher')[-2000:]}")
        (self.folder / "vllmd.yaml").write_text(json.dumps(self.config))  # YAML takes JSON
        self.start()

    def start(self) -> None:
        """Start a daemon; returns when it answers and has found its devices and engines."""
        self.daemons += 1
        self.daemon = self._run(f"daemon{self.daemons}", "-m", "vllmd", "--config", str(self.folder / "vllmd.yaml"))
        if not wait_for(self._opened, START_LIMIT) or self.daemon.poll() is not None:
            raise RuntimeError(f"vllmd did not start:\n{self.log(f'daemon{self.daemons}')[-3000:]}")

    def kill(self) -> None:
        """SIGKILL to the daemon alone."""
        assert self.daemon
        self.daemon.kill()
        self.daemon.wait()

    def close(self) -> None:
        """End the daemon, then the launcher with every engine."""
        for process in (self.daemon, self.launcher):
            if process and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text(errors="replace")

    def engine_logs(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted((self.folder / "log").glob("*")))

    def status(self) -> dict[str, Any]:
        """``/admin/status``. Raises OSError."""
        connection = Unix(str(self.folder / "a.sock"))
        try:
            connection.request("GET", "/admin/status")
            return json.loads(connection.getresponse().read())  # type: ignore[no-any-return]
        finally:
            connection.close()

    def admin(self, path: str, body: Mapping[str, Any]) -> int:
        """Ask the control socket; the status."""
        connection = Unix(str(self.folder / "a.sock"))
        try:
            connection.request("POST", f"/admin/{path}", json.dumps(body), {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()

    def model(self, name: str) -> dict[str, Any]:
        """Its line of the status."""
        return next(line for line in self.status()["models"] if line["name"] == name)

    def chat(self, model: str, *, stream: bool = False, tokens: int = 16) -> tuple[int, str, str]:
        """Status, text and finish_reason ("" for an answer that did not come to its end)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_LIMIT)
        body = {"model": model, "stream": stream, "max_tokens": tokens,
                "messages": [{"role": "user", "content": "Count as far as you can, please."}]}  # fmt: skip
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read().decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            return 0, f"{type(error).__name__}: {error}", ""
        finally:
            connection.close()
        if answer.status != 200:
            return answer.status, data[:500], ""
        return (200, *(_streamed(data) if stream else _whole(data)))

    def _opened(self) -> bool:
        assert self.daemon
        if self.daemon.poll() is not None:
            return True
        try:
            return bool(self.status()["opened"])
        except (OSError, ValueError, http.client.HTTPException):
            return False

    def _run(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        env = self.bench.environment(
            VLLMD_LAUNCHER=str(self.folder / "l.sock"),
            VLLMD_ADMIN_SOCKET=str(self.folder / "a.sock"),
            VLLMD_ENGINE_RUN_DIR=str(self.folder / "run"),
            VLLMD_ENGINE_HOME=str(self.folder / "home"),
            CACHE_DIRECTORY=str(self.folder / "cache"),
            LOGS_DIRECTORY=str(self.folder / "log"),
            HF_HUB_OFFLINE="1",
        )
        with (self.folder / f"{name}.txt").open("wb") as output:
            return subprocess.Popen(
                [self.bench.python, *argv], env=env, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip


def _whole(data: str) -> tuple[str, str]:
    try:
        choice = json.loads(data)["choices"][0]
        return str(choice["message"]["content"]), str(choice["finish_reason"])
    except (ValueError, LookupError):
        return data[:500], ""


def _streamed(data: str) -> tuple[str, str]:
    text, finish = "", ""
    for line in data.splitlines():
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            return str(event["error"]), ""
        for choice in event.get("choices", ()):
            text += choice.get("delta", {}).get("content") or ""
            finish = choice.get("finish_reason") or finish
    return text, finish


@contextlib.contextmanager
def site(bench: Bench, name: str, config: Mapping[str, Any]) -> Iterator[Site]:
    """An open one, at a port that is free; whatever happens, nothing of it is left running."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = bench.folder / name
    folder.mkdir()
    engines = (
        port + 1 if port < 65_000 else port - 500
    )  # a range of its own: other daemons give theirs from the first on
    plain = {
        "server": {"listen": [f"127.0.0.1:{port}"]},
        "engines": {"port_start": engines, "port_end": engines + 400},
    }
    here = Site(bench, folder, {**plain, **config}, port)
    try:
        here.open()
        yield here
    finally:
        here.close()
