"""The servers that ``bench-proxy`` compares: how each is configured, started, awaited and stopped.

One worker each, keep-alive to the upstream, no buffering and no log of accesses; only vllm-router takes a thread for
each core, as its users get it, and is measured a second time with one (``ROUTER_1``). ``vllmd`` is the whole daemon,
its model a ``remote`` one, on the event loop that users get, and ``asyncio`` the same on Python's own; ``relay`` is
its proxy alone, behind a gate that is always open (``python -m tests.bench.proxy_servers PORT UPSTREAM``).

nginx, HAProxy and vllmd's dependencies are Debian's, as users get them; so is vllmd's Python (a Python that somebody
built without profile-guided optimisation, such as pyenv's, is a fifth slower). vllm-router and LiteLLM are PyPI's, in
a venv of the same Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("VLLMD_DEV_CACHE") or Path.home() / ".cache" / "vllmd-dev")
VENV = CACHE / "bench"
DEBIAN_PYTHON = "/usr/bin/python3"
NEEDED = "import sys, h11, yaml, prometheus_client, sdnotify; sys.exit(sys.version_info < (3, 11))"


@dataclass(frozen=True)
class Runner:
    """A running server: its name, port and process."""

    name: str
    port: int
    pid: int


ASYNCIO = "asyncio"  # vllmd without uvloop
ROUTER = "vllm-router"
ROUTER_1 = "vllm-router, one thread"
VLLMD = """
server: {{listen: ["127.0.0.1:{port}"]}}
log_level: error
models:
  m: {{engine: remote, options: {{url: "http://127.0.0.1:{upstream}"}}}}
"""
NGINX = """
daemon off; worker_processes 1; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/f;
  uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s; keepalive_requests 1000000000;
  upstream engine {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""
HAPROXY = """
global
  nbthread 1
  maxconn 9000
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  option http-no-delay
  http-reuse always
listen bench
  bind 127.0.0.1:{port}
  server engine 127.0.0.1:{upstream}
"""
LITELLM = """
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{upstream}/v1", api_key: none}}
"""


@cache
def python() -> str:
    """Debian's Python if it is new enough and has what vllmd needs, else the one that runs this."""
    able = os.path.exists(DEBIAN_PYTHON) and not subprocess.run([DEBIAN_PYTHON, "-c", NEEDED], check=False).returncode
    return DEBIAN_PYTHON if able else sys.executable


def install_others() -> None:
    """vllm-router and LiteLLM from PyPI, once."""
    if not (VENV / "bin" / "litellm").exists():
        subprocess.run([python(), "-m", "venv", "--clear", str(VENV)], check=True)
        subprocess.run([str(VENV / "bin" / "pip"), "-q", "install", "vllm-router", "litellm[proxy]"], check=False)


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def command(name: str, port: int, upstream: int, folder: Path, settings: str = "") -> list[str] | None:
    """The command line of the server called ``name``; None if it is not to be had. ``settings``: more of vllmd's."""

    def configured(text: str, suffix: str) -> str:
        file = folder / f"{name}.{suffix}"
        file.write_text(text.format(port=port, upstream=upstream, dir=folder))
        return str(file)

    installed = VENV / "bin" / (ROUTER if name == ROUTER_1 else name)
    if name == "upstream":
        interpreter = VENV / "bin" / "python"
        return [str(interpreter) if interpreter.exists() else python(), "-m", "tests.bench.proxy_upstream", str(port)]
    if name in ("vllmd", ASYNCIO):
        return [python(), "-m", "vllmd", "--config", configured(VLLMD + settings, "yaml")]
    if name == "relay":
        return [python(), "-m", "tests.bench.proxy_servers", str(port), str(upstream)]
    if name == "nginx" and shutil.which("nginx"):
        return ["nginx", "-c", configured(NGINX, "conf"), "-e", str(folder / "error.log")]
    if name == "haproxy" and shutil.which("haproxy"):
        return ["haproxy", "-db", "-f", configured(HAPROXY, "cfg")]
    if name in (ROUTER, ROUTER_1) and installed.exists():
        return [str(installed), "--host", "127.0.0.1", "--port", str(port),
                "--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin",
                "--prometheus-port", str(free_port()), "--log-level", "error"]  # fmt: skip
    if name == "litellm" and installed.exists():
        return [str(installed), "--config", configured(LITELLM, "yaml"), "--host", "127.0.0.1", "--port", str(port),
                "--num_workers", "1"]  # fmt: skip
    return None


@contextlib.contextmanager
def running(name: str, upstream: int, folder: Path, chat: bytes, settings: str = "") -> Iterator[Runner | None]:
    """Start it, wait until it answers the request ``chat``, and stop it. None if it cannot be had."""
    port = free_port()
    argv = command(name, port, upstream, folder, settings)
    if argv is None:
        yield None
        return
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XDG_RUNTIME_DIR": str(folder),
        "XDG_STATE_HOME": str(folder),
        "VLLMD_ENGINE_RUN_DIR": str(folder),
        **({"VLLMD_SERVER_EVENT_LOOP": "asyncio"} if name == ASYNCIO else {}),
        **({"TOKIO_WORKER_THREADS": "1"} if name == ROUTER_1 else {}),
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
    try:
        answers = _answers(port, process, chat)
        if not answers:
            print(f"{name} does not answer:", (folder / f"{name}.log").read_text()[-500:], file=sys.stderr)
        yield Runner(name, port, process.pid) if answers else None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int, process: subprocess.Popen[bytes], chat: bytes, limit: float = 60.0) -> bool:
    end = time.monotonic() + limit
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    request = urllib.request.Request(url, chat, {"Content-Type": "application/json"})
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
        time.sleep(0.1)
    return False


async def serve_relay(port: int, upstream_port: int) -> None:
    """vllmd's proxy with a gate that is always open, until killed."""
    from vllmd.config.types import ServerConfig
    from vllmd.engines.base import Listen
    from vllmd.proxy.access import ANYBODY, Caller
    from vllmd.proxy.forward import Relay
    from vllmd.proxy.gate import Target
    from vllmd.proxy.limits import Limits
    from vllmd.proxy.models import add_model_routes
    from vllmd.proxy.routing import Router
    from vllmd.proxy.server import Server
    from vllmd.proxy.tokens import Tokens

    class OpenPermit:
        upstream = Listen(port=upstream_port)
        target = None

        def release(self, tokens: Tokens | None = None, size: int = 0, failed: str = "") -> None:
            """Nobody counts."""

        def on_cut(self, callback: Callable[[str], None]) -> None:
            """Never cut."""

    class OpenGate:
        def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
            """Every name is good."""
            return Target(name, name)

        def try_acquire(self, *_: object) -> OpenPermit:
            """At once."""
            return OpenPermit()

        async def acquire(self, *_: object, offer: str = "", route: str = "") -> OpenPermit:
            """At once."""
            return OpenPermit()

        def loading(self, model: str) -> str:
            """Never."""
            return ""

    limits, router = Limits(ServerConfig()), Router()
    add_model_routes(router, Relay(OpenGate(), limits))
    listener = socket.create_server(("127.0.0.1", port), backlog=8192)
    Server(router, limits, [listener]).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    from vllmd.daemon.event_loop import new_loop

    with asyncio.Runner(loop_factory=lambda: new_loop("auto")) as runner:
        runner.run(serve_relay(*map(int, sys.argv[1:])))
