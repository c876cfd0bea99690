"""``make bench-large``: what ten thousand models, ten thousand streams and a thousand waiting requests cost.

    python -m tests.bench.large [start] [gaps] [streams] [waiting] [--models 10000] [--engine remote] [--write]

- ``start``: CPU time of a daemon until it is healthy, until the first chat has been answered, and its memory then;
- ``gaps``: the longest time between two pieces of a stream that gets an event each 5 ms, while somebody asks for the
  metrics, the list of models and the status, and while the configuration is read anew. Beside it the same of a stream
  that comes straight from the upstream: what other work does to the machine disturbs both;
- ``streams``: memory for each stream that is open and says nothing;
- ``waiting``: CPU time of the scheduler for one more request and its leaving, with one and with a thousand waiting for
  one model and for a hundred; and of the whole daemon for one comment to a stream that waits.

``--write`` keeps the table in ``tests/bench/large.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tests.bench.proxy import chat, idle_streams, raw, resident, where
from tests.bench.proxy_servers import ROOT, free_port, python, running
from tests.bench.watched import Admin
from vllmd.core.events import RequestArrived, RequestGone
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device, Footprint, single
from vllmd.sizes import GiB

TABLE = Path(__file__).with_name("large.md")
PARTS = ("start", "gaps", "streams", "waiting")
HEAD = """server: {{listen: ["127.0.0.1:{port}"], queue_limit: 100000, max_connections: 20000, idle_exit: never{more}}}
log_level: error
devices: [{{memory: 80GiB}}]
models:
  m: {{engine: remote, options: {{url: "http://127.0.0.1:{upstream}"}}}}
"""
FOREVER = raw(chat("pace 1000000 5", stream=True))
QUIET = 1.0  # seconds of the streams before and after what is measured
LIMIT = 60.0  # seconds for whatever is waited for
ROUNDS = 3
FILES_LEFT = 200  # of the two fifths of the daemon's files that clients may take
WAITING, OF_MODELS, WAIT_SECONDS = 1000, 100, 10


@dataclass(frozen=True)
class Started:
    """A daemon: where it is, and the CPU seconds that it had taken when it was healthy and had answered a chat."""

    folder: Path
    port: int
    upstream: int
    process: subprocess.Popen[bytes]
    healthy: float
    answered: float

    @property
    def file(self) -> Path:
        """Its configuration."""
        return self.folder / "vllmd.yaml"

    def admin(self, method: str, path: str) -> int:
        """Ask it as an operator; returns the size of the answer. Raises SystemExit if it refuses."""
        with contextlib.closing(Admin(next(self.folder.rglob("admin.sock")))) as connection:
            connection.request(method, path)
            answer = connection.getresponse()
            body = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: {answer.status} {body.decode()}")
        return len(body)

    def get(self, path: str) -> int:
        """Ask it as a client; returns the size of the answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=LIMIT) as answer:
            return len(answer.read())


# -- a daemon with many models


def written(number: int, engine: str, port: int, upstream: int, length: Callable[[int], int], more: str = "") -> str:
    """A configuration of so many models; ``length`` is the longest context of each, by its number."""
    url = f'options: {{url: "http://127.0.0.1:{upstream}"}}' if engine == "remote" else "model: org/{}"
    lines = [
        f"  model-{n}: {{engine: {engine}, {url.replace('{}', f'model-{n}')}, max_model_len: {length(n)}}}\n"
        for n in range(number)
    ]
    return HEAD.format(port=port, upstream=upstream, more=more) + "".join(lines)


def cpu_of(pid: int) -> float:
    """Seconds of CPU time that all threads of the process have taken."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def memory_of(pid: int) -> tuple[float, float]:
    """Megabytes: resident, and in proportion (what others share is divided)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(size) * 1024 / 1e6 for name, size in re.findall(r"^(Rss|Pss): +(\d+) kB", text, re.MULTILINE)}
    return found["Rss"], found["Pss"]


@contextlib.contextmanager
def daemon(text: str, folder: Path, port: int, upstream: int, model: str = "m") -> Iterator[Started]:
    """A daemon with this configuration that has answered a first request for ``model``."""
    folder.mkdir(exist_ok=True)
    (folder / "vllmd.yaml").write_text(text)
    names = ("XDG_RUNTIME_DIR", "XDG_STATE_HOME", "XDG_CACHE_HOME", "VLLMD_ENGINE_RUN_DIR", "HF_HOME")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", **dict.fromkeys(names, str(folder))}
    argv = [python(), "-m", "vllmd", "--config", str(folder / "vllmd.yaml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=env, cwd=ROOT, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        healthy = _cpu_until(process, urllib.request.Request(f"{address}/health"), folder)
        body = chat(stream=False).replace(b'"m"', json.dumps(model).encode(), 1)
        first = urllib.request.Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        answered = _cpu_until(process, first, folder) if model else healthy
        yield Started(folder, port, upstream, process, healthy, answered)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT)
        process.kill()
        process.wait()


def _cpu_until(process: subprocess.Popen[bytes], request: urllib.request.Request, folder: Path) -> float:
    """The CPU seconds that the daemon had taken when it answered this request."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=LIMIT) as answer:
            if answer.status == 200:
                return cpu_of(process.pid)
        time.sleep(0.02)
    raise SystemExit(f"the daemon does not answer:\n{(folder / 'log').read_text()[-2000:]}")


def start(text: str, folder: Path, port: int, upstream: int) -> list[str]:
    """Three starts, the least CPU time of each figure, and the memory after the last one's first chat."""
    healthy, answered = [], []
    for n in range(ROUNDS):
        with daemon(text, folder / f"start-{n}", port, upstream) as started:
            healthy.append(started.healthy)
            answered.append(started.answered)
            time.sleep(QUIET)
            resident_size, share = memory_of(started.process.pid)
            after = cpu_of(started.process.pid) - started.answered
    return [
        f"CPU time until /health answers {min(healthy):.2f} s, until the first chat is answered {min(answered):.2f} s "
        f"(aim: at most 2), in the second after it {after:.2f} s",
        f"memory after it: {resident_size:.1f} MB resident, {share:.1f} MB in proportion (aim: at most 60)",
    ]


# -- the longest gap of a stream


class Stream(threading.Thread):
    """Reads a stream without end, and notes the longest time between two pieces."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.sendall(FOREVER)
        self._socket.recv(65536)
        self._longest = 0.0
        self.start()

    def run(self) -> None:
        """Until the socket is closed."""
        last = time.perf_counter()
        with contextlib.suppress(OSError):
            while self._socket.recv(65536):
                now = time.perf_counter()
                self._longest, last = max(self._longest, now - last), now

    def longest(self) -> float:
        """Milliseconds of the longest gap since the last question."""
        longest, self._longest = self._longest, 0.0
        return 1000 * longest

    def close(self) -> None:
        """Leave."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def gaps(started: Started, number: int, engine: str) -> list[str]:
    """A row for each thing that somebody may ask for."""
    lengths = iter(range(2048, 1 << 20))

    def reload(length: Callable[[int], int]) -> int:
        started.file.write_text(written(number, engine, started.port, started.upstream, length))
        return started.admin("POST", "/admin/reload")

    def one_changed() -> int:
        other = next(lengths)
        return reload(lambda n: other if n == 7 else 1024)

    def all_changed() -> int:
        other = next(lengths)
        return reload(lambda n: other)

    actions: dict[str, Callable[[], int]] = {
        "nothing": lambda: time.sleep(QUIET) or 0,  # type: ignore[func-returns-value]
        "GET /metrics": lambda: started.get("/metrics"),
        "GET /v1/models": lambda: started.get("/v1/models"),
        "GET /v1/models/model-7": lambda: started.get("/v1/models/model-7"),
        "GET /health": lambda: started.get("/health"),
        "GET /api/tags": lambda: started.get("/api/tags"),
        "GET /admin/status (vllmctl ps)": lambda: started.admin("GET", "/admin/status"),
        "GET /admin/config": lambda: started.admin("GET", "/admin/config"),
        "reload, nothing changed": lambda: started.admin("POST", "/admin/reload"),
        "reload, one model changed": one_changed,
        "reload, all models changed": all_changed,
    }
    rows = [
        "| while | longest gap, ms, of the rounds | straight from the upstream | CPU, s | answer, KB |",
        "|---" * 5 + "|",
    ]
    through, straight = Stream(started.port), Stream(started.upstream)
    for name, action in actions.items():
        ours, theirs, cpu = [], [], []
        for _ in range(ROUNDS):
            time.sleep(QUIET)
            through.longest(), straight.longest()
            before = cpu_of(started.process.pid)
            size = action()
            cpu.append(cpu_of(started.process.pid) - before)
            time.sleep(0.1)
            ours.append(through.longest())
            theirs.append(straight.longest())
        told = [", ".join(f"{each:.0f}" for each in sorted(of)) for of in (ours, theirs)]
        rows.append(f"| {name} | {told[0]} | {told[1]} | {min(cpu):.2f} | {size / 1000:,.0f} |")
        print(rows[-1], flush=True)
    through.close()
    straight.close()
    return rows


# -- many streams, many who wait


def streams(folder: Path, upstream: int) -> list[str]:
    """Memory of streams that say nothing, as many as this machine lets a process have."""
    number = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 2 // 5 - FILES_LEFT)
    settings = 'server: {{listen: ["127.0.0.1:{port}"], max_connections: 20000}}\n'
    from tests.bench import proxy_servers

    plain = proxy_servers.VLLMD
    proxy_servers.VLLMD = settings + plain.partition("\n")[2].partition("\n")[2]
    try:
        with running("vllmd", upstream, folder, chat(stream=False)) as runner:
            assert runner is not None
            each = idle_streams(runner, number) / 1024
            size = resident(runner.pid) / 1e6
    finally:
        proxy_servers.VLLMD = plain
    return [f"memory per idle stream, {number:,} of them: {each:.1f} KB (aim: at most 14); {size:.0f} MB after them"]


def core_costs() -> list[str]:
    """Microseconds of the scheduler for one arrival and one leaving, beside how many wait."""
    found = []
    for models, waiting in ((1, 1), (1, WAITING), (OF_MODELS, OF_MODELS), (OF_MODELS, WAITING)):
        # One model holds all of the device and is pinned, so nobody else can come up.
        holder = single("holder", Footprint(79 * GiB, 79 * GiB))
        specs = [
            single(f"w{n}", Footprint(40 * GiB, 40 * GiB), queue_limit=10_000, queue_timeout=None)
            for n in range(models)
        ]
        core = Scheduler([holder, *specs], [Device(0, "0", 80 * GiB)])
        from vllmd.core.events import EngineReady

        core.handle(RequestArrived("h", "holder"), 0.0)
        core.handle(EngineReady("holder"), 1.0)
        for n in range(waiting):
            core.handle(RequestArrived(f"r{n}", f"w{n % models}"), 1.0 + n / 1e6)
        times = []
        for _ in range(5):
            began = time.process_time()
            for n in range(1000):
                core.handle(RequestArrived(f"x{n}", f"w{n % models}"), 1.01)
                core.handle(RequestGone(f"x{n}"), 1.01)
            times.append((time.process_time() - began) / 2000)
        found.append(f"{waiting:,} for {models}: {1e6 * min(times):.1f} µs")
    return [f"CPU time of one event in the scheduler while so many wait: {', '.join(found)}"]


def comments(folder: Path, upstream: int) -> list[str]:
    """CPU time of the whole daemon for a comment to a stream that waits."""
    lines = []
    for models in (1, OF_MODELS):
        spent = {}
        for interval in ("1h", "1s"):
            port = free_port()
            text = HEAD.format(port=port, upstream=upstream, more=f", loading_comment_interval: {interval}")
            sims = "".join(
                f"  w{n}: {{engine: sim, gpu_memory: 60GiB, queue_limit: 9999, options: {{load_time: 3600}}}}\n"
                for n in range(models)
            )
            with (
                daemon(text + sims, folder / f"comments-{models}-{interval}", port, upstream) as started,
                contextlib.ExitStack() as stack,
            ):
                for n in range(WAITING):
                    body = chat(stream=True).replace(b'"m"', b'"w%d"' % (n % models), 1)
                    sock = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                    sock.sendall(raw(body))
                    if n % 100 == 99:
                        time.sleep(0.1)
                time.sleep(3)
                before = cpu_of(started.process.pid)
                time.sleep(WAIT_SECONDS)
                spent[interval] = (cpu_of(started.process.pid) - before) / WAIT_SECONDS
        each = 1e6 * (spent["1s"] - spent["1h"]) / WAITING
        lines.append(
            f"{WAITING:,} streams wait for {models}: CPU time of one comment {each:.0f} µs, of a second without "
            f"comments {1000 * spent['1h']:.1f} ms"
        )
    return lines


def main() -> None:
    """Measure, print, and keep the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--engine", default="remote", help="the models' kind of engine, remote or vllm")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.name}")
    options = parser.parse_args()
    parts: Sequence[str] = options.parts or PARTS
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    before, lines, table = os.getloadavg()[0], list[str](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        with running("upstream", 0, folder, chat(stream=False)) as upstream:
            if upstream is None:
                raise SystemExit("the upstream does not start")
            text = written(options.models, options.engine, port, upstream.port, lambda n: 1024)
            if "start" in parts:
                lines += start(text, folder, port, upstream.port)
            if "gaps" in parts:
                with daemon(text, folder / "gaps", port, upstream.port) as started:
                    table = gaps(started, options.models, options.engine)
            if "streams" in parts:
                lines += streams(folder, upstream.port)
            if "waiting" in parts:
                lines += [*core_costs(), *comments(folder, upstream.port)]
    load = f"load {before:.1f} before and {os.getloadavg()[0]:.1f} after"
    title = f"## {date.today()} · {options.models:,} models ({options.engine}), {where()}, {load}"
    text = "\n".join([title, "", *table, *([""] if table else []), *(f"- {line}" for line in lines)]) + "\n"
    print(text)
    if options.write:
        TABLE.write_text(text + "\n" + (TABLE.read_text() if TABLE.exists() else ""))


if __name__ == "__main__":
    main()
