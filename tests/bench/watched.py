"""What it costs that somebody looks: ``python -m tests.bench.watched``.

Three whole daemons beside one another, which take turns:

- ``off`` keeps nothing of requests;
- ``on`` keeps the last ones, writes use and arrivals into its store, and a page is open: the streams of decisions and
  of requests that ended are read, and the status is asked for as often as the page does;
- ``bodies`` is the same while an administrator has all bodies recorded, which is for a time and for finding a fault.

CPU time per request is what proves something on a busy machine; the ratio of requests per second needs a quiet one.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import tempfile
import threading
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

from tests.bench.proxy import CASES, Case, Result, chat, resident, wrk
from tests.bench.proxy_servers import Runner, running

OFF, ON = "records: {{requests: 0, usage: false}}\n", "records: {{requests: 2000, usage: true}}\n"
ASKED = 5.0  # seconds between two looks of the page at the status
TABLE = Path(__file__).with_name("proxy.md")


class Admin(http.client.HTTPConnection):
    """A connection to the daemon's admin socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class Page:
    """What an open page asks of the daemon whose admin socket is in ``folder``."""

    def __init__(self, folder: Path, *, bodies: bool) -> None:
        self._bodies = bodies
        self._socket = next(folder.rglob("admin.sock"))
        self._over = threading.Event()
        self._streams: list[Admin] = []
        self.events = 0

    def __enter__(self) -> Page:
        if self._bodies:
            self.ask("POST", "/admin/recordings", {"model": "m", "seconds": 3600})
        for path in ("/admin/events", "/admin/events/requests"):
            threading.Thread(target=self._follow, args=(path,), daemon=True).start()
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for stream in self._streams:
            stream.close()

    def ask(self, method: str, path: str, body: object = None) -> None:
        """Raises SystemExit if it is refused."""
        with contextlib.closing(Admin(self._socket)) as connection:
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"Content-Type": "application/json"} if body is not None else {})  # fmt: skip
            answer = connection.getresponse()
            text = answer.read()
        if answer.status >= 300:
            raise SystemExit(f"{method} {path}: {answer.status} {text.decode()}")

    def _follow(self, path: str) -> None:
        connection = Admin(self._socket)
        self._streams.append(connection)
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            connection.request("GET", path)
            answer = connection.getresponse()
            while piece := answer.read1(65536):
                self.events += piece.count(b"data:")

    def _look(self) -> None:
        while not self._over.wait(ASKED):
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.ask("GET", "/admin/status")


def compare(runners: Mapping[str, Runner], rounds: int, seconds: int) -> Iterator[str]:
    """A line for each case."""
    for case in CASES:
        found: dict[str, list[Result]] = {name: [] for name in runners}
        for _ in range(rounds):
            for name, runner in runners.items():
                found[name].append(wrk(runner, case, seconds))
        yield told(case, found)


def told(case: Case, found: dict[str, list[Result]]) -> str:
    """One row of the table: the ratio of each round's rates, and the least CPU time per request of each."""
    cpu = {name: min(result.cpu for result in results) for name, results in found.items()}
    cells = [f"{case[0]} at {case[1]}", f"{cpu['off']:.1f} µs"]
    for name in ("on", "bodies"):
        ratio = statistics.median(one.rate / off.rate for off, one in zip(found["off"], found[name], strict=True))
        cells.append(f"{ratio:.3f} · {cpu[name] - cpu['off']:+.1f} µs")
    return f"| {' | '.join(cells)} |"


def told_memory(memory: Mapping[str, float]) -> str:
    """``off 40.0 MB, on 42.0 MB``."""
    return ", ".join(f"{name} {size:.1f} MB" for name, size in memory.items())


def main() -> None:
    """Measure, print, and keep the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=1, help="of a round")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.name}")
    options = parser.parse_args()
    first = chat(stream=False)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folders = {each: Path(name) / each for each in ("upstream", "off", "on", "bodies")}
        for folder in folders.values():
            folder.mkdir()
        upstream = stack.enter_context(running("upstream", 0, folders["upstream"], first))
        assert upstream is not None
        runners: dict[str, Runner] = {}
        for which, settings in (("off", OFF), ("on", ON), ("bodies", ON)):
            started = stack.enter_context(running("vllmd", upstream.port, folders[which], first, settings))
            assert started is not None
            runners[which] = started
        with Page(folders["on"], bodies=False) as page, Page(folders["bodies"], bodies=True):
            rows = list(compare(runners, options.rounds, options.seconds))
            memory = {which: resident(each.pid) / (1 << 20) for which, each in runners.items()}
    lines = [
        f"## {date.today()} · what it costs that somebody looks, load {os.getloadavg()[0]:.1f}",
        "",
        "Cells: requests per second beside `off` · CPU time per request more than `off`.",
        "",
        "| | off, CPU per request | records, use and an open page | and bodies recorded |",
        "|---|---|---|---|",
        *rows,
        "",
        f"- memory after it: {told_memory(memory)} (aim: at most 8 MB more)",
        f"- the page was told of {page.events:,} requests (aims: 3 % of requests/s, 5 µs per request)",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.write:
        TABLE.write_text(TABLE.read_text().rstrip("\n") + "\n\n" + text)


if __name__ == "__main__":
    main()
