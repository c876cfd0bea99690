"""What one warm chat goes through in the daemon, and what it costs: ``python -m tests.bench.request_path``.

Counted in a daemon whose only model is a remote one (``proxy_upstream``), on a kept connection, in lock step:

- calls of the program's functions (``sys.setprofile``), how deep they stand on each other, and whose methods they are:
  how much a reader has to follow;
- CPU time of the daemon's process per JSON answer and per stream of 20 events, by the scheduler's account
  (``/proc/PID/schedstat``): the least of several rounds, for what others do to the machine only adds to it.

``--list`` prints the calls in their order, ``--rounds N`` and ``--requests N`` make the CPU figures steadier.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tests.bench.proxy import chat, cpu_time, raw
from tests.bench.proxy_servers import VLLMD, Runner, free_port, running

EVENTS = 20
JSON, STREAM = raw(chat(stream=False)), raw(chat(f"pace {EVENTS} 1", stream=True))
LIMIT = 60.0  # seconds for the daemon to answer its first request
LOOKS = 20  # requests of which the one with the fewest calls counts: chores of the daemon come between


@dataclass
class Calls:
    """What one request called."""

    functions: list[str] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)
    deepest: int = 0

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        """A profile function."""
        if event != "call" or "/vllmd/" not in frame.f_code.co_filename:
            return
        depth, outer = 0, frame.f_back
        while outer is not None:
            depth, outer = depth + ("/vllmd/" in outer.f_code.co_filename), outer.f_back
        if (owner := frame.f_locals.get("self")) is not None:
            self.classes.add(type(owner).__name__)
        self.deepest = max(self.deepest, depth)
        self.functions.append(f"{'  ' * depth}{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_qualname}")


def answer(sock: socket.socket, request: bytes) -> bytes:
    """Send the request and read its whole answer."""
    sock.sendall(request)
    data = b""
    while True:
        data += sock.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        if b"chunked" in head.lower():
            if data.endswith(b"\r\n0\r\n\r\n"):
                return data
        elif head and len(body) >= int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]):
            return data


def connected(port: int) -> socket.socket:
    """A client, once it has had an answer."""
    end = time.monotonic() + LIMIT
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", port), timeout=10)
            if answer(sock, JSON).startswith(b"HTTP/1.1 200"):
                return sock
        except (OSError, ValueError):
            pass
        if time.monotonic() > end:
            raise SystemExit("the daemon does not answer")
        time.sleep(0.05)


# -- calls: the daemon runs in the main thread of a process of its own, its client in another thread


def count(port: int, upstream: int) -> None:
    """Print the calls of one request as JSON."""
    from vllmd.daemon.main import main

    found: list[Calls] = []
    signal.signal(signal.SIGUSR1, lambda *_: sys.setprofile(found[-1].note))
    signal.signal(signal.SIGUSR2, lambda *_: sys.setprofile(None))
    thread = threading.Thread(target=_ask, args=(port, found), daemon=True)
    thread.start()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(VLLMD.format(port=port, upstream=upstream))
        file.flush()
        main(["--config", file.name])
    least = min(found, key=lambda calls: len(calls.functions))
    print(json.dumps({"functions": least.functions, "classes": sorted(least.classes), "deepest": least.deepest}))


def _ask(port: int, found: list[Calls]) -> None:
    main_thread = threading.main_thread().ident or 0
    with connected(port) as sock:
        for _ in range(LOOKS):
            answer(sock, JSON)
            time.sleep(0.02)  # what the last one leaves to be done is done
            found.append(Calls())
            signal.pthread_kill(main_thread, signal.SIGUSR1)
            time.sleep(0.02)
            answer(sock, JSON)
            time.sleep(0.02)
            signal.pthread_kill(main_thread, signal.SIGUSR2)
            time.sleep(0.02)
    signal.pthread_kill(main_thread, signal.SIGTERM)


def counted(upstream: int) -> dict[str, Any]:
    """The calls of one request, in a process of their own."""
    argv = [sys.executable, "-m", "tests.bench.request_path", "--count", str(free_port()), str(upstream)]
    out = subprocess.run(argv, capture_output=True, text=True, timeout=2 * LIMIT)
    if out.returncode:
        raise SystemExit(out.stderr)
    return dict(json.loads(out.stdout.splitlines()[-1]))


# -- CPU time


def cost(runner: Runner, request: bytes, rounds: int, requests: int) -> float:
    """Microseconds of the daemon's CPU time per request, in the best of the rounds."""

    def ask(sock: socket.socket) -> float:
        before = cpu_time(runner)
        for _ in range(requests):
            answer(sock, request)
        return (cpu_time(runner) - before) / requests

    with connected(runner.port) as sock:
        return min(_each(lambda: ask(sock), rounds + 1)[1:])


def _each(measure: Callable[[], float], times: int) -> list[float]:
    return [measure() for _ in range(times)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="the calls in their order")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    if options.count:
        count(*options.count)
        return
    with tempfile.TemporaryDirectory() as folder, running("upstream", 0, Path(folder), chat(stream=False)) as upstream:
        if upstream is None:
            raise SystemExit("the upstream does not start")
        calls = counted(upstream.port)
        if options.list:
            print("\n".join(calls["functions"]), "\n", " ".join(calls["classes"]))
        print(f"{len(calls['functions'])} calls, {calls['deepest']} deep, {len(calls['classes'])} classes")
        with running("vllmd", upstream.port, Path(folder), chat(stream=False)) as runner:
            if runner is None:
                raise SystemExit("the daemon does not start")
            for name, request, number in (("JSON", JSON, options.requests), ("stream", STREAM, options.requests // 5)):
                print(f"{name}: {cost(runner, request, options.rounds, number):.0f} µs of CPU")


if __name__ == "__main__":
    main()
