"""What tests of plug-ins share: the example package installed into a folder, and a daemon that finds it there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

PLUGIN = Path(__file__).resolve().parents[1] / "plugin"
LIMIT = 120.0  # seconds; only a defect lets one pass, however busy the machine is
BOOT = """
import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="http:admin")
os.execv(sys.executable, [sys.executable, "-m", "vllmd", "--config", sys.argv[3]])
"""


def install_plugin(folder: Path) -> Path:
    """Install the example package as pip would, without the network: its files, and its entry points beside them."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    for package in PLUGIN.glob("*/__init__.py"):
        shutil.copytree(package.parent, folder / package.parent.name)
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    sections = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections))
    return folder


class Site:
    """A daemon started by hand, and what one asks it."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes], admin: Path) -> None:
        self.port, self.log, self.process = port, log, process
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT)
        self.admin = httpx.Client(transport=httpx.HTTPTransport(uds=str(admin)), base_url="http://vllmd", timeout=LIMIT)

    def chat(self, model: str, said: str = "hi", **headers: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": said}]}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def answer(self, model: str, said: str = "hi") -> str:
        """What the model answers; insists on an answer."""
        reply = self.chat(model, said)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["message"]["content"])

    def refusal(self, model: str) -> str:
        """Why the model cannot be had; insists on a refusal."""
        reply = self.chat(model)
        assert reply.status_code >= 400, reply.text
        return str(reply.json()["error"]["message"])

    def view(self, model: str) -> dict[str, Any]:
        models = self.admin.get("/admin/status").json()["models"]
        return next(view for view in models if view["name"] == model)

    def wait_for(self, model: str, *states: str) -> None:
        deadline = time.monotonic() + LIMIT
        while (state := self.view(model)["state"]) not in states:
            assert time.monotonic() < deadline, f"{model} is {state}, not {states}"
            time.sleep(0.05)

    def decision(self, model: str, what: str) -> dict[str, Any]:
        """The last decision of that kind about the model, as soon as there is one."""
        deadline = time.monotonic() + LIMIT
        while True:
            made = self.admin.get(f"/admin/decisions?model={model}").json()["decisions"]
            found = [decision for decision in made if decision["what"] == what]
            if found:
                return found[-1]
            assert time.monotonic() < deadline, f"{model}: no {what!r} in {made}"
            time.sleep(0.05)

    def unload(self, model: str) -> None:
        assert self.admin.post(f"/admin/models/{model}/unload?wait=true", json={}).status_code == 200
        self.wait_for(model, "stopped")


def ports() -> dict[str, int]:
    """Engine ports of this test process's own: daemons of others, which run beside it, look for free ones as well."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return {"port_start": 33300 + 50 * worker, "port_end": 33349 + 50 * worker}


@contextlib.contextmanager
def daemon(
    folder: Path, config: object, *, path: str = "", port: int = 0, inside: Sequence[str] = (), ends: bool = False
) -> Iterator[Site]:
    """A daemon of its own, with ``path`` in PYTHONPATH, ended at the end. ``inside``: the command that runs it.

    ``ends``: it may have ended by itself by then.
    """
    folder.mkdir(exist_ok=True)
    settings, control, log = folder / "vllmd.yaml", folder / "admin.sock", folder / "log"
    settings.write_text(json.dumps({"engines": ports(), **config}))
    settings.chmod(0o600)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ["PYTHONPATH"], path]))}
    with (
        socket.create_server(("127.0.0.1", port)) as http,
        socket.create_server(str(control), family=socket.AF_UNIX) as admin,
        log.open("w") as output,
    ):
        fds = (http.fileno(), admin.fileno())
        command = [*inside, sys.executable, "-c", BOOT, *map(str, fds), str(settings)]
        process = subprocess.Popen(command, pass_fds=fds, stdout=output, stderr=output, env=env)
        site = Site(http.getsockname()[1], log, process, control)
    try:
        yield site
        assert ends or process.poll() is None, log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT)
        site.http.close()
        site.admin.close()
