"""A machine with vllmd installed, as its administrator and its users see it."""

from __future__ import annotations

import json
import shlex
import textwrap
from typing import Any

from tests.machine.container import Machine

CONFIG_FILE = "/etc/vllmd/vllmd.yaml"
BASE = "http://127.0.0.1:33258"


class Site:
    """What one does with an installed vllmd, by curl, vllmctl and systemctl."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # -- the administrator ---------------------------------------------------------------

    def write_config(self, text: str) -> None:
        self.machine.write(CONFIG_FILE, text)

    def configure(self, text: str) -> None:
        """Write the configuration and have the next daemon take it."""
        self.write_config(text)
        self.machine.run("systemctl stop vllmd.service")

    def to_rest(self) -> None:
        """Stop everything but the sockets."""
        self.machine.run("systemctl stop vllmd.service vllmd-launcher.service", check=False)
        self.machine.run("systemctl reset-failed", check=False)
        self.machine.run("systemctl start vllmd.socket")

    def active(self, unit: str) -> str:
        return self.machine.run(["systemctl", "is-active", unit], check=False).stdout.strip()

    def users(self, unit: str) -> set[str]:
        """Whose processes are in a unit's cgroup."""
        pids = ",".join(map(str, self.machine.cgroup_pids(unit)))
        return set(self.machine.out(f"ps -o user:32= -p {pids}").split())

    def status(self) -> dict[str, Any]:
        return json.loads(self.machine.out("curl -sf --unix-socket /run/vllmd/admin.sock http://x/admin/status"))  # type: ignore[no-any-return]

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """Ask the control socket, and insist on an answer."""
        status, answer = self._curl(
            f"curl -s --unix-socket /run/vllmd/admin.sock -X {method} {shlex.quote(f'http://x/admin/{path}')} "
            f"-H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body or {}))} -w '\\n%{{http_code}}'"
        )
        assert 200 <= status < 300, f"{status}: {answer}\n{self.machine.journal('vllmd.service')[-4000:]}"
        return answer

    def view(self, model: str) -> dict[str, Any]:
        """The model's line of the status; it may take a moment until the daemon has found its engines."""
        status: dict[str, Any] = {}
        self.machine.wait_until(lambda: status.update(self.status()) or status["opened"])
        return next(view for view in status["models"] if view["name"] == model)

    def state(self, model: str) -> str:
        return str(self.view(model)["state"])

    def scope(self, model: str) -> str:
        return str(self.view(model)["unit"])

    def engine_pid(self, model: str) -> int | None:
        return self.view(model)["pid"]  # type: ignore[no-any-return]

    def states_until_gone(self, model: str) -> list[str]:
        """The settled states it goes through, as they come, until it is stopped."""
        seen: list[str] = []

        def stopped() -> bool:
            state = self.state(model)
            if state in ("running", "sleeping_l1", "sleeping_l2", "stopped", "error") and state not in seen[-1:]:
                seen.append(state)
            return state == "stopped"

        self.machine.wait_until(stopped, timeout=60)
        return seen

    # -- the users -----------------------------------------------------------------------

    def get(self, path: str) -> tuple[int, Any]:
        return self._curl(f"curl -s -w '\\n%{{http_code}}' {BASE}{path}")

    def post(self, path: str, body: object, *, timeout: float = 60.0) -> tuple[int, Any]:
        return self._curl(self._post_command(path, body) + " -w '\\n%{http_code}'", timeout)

    def posts(self, number: int, path: str, body: object) -> list[tuple[int, Any]]:
        """The same request from several clients at once."""
        command = self._post_command(path, body) + " -w '\\n%{http_code}'"
        running = [self.machine.popen(command) for _ in range(number)]
        return [_answer(process.communicate(timeout=120)[0]) for process in running]

    def chat(self, model: str, words: str, **more: object) -> dict[str, Any]:
        """Ask, and insist on an answer."""
        body = {"model": model, "messages": [{"role": "user", "content": words}], **more}
        status, answer = self.post("/v1/chat/completions", body)
        assert status == 200, answer
        return answer  # type: ignore[no-any-return]

    def curl(self, model: str, words: str) -> str:
        """The shell line of a client that wants one answer."""
        return self._post_command(
            "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": words}]}
        )

    def curl_stream(self, model: str, words: str, **more: object) -> str:
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": words}], **more}
        return "exec " + self._post_command("/v1/chat/completions", body) + " -N"

    def python(self, code: str, *, timeout: float = 60.0) -> Any:
        """Run a client written in Python there; what it prints is JSON."""
        return json.loads(self.machine.python(textwrap.dedent(code), timeout=timeout).stdout)

    def _post_command(self, path: str, body: object) -> str:
        return f"curl -s {BASE}{path} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"

    def _curl(self, command: str, timeout: float = 60.0) -> tuple[int, Any]:
        return _answer(self.machine.run(command, check=False, timeout=timeout).stdout)

    @staticmethod
    def json(text: str) -> dict[str, Any]:
        return json.loads(text)  # type: ignore[no-any-return]


def _answer(text: str) -> tuple[int, Any]:
    """curl's output with the status in its last line."""
    body, _, status = text.rpartition("\n")
    return int(status), json.loads(body) if body else None
