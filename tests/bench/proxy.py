"""``make bench-proxy``: the relay beside nginx, HAProxy, vllm-router and LiteLLM, same upstream, same run.

Each serves one upstream with one worker; wrk (one thread) asks for a JSON answer and for a stream of 64 events,
at 1 and at 64 connections. Rates are the median of several short rounds taken in turn, so that a busy machine
is busy for all alike; the least CPU time per request of any round is what a busy machine distorts least.
``--write`` keeps the table in ``tests/bench/proxy.md``.
vllm-router and LiteLLM are put into ``bench-venv`` in the development cache when missing; nginx, haproxy and wrk
are Debian's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("VLLMD_DEV_CACHE") or Path.home() / ".cache" / "vllmd-dev")
VENV = CACHE / "bench-venv"
TABLE = Path(__file__).with_name("proxy.md")
EVENTS = 64
IDLE_STREAMS = 5000
WORDS = "Say something nice about the weather."
BODY = '{"model":"m","messages":[{"role":"user","content":"%s"}],"max_tokens":64%s}'

# -- the upstream: an asyncio Protocol that does as little as it can

ANSWER = (
    b'{"id":"c1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"' + b"word " * 60 + b'"}}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":60,"total_tokens":69}}'
)
EVENT = (
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
)
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


class UpstreamProtocol(asyncio.Protocol):
    """Answers every POST: by JSON, by a stream whose events are written one after another, or by one without end."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A proxy has come."""
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        """Requests, one after another."""
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        length = LENGTH.search(self._data, 0, end) if end >= 0 else None
        size = end + 4 + (int(length[1]) if length else 0)
        if end < 0 or len(self._data) < size:
            return
        head, body, self._data = self._data[:end], self._data[end + 4 : size], self._data[size:]
        self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if b'"stream":' in body and b'"stream":false' not in body:
            self._transport.write(STREAM_HEAD)
            if b'"idle"' in body:
                self._transport.write(CHUNK)
            else:
                self._stream()
        elif head.startswith(b"POST"):
            self._transport.write(JSON_HEAD % len(ANSWER) + ANSWER)
        else:
            models = b'{"object":"list","data":[{"id":"m","object":"model"}]}'
            self._transport.write(JSON_HEAD % len(models) + models)

    def _stream(self) -> None:
        for _ in range(EVENTS):
            self._transport.write(CHUNK)
        self._transport.write(b"0\r\n\r\n")


def run_upstream(port: int) -> None:
    """On uvloop where there is one (LiteLLM brings it), so that the upstream is not what is measured."""
    with contextlib.suppress(ImportError):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.run(serve_upstream(port))


async def serve_upstream(port: int) -> None:
    """Until killed."""
    server = await asyncio.get_running_loop().create_server(UpstreamProtocol, "127.0.0.1", port, backlog=8192)
    await server.serve_forever()


async def serve_relay(port: int, upstream_port: int) -> None:
    """vllmd's proxy with a gate that is always open, until killed."""
    from vllmd.engines.base import Listen
    from vllmd.proxy.gate import Target
    from vllmd.proxy.limits import Limits
    from vllmd.proxy.models import add_model_routes
    from vllmd.proxy.relay import Relay
    from vllmd.proxy.routing import Router
    from vllmd.proxy.server import Server

    class OpenPassage:
        upstream = Listen(port=upstream_port)

        def done(self, tokens: int | None = None) -> None:
            """Nobody counts."""

        def on_cut(self, callback: Callable[[str], None]) -> None:
            """Never cut."""

    class OpenGate:
        def resolve(self, name: str) -> Target:
            """Every name is good."""
            return Target(name, name)

        async def enter(self, model: str, key: str, request_id: str) -> OpenPassage:
            """At once."""
            return OpenPassage()

        def loading(self, model: str) -> str:
            """Never."""
            return ""

    limits, router = Limits(), Router()
    add_model_routes(router, Relay(OpenGate(), limits))
    listener = socket.create_server(("127.0.0.1", port), backlog=8192)
    Server(router, limits, [listener]).start()
    await asyncio.Event().wait()


# -- the others


@dataclass(frozen=True)
class Runner:
    """A running server: its name, port and process."""

    name: str
    port: int
    pid: int


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


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


def command(name: str, port: int, upstream: int, folder: Path) -> list[str] | None:
    """The command line of the server called ``name``; None if it is not to be had."""
    me = [sys.executable, "-m", "tests.bench.proxy"]
    values = {"port": port, "upstream": upstream, "dir": folder}
    if name == "upstream":
        python = str(VENV / "bin" / "python") if (VENV / "bin" / "python").exists() else sys.executable
        return [python, *me[1:], "--serve", "upstream", str(port)]
    if name == "vllmd":
        return [*me, "--serve", "relay", str(port), str(upstream)]
    if name == "nginx" and shutil.which("nginx"):
        (folder / "nginx.conf").write_text(NGINX.format(**values))
        return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    if name == "haproxy" and shutil.which("haproxy"):
        (folder / "haproxy.cfg").write_text(HAPROXY.format(**values))
        return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
    if name == "vllm-router" and (VENV / "bin" / "vllm-router").exists():
        worker = f"http://127.0.0.1:{upstream}"
        return [str(VENV / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port), "--worker-urls", worker,
                "--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "error"]  # fmt: skip
    if name == "litellm" and (VENV / "bin" / "litellm").exists():
        (folder / "litellm.yaml").write_text(LITELLM.format(**values))
        return [str(VENV / "bin" / "litellm"), "--config", str(folder / "litellm.yaml"), "--host", "127.0.0.1",
                "--port", str(port), "--num_workers", "1"]  # fmt: skip
    return None


@contextlib.contextmanager
def running(name: str, upstream: int, folder: Path) -> Iterator[Runner | None]:
    """Start it, wait until it answers a chat request, and stop it."""
    port = free_port()
    argv = command(name, port, upstream, folder)
    if argv is None:
        yield None
        return
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LITELLM_LOG": "ERROR",
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, cwd=ROOT, start_new_session=True)
    try:
        answers = _answers(port, process)
        if not answers:
            print(f"{name} does not answer:", (folder / f"{name}.log").read_text()[-500:], file=sys.stderr)
        yield Runner(name, port, process.pid) if answers else None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int, process: subprocess.Popen[bytes], limit: float = 60.0) -> bool:
    end = time.monotonic() + limit
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        (BODY % (WORDS, "")).encode(),
        {"Content-Type": "application/json"},
    )
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
        time.sleep(0.1)
    return False


# -- the load

LUA = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer none"
wrk.body = '{body}'
"""
CASES = [("JSON", 1), ("JSON", 64), ("SSE", 1), ("SSE", 64)]


@dataclass(frozen=True)
class Result:
    """Requests per second, the median latency, and the server's CPU time per request, both in microseconds."""

    rate: float
    latency: float
    cpu: float


def cpu_time(runner: Runner) -> float:
    """Microseconds of CPU that the server, which leads a session of its own, has taken with all its threads so far."""
    nanoseconds = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == runner.pid:
                tasks = (stat.parent / "task").glob("*/schedstat")
                nanoseconds += sum(int(task.read_text().split()[0]) for task in tasks)
    return nanoseconds / 1e3


def wrk(runner: Runner, kind: str, connections: int, seconds: float, folder: Path) -> Result:
    """One round."""
    script = folder / f"{kind}.lua"
    script.write_text(LUA.format(body=BODY % (WORDS, ',"stream":true' if kind == "SSE" else "")))
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "10s", "--latency", "-s", str(script)]
    before = cpu_time(runner)
    out = subprocess.run([*argv, f"http://127.0.0.1:{runner.port}"], capture_output=True, text=True, check=True).stdout
    taken = cpu_time(runner) - before
    if "Non-2xx" in out:
        raise SystemExit(f"{runner.name} answered errors:\n{out}")
    rate = re.search(r"Requests/sec:\s*([\d.]+)", out)
    latency = re.search(r"50%\s+([\d.]+)(us|ms|s)", out)
    number = re.search(r"(\d+) requests in", out)
    if rate is None or latency is None or number is None:
        raise SystemExit(f"wrk said something unexpected:\n{out}")
    unit = {"us": 1, "ms": 1e3, "s": 1e6}[latency[2]]
    return Result(float(rate[1]), float(latency[1]) * unit, taken / max(1, int(number[1])))


def first_byte(port: int, rounds: int) -> float:
    """Median microseconds from a streaming request to the first byte of its answer, on one kept connection."""
    body = (BODY % (WORDS, ',"stream":true')).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    times = []
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(rounds):
            began = time.perf_counter()
            sock.sendall(request)
            data = sock.recv(65536)
            times.append(time.perf_counter() - began)
            while not data.endswith(b"\r\n0\r\n\r\n"):
                data = data[-16:] + sock.recv(65536)
    return statistics.median(times) * 1e6


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


def idle_streams(runner: Runner, number: int) -> float:
    """Bytes of the server's memory per stream that is open and says nothing."""
    body = (BODY % (WORDS, ',"stream":true,"idle":1')).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    before = resident(runner.pid)
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(number):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", runner.port)))
            sock.sendall(request)
            sockets.append(sock)
        for sock in sockets:
            if b"data:" not in sock.recv(65536):
                sock.recv(65536)
        return (resident(runner.pid) - before) / number


def growth(runner: Runner, requests: int, folder: Path) -> tuple[int, int]:
    """Bytes that the server grew by over so many requests, and how many there were."""
    before, done = resident(runner.pid), 0
    while done < requests:
        done += int(wrk(runner, "JSON", 64, 5, folder).rate * 5)
    return resident(runner.pid) - before, done


# -- the table


def measure(runners: list[Runner], rounds: int, seconds: float, folder: Path) -> dict[tuple[str, str, int], Result]:
    """Every case for every server, in turn."""
    found: dict[tuple[str, str, int], list[Result]] = {}
    for kind, connections in CASES:
        for _ in range(rounds):
            for runner in runners:
                result = wrk(runner, kind, connections, seconds, folder)
                found.setdefault((runner.name, kind, connections), []).append(result)
    return {
        key: Result(
            statistics.median(r.rate for r in results),
            statistics.median(r.latency for r in results),
            min(r.cpu for r in results),
        )
        for key, results in found.items()
    }


def table(names: list[str], results: dict[tuple[str, str, int], Result]) -> str:
    """The results as Markdown: rate, median latency, CPU time per request."""
    lines = ["| | " + " | ".join(f"{kind}, {connections}" for kind, connections in CASES) + " |", "|---" * 5 + "|"]
    for name in names:
        cells = [results[name, kind, connections] for kind, connections in CASES]
        lines.append(
            f"| {name} | "
            + " | ".join(f"{c.rate:,.0f}/s · {c.latency:,.0f} µs · {c.cpu:,.0f} µs" for c in cells)
            + " |"
        )
    return "\n".join(lines)


def ratios(names: list[str], results: dict[tuple[str, str, int], Result]) -> list[str]:
    """What the aims are about."""
    ours = {case: results["vllmd", *case] for case in CASES}
    added = ours["JSON", 1].latency - results["upstream", "JSON", 1].latency
    lines = [f"- added median latency, JSON at 1: {added:.0f} µs (aim: at most 200)"]
    best = max((results[n, "SSE", 64].rate for n in ("nginx", "haproxy") if n in names), default=0.0)
    if best:
        lines.append(
            f"- SSE at 64 / the better of nginx and HAProxy: {ours['SSE', 64].rate / best:.2f} (aim: at least 1)"
        )
    if "vllm-router" in names:
        sse, json = (results["vllm-router", kind, 64].rate for kind in ("SSE", "JSON"))
        lines.append(f"- SSE at 64 / vllm-router: {ours['SSE', 64].rate / sse:.2f} (aim: at least 3)")
        lines.append(f"- JSON at 64 / vllm-router: {ours['JSON', 64].rate / json:.2f} (aim: at least 0.5)")
    return lines


def bench(options: argparse.Namespace, folder: Path) -> str:
    """Everything, as text."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(running("upstream", 0, folder))
        if upstream is None:
            raise SystemExit("the upstream does not start")
        others = ["vllmd", "nginx", "haproxy", "vllm-router", "litellm"]
        started = [stack.enter_context(running(name, upstream.port, folder)) for name in others]
        runners = [upstream, *(runner for runner in started if runner is not None)]
        missing = sorted({*others} - {runner.name for runner in runners})
        names = [runner.name for runner in runners]
        results = measure(runners, options.rounds, options.seconds, folder)
        lines = [table(names, results), "", *ratios(names, results)]
        ours = next(runner for runner in runners if runner.name == "vllmd")
        first = {runner.name: first_byte(runner.port, 500) for runner in runners[:3]}
        added = ", ".join(f"{name} {first[name] - first['upstream']:.0f} µs" for name in [*first][1:])
        lines.append(f"- added median time to the first byte of a stream: {added} (aim: at most 150)")
        grown, done = growth(ours, options.requests, folder)
        lines.append(f"- growth over {done:,} requests: {grown / 1024:,.0f} KB (aim: none)")
        each = idle_streams(ours, IDLE_STREAMS)
        lines.append(
            f"- memory per idle SSE connection, {IDLE_STREAMS} of them: {each / 1024:.1f} KB (aim: at most 30)"
        )
        if missing:
            lines.append(f"- not measured, because not installed: {', '.join(missing)}")
    return "\n".join(lines)


def install_others() -> None:
    """vllm-router and LiteLLM from PyPI, once."""
    if not (VENV / "bin" / "litellm").exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(VENV / "bin" / "pip"), "-q", "install", "vllm-router", "litellm[proxy]"], check=False)


def main() -> None:
    """Measure, print, and keep the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--requests", type=int, default=100_000, help="for the growth; the aim speaks of a million")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.name}")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        kind, *ports = options.serve
        if kind == "upstream":
            run_upstream(int(ports[0]))
        else:
            asyncio.run(serve_relay(*map(int, ports)))
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    install_others()
    with tempfile.TemporaryDirectory() as folder:
        text = bench(options, Path(folder))
    machine = f"{os.cpu_count()} CPUs, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the end"
    text = f"## {date.today()} · {machine}\n\n{text}\n"
    print(text)
    if options.write:
        TABLE.write_text(text + "\n" + (TABLE.read_text() if TABLE.exists() else ""))


if __name__ == "__main__":
    main()
