"""What one warm chat goes through in the daemon, and what it costs: ``python -m tests.bench.request_path``.

Counted in a daemon whose only model is a remote one (``proxy_upstream``), on a kept connection, in lock step:

- calls of the program's functions (``sys.setprofile``), how deep they stand on each other, and whose methods they are:
  how much a reader has to follow;
- CPU time of the daemon's process per JSON answer and per stream of 20 events, by the scheduler's account
  (``/proc/PID/schedstat``): the least of several rounds, for what others do to the machine only adds to it.

``--list`` prints the calls in their order, ``--rounds N`` and ``--requests N`` make the CPU figures steadier.

``--flame FILE`` draws where the interpreter's instructions of one request go, asyncio's included: a flame graph whose
widths are counted (``sys.settrace``), so that it is the same on every machine. ``flame-before.svg``
is that of a24c8834, ``flame-after.svg`` that of b169cd96 (both of 2026-11-29).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, cast
from xml.sax.saxutils import escape

from tests.bench.proxy import chat, cpu_time, raw
from tests.bench.proxy_servers import VLLMD, Runner, free_port, running

EVENTS = 20
JSON, STREAM = raw(chat(stream=False)), raw(chat(f"pace {EVENTS} 1", stream=True))
LIMIT = 60.0  # seconds for the daemon to answer its first request
WIDTH = 1200  # pixels of a flame graph
OURS, THEIRS = "#e8a33d", "#8fb7d9"  # colours in it: of the program's functions, and of asyncio's
ASYNCIO = ("base_events.", "events.", "selector_events.", "selectors.", "unix_events.", "_weakrefset.", "base_futures.")
SIGNALS = "selector_events.BaseSelectorEventLoop._read_from_self"  # what begins and ends the count
PAUSE = 0.1  # seconds in which what was asked for is done
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


@dataclass
class Instructions:
    """The interpreter's instructions for one request, by the functions that stand on each other."""

    stacks: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def begin(self) -> None:
        """Count from now on, also in the functions that are being carried out."""
        sys.settrace(self._called)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            self._called(frame, "call", None)
            frame.f_trace = self._carried_out
            frame = frame.f_back

    def end(self) -> None:
        """Count no more."""
        sys.settrace(None)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frame.f_trace = None
            frame = frame.f_back

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._carried_out

    def _carried_out(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            stack, each = list[str](), cast("FrameType | None", frame)
            while each is not None and each.f_code.co_name != "run_forever":
                stack.append(_name(each.f_code))
                each = each.f_back
            if (
                each is not None and "selector_events.BaseSelectorEventLoop._read_from_self" not in stack
            ):  # the signal's
                self.stacks[tuple(reversed(stack))] += 1
        return self._carried_out


@cache
def _name(code: CodeType) -> str:
    return f"{Path(code.co_filename).stem}.{code.co_qualname}"


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


def count(port: int, upstream: int, flame: bool) -> None:
    """Print the calls of one request, or with ``flame`` its instructions, as JSON.

    On asyncio's own loop, whose functions are counted as well; uvloop's are not Python.
    """
    os.environ["VLLMD_SERVER_EVENT_LOOP"] = "asyncio"
    from vllmd.daemon.main import main

    found: list[Calls] = []
    drawn: list[Instructions] = []

    def begin(*_: object) -> None:
        if flame:
            drawn[-1].begin()
        else:
            sys.setprofile(found[-1].note)

    def end(*_: object) -> None:
        if flame:
            drawn[-1].end()
        else:
            sys.setprofile(None)

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    fresh = (lambda: drawn.append(Instructions())) if flame else (lambda: found.append(Calls()))
    thread = threading.Thread(target=_ask, args=(port, fresh), daemon=True)
    thread.start()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(VLLMD.format(port=port, upstream=upstream))
        file.flush()
        main(["--config", file.name])
    if flame:
        # The median: some were cut short by a signal that came too soon, others have a chore of the daemon's in them.
        counted = sorted((each.stacks for each in drawn if each.stacks), key=lambda stacks: stacks.total())
        print(json.dumps([[*stack, number] for stack, number in counted[len(counted) // 2].items()]))
        return
    least = min(found, key=lambda calls: len(calls.functions))
    print(json.dumps({"functions": least.functions, "classes": sorted(least.classes), "deepest": least.deepest}))


def _ask(port: int, fresh: Callable[[], None]) -> None:
    main_thread = threading.main_thread().ident or 0
    with connected(port) as sock:
        for _ in range(LOOKS):
            answer(sock, JSON)
            time.sleep(PAUSE)  # what the last one leaves to be done is done
            fresh()
            signal.pthread_kill(main_thread, signal.SIGUSR1)
            time.sleep(PAUSE)
            answer(sock, JSON)
            time.sleep(PAUSE)
            signal.pthread_kill(main_thread, signal.SIGUSR2)
            time.sleep(PAUSE)
    signal.pthread_kill(main_thread, signal.SIGTERM)


def counted(upstream: int, *more: str) -> Any:
    """What ``count`` prints, in a process of its own."""
    argv = [sys.executable, "-m", "tests.bench.request_path", "--count", str(free_port()), str(upstream), *more]
    out = subprocess.run(argv, capture_output=True, text=True, timeout=2 * LIMIT)
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout.splitlines()[-1])


# -- the flame graph


def flame_graph(stacks: Sequence[Sequence[Any]]) -> str:
    """An SVG of stacks, each with the number of its instructions as its last element."""
    total = sum(stack[-1] for stack in stacks)
    rows: list[str] = []
    deepest = 0

    def draw(group: Sequence[Sequence[Any]], depth: int, at: float) -> None:
        nonlocal deepest
        deepest = max(deepest, depth)
        inner: dict[str, list[Sequence[Any]]] = {}
        for stack in group:
            if len(stack) > depth + 1:
                inner.setdefault(stack[depth], []).append(stack)
        for name, those in inner.items():
            number = sum(stack[-1] for stack in those)
            width = WIDTH * number / total
            if width >= 1:
                colour = OURS if "/" not in name and not name.startswith(ASYNCIO) else THEIRS
                text = f'<text x="{at + 2:.1f}" y="{depth * 16 + 12}">{escape(name[: int(width / 6)])}</text>'
                rows.append(
                    f"<g><title>{escape(name)}: {number} instructions, {100 * number / total:.1f} %</title>"
                    f'<rect x="{at:.1f}" y="{depth * 16}" width="{width - 0.5:.1f}" height="15" fill="{colour}"/>'
                    f"{text if width > 30 else ''}</g>"
                )
                draw(those, depth + 1, at)
            at += width

    draw(stacks, 0, 0.0)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{(deepest + 2) * 16}" '
    foot = f'<text x="2" y="{(deepest + 1) * 16 + 12}">{total} instructions of one warm JSON request</text>'
    return "\n".join([f'{head}font-family="monospace" font-size="10">', *rows, foot, "</svg>", ""])


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
    parser.add_argument("--instructions", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--flame", type=Path, help="draw a flame graph into this file, and do nothing else")
    parser.add_argument("--list", action="store_true", help="the calls in their order")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    if options.count:
        count(*options.count, options.instructions)
        return
    with tempfile.TemporaryDirectory() as folder, running("upstream", 0, Path(folder), chat(stream=False)) as upstream:
        if upstream is None:
            raise SystemExit("the upstream does not start")
        if options.flame:
            options.flame.write_text(flame_graph(counted(upstream.port, "--instructions")))
            return
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
