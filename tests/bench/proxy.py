"""``make bench-proxy``: vllmd beside nginx, HAProxy, vllm-router and LiteLLM, same upstream, same run.

    python -m tests.bench.proxy [--rounds 9] [--seconds 1] [--requests 100000] [--write]

wrk (one thread) asks for a JSON answer and for a stream of 64 events, at 1 and at 64 connections. The machine is
hardly ever quiet, and the client, the proxy and the upstream share its cores, so:

- rounds are short and taken in turn, figures are medians, and an aim that is a ratio is the median of the ratios of
  neighbouring rounds: what disturbs, disturbs both;
- the least CPU time per request of any round is told beside the rate. When both cores are busy, the rate tells what
  all three processes take together;
- the first byte is awaited of streams whose events come a millisecond apart. In a burst of 64 events the upstream
  keeps a core for 200 microseconds, and on two cores the client often waits for that, not for the proxy (seen: 20
  or 250 microseconds for the very same);
- LiteLLM, two orders of magnitude slower, gets one long round per case, after all others, so that it takes nothing
  from them.

Of a stream the upstream takes most, with 65 system calls of 3 microseconds, so nobody can be much faster than it is
alone, which is told beside the ratio; and such a burst flatters whoever is slow, because it finds many events at each
read. So streams are measured in two more ways: with all 64 events in one write of the upstream, which then keeps
nobody waiting; and, as engines send them, with an event each 5 milliseconds, in CPU time per event.

``--write`` keeps the table in ``tests/bench/proxy.md``. ``proxy_servers`` says what runs, ``proxy_upstream`` answers.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import resource
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tests.bench.proxy_servers import ASYNCIO, ROOT, ROUTER, ROUTER_1, Runner, install_others, python, running
from tests.bench.proxy_upstream import EVENTS

TABLE = Path(__file__).with_name("proxy.md")
SLOW = "litellm"
FAST = ("vllmd", ASYNCIO, "relay", "nginx", "haproxy", ROUTER, ROUTER_1)
CELLS = "Cells: requests per second · median latency · least CPU time per request."
CASES = [("JSON", 1), ("JSON", 64), ("SSE", 1), ("SSE", 64)]
WORDS = "Say something nice about the weather."
AT_ONCE, PACED = "at once", f"pace {EVENTS} 5"
IDLE_STREAMS = 5000
LUA = """
wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer none"
wrk.body = '{body}'
"""


@dataclass(frozen=True)
class Result:
    """Requests per second, the median latency, and the server's CPU time per request, both in microseconds."""

    rate: float
    latency: float
    cpu: float


Case = tuple[str, int]
Results = dict[tuple[str, Case], list[Result]]

# -- the load


def chat(words: str = WORDS, *, stream: bool) -> bytes:
    """The body of a request that says ``words``."""
    more = ',"stream":true' if stream else ""
    return f'{{"model":"m","messages":[{{"role":"user","content":"{words}"}}],"max_tokens":64{more}}}'.encode()


def raw(body: bytes) -> bytes:
    """A whole request with that body."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return head.encode() + b"%d\r\n\r\n" % len(body) + body


def wrk(runner: Runner, case: Case, seconds: int, words: str = WORDS) -> Result:
    """One round."""
    kind, connections = case
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA.format(body=chat(words, stream=kind == "SSE").decode()))
        script.flush()
        argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency", "-s", script.name]
        before = cpu_time(runner)
        url = f"http://127.0.0.1:{runner.port}"
        out = subprocess.run([*argv, url], capture_output=True, text=True, check=True).stdout
    return _result(out, cpu_time(runner) - before, runner)


def _result(out: str, cpu: float, runner: Runner) -> Result:
    if "Non-2xx" in out:
        raise SystemExit(f"{runner.name} answered errors:\n{out}")
    rate = re.search(r"Requests/sec:\s*([\d.]+)", out)
    latency = re.search(r"50%\s+([\d.]+)(us|ms|s)", out)
    number = re.search(r"(\d+) requests in", out)
    if rate is None or latency is None or number is None:
        raise SystemExit(f"wrk said something unexpected:\n{out}")
    unit = {"us": 1, "ms": 1e3, "s": 1e6}[latency[2]]
    return Result(float(rate[1]), float(latency[1]) * unit, cpu / max(1, int(number[1])))


def cpu_time(runner: Runner) -> float:
    """Microseconds of CPU that the server, which leads a session of its own, has taken with all its threads so far."""
    nanoseconds = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[3]) == runner.pid:
                tasks = (stat.parent / "task").glob("*/schedstat")
                nanoseconds += sum(int(task.read_text().split()[0]) for task in tasks)
    return nanoseconds / 1e3


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(match[1]) * 1024 if match else 0


# -- what is measured


def measure(
    runners: Sequence[Runner], options: argparse.Namespace, cases: Sequence[Case] = CASES, words: str = WORDS
) -> Results:
    """Every case for every server, in turn."""
    found: Results = {}
    for case in cases:
        for _ in range(options.rounds):
            for runner in runners:
                found.setdefault((runner.name, case), []).append(wrk(runner, case, options.seconds, words))
    return found


def first_bytes(runners: Sequence[Runner], rounds: int, each: int = 50) -> dict[str, float]:
    """Median microseconds from a streaming request to the first byte of its answer, on kept connections."""
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for runner in runners:
            times.setdefault(runner.name, []).extend(_first_bytes(runner.port, each))
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def _first_bytes(port: int, times: int) -> Iterable[float]:
    request = raw(chat("pace 2 1", stream=True))
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(times):
            began = time.perf_counter()
            sock.sendall(request)
            data = sock.recv(65536)
            yield time.perf_counter() - began
            while not data.endswith(b"\r\n0\r\n\r\n"):
                data = data[-16:] + sock.recv(65536)


def paced(runners: Sequence[Runner], rounds: int, seconds: int) -> dict[str, float]:
    """Least microseconds of CPU per event, when 64 streams get one each 5 milliseconds."""
    rounds_of = [[wrk(runner, ("SSE", 64), seconds, PACED).cpu for runner in runners] for _ in range(rounds)]
    return {runner.name: min(cpu) / EVENTS for runner, cpu in zip(runners, zip(*rounds_of, strict=True), strict=True)}


def growth(runner: Runner, kind: str, requests: int) -> tuple[int, int]:
    """Bytes that the server grew by over so many requests, after a tenth of them to get warm; and how many.

    From round to round it goes up and down by megabytes, as buffers come and go. A leak raises the least: of the
    second half of the rounds over that of the first.
    """

    def ask(number: float) -> tuple[int, list[int]]:
        done, sizes = 0, []
        while done < number or len(sizes) < 2:
            done += int(wrk(runner, (kind, 64), 5).rate * 5)
            sizes.append(resident(runner.pid))
        return done, sizes

    ask(requests / 10)
    done, sizes = ask(requests)
    half = len(sizes) // 2
    return min(sizes[half:]) - min(sizes[:half]), done


def idle_streams(runner: Runner, number: int) -> float:
    """Bytes of the server's memory per stream that is open and says nothing."""
    request = raw(chat("idle", stream=True))
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


# -- the table


def table(names: Sequence[str], results: Results) -> str:
    """The results as Markdown: rate, median latency, CPU time per request."""
    lines = ["| | " + " | ".join(f"{kind}, {connections}" for kind, connections in CASES) + " |", "|---" * 5 + "|"]
    lines += [f"| {name} | " + " | ".join(_cell(results[name, case]) for case in CASES) + " |" for name in names]
    return "\n".join(lines)


def _cell(results: Sequence[Result]) -> str:
    rate, latency = (statistics.median(values) for values in zip(*((r.rate, r.latency) for r in results), strict=True))
    return f"{rate:,.0f}/s · {latency:,.0f} µs · {min(r.cpu for r in results):,.0f} µs"


def ratio(results: Results, case: Case, ours: str, theirs: str) -> float:
    """The median of the ratios of neighbouring rounds' rates."""
    pairs = zip(results[ours, case], results[theirs, case], strict=True)
    return statistics.median(a.rate / b.rate for a, b in pairs if b.rate)


def cpu_ratio(results: Results, case: Case, ours: str, theirs: str) -> float:
    """The ratio of the least CPU times per request of any round."""
    return min(r.cpu for r in results[ours, case]) / min(r.cpu for r in results[theirs, case])


def better(results: Results, case: Case, ours: str) -> float:
    """The ratio to the better of nginx and HAProxy; NaN without them."""
    ratios = [ratio(results, case, ours, name) for name in ("nginx", "haproxy") if (name, case) in results]
    return min(ratios, default=math.nan)


def aims(results: Results, ours: str) -> list[str]:
    """What the aims are about, for ``ours``: ``vllmd`` or ``relay``."""
    json, json64, sse64 = ("JSON", 1), ("JSON", 64), ("SSE", 64)
    pairs = zip(results[ours, json], results["upstream", json], strict=True)
    added = statistics.median(a.latency - b.latency for a, b in pairs)
    lines = [
        f"added median latency, JSON at 1: {added:.0f} µs (aim: at most 70)",
        f"SSE at 64 / the better of nginx and HAProxy: {better(results, sse64, ours):.2f} (aim: at least 1.2)",
    ]
    if (ROUTER, sse64) in results:
        most = ratio(results, sse64, "upstream", ROUTER)
        lines += [
            f"SSE at 64 / {ROUTER}: {ratio(results, sse64, ours, ROUTER):.2f} (aim: at least 3; "
            f"the upstream alone has {most:.2f})",
            f"JSON at 64 / {ROUTER}, which works on all cores: {ratio(results, json64, ours, ROUTER):.2f} "
            f"(aim: at least 0.8); / {ROUTER_1}: {ratio(results, json64, ours, ROUTER_1):.2f}; "
            f"least CPU time per request / {ROUTER}'s: {cpu_ratio(results, json64, ours, ROUTER):.2f}",
        ]
    return lines


def at_once(results: Results) -> str:
    """How fast streams are that come in one write."""
    case = ("SSE", 64)
    rates = {name: statistics.median(r.rate for r in rounds) for (name, _), rounds in results.items()}
    text = f"SSE at 64, all events in one write: {told(rates, '/s')}"
    for ours in ("vllmd", "relay"):
        text += f"; {ours} / the better of nginx and HAProxy {better(results, case, ours):.2f} (aim: at least 0.5)"
        if (ROUTER, case) in results:
            text += f", / {ROUTER} {ratio(results, case, ours, ROUTER):.2f}"
    return text


def told(values: dict[str, float], unit: str = " µs") -> str:
    """``vllmd 3 µs, nginx 2 µs``."""
    return ", ".join(f"{name} {value:,.0f}{unit}" for name, value in values.items())


def compare(runners: Sequence[Runner], options: argparse.Namespace) -> tuple[Results, list[str]]:
    """All but LiteLLM: the results of the table, and what is said below it."""
    results = measure(runners, options)
    lines = aims(results, "vllmd")
    first = first_bytes(runners, 2 * options.rounds)
    added = {name: value - first["upstream"] for name, value in first.items() if name != "upstream"}
    lines.append(f"added median time to the first byte of a stream: {told(added)} (aim: at most 80)")
    lines.append(at_once(measure(runners[1:], options, [("SSE", 64)], AT_ONCE)))
    per_event = paced(runners[1:], min(3, options.rounds), max(2, options.seconds))
    lines.append(f"CPU time per event of 64 streams with one each 5 ms: {told(per_event)} (aim: at most 1.3 x nginx)")
    lines += [f"the relay alone: {line}" for line in aims(results, "relay")]
    return results, lines


def endure(ours: Runner, requests: int) -> list[str]:
    """What many requests and many streams do to the memory."""
    lines = []
    for kind in ("JSON", "SSE"):
        grown, done = growth(ours, kind, requests)
        lines.append(f"growth over {done:,} requests, {kind} at 64: {grown / 1024:,.0f} KB (aim: none)")
    each = idle_streams(ours, IDLE_STREAMS) / 1024
    return [*lines, f"memory per idle SSE connection, {IDLE_STREAMS} of them: {each:.1f} KB (aim: at most 30)"]


def bench(options: argparse.Namespace, folder: Path) -> str:
    """Everything, as text."""
    warm_up = chat(stream=False)
    with running("upstream", 0, folder, warm_up) as upstream:
        if upstream is None:
            raise SystemExit("the upstream does not start")
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(running(name, upstream.port, folder, warm_up)) for name in FAST]
            runners = [upstream, *(runner for runner in started if runner is not None)]
            results, lines = compare(runners, options)
            lines += endure(runners[1], options.requests)
        names = [runner.name for runner in runners]
        with running(SLOW, upstream.port, folder, warm_up) as slow:
            if slow is not None:
                names.append(SLOW)
                results.update({(SLOW, case): [wrk(slow, case, 10 * options.seconds)] for case in CASES})
    missing = [name for name in (*FAST, SLOW) if name not in names]
    if missing:
        lines.append(f"not measured, because not installed: {', '.join(missing)}")
    return "\n".join([table(names, results), "", *(f"- {line}" for line in lines)])


def where() -> str:
    """What it was measured on."""
    code = "from vllmd.daemon.event_loop import name_of, new_loop; print(name_of(new_loop('auto')))"
    version, loop = (
        subprocess.run([python(), *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
        for words in (["-V"], ["-c", code])
    )
    return f"{os.cpu_count()} CPUs, {version}, {loop}"


def main() -> None:
    """Measure, print, and keep the table if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=int, default=1, help="of a round")
    parser.add_argument("--requests", type=int, default=100_000, help="for the growth; the aim speaks of a million")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {TABLE.name}")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    install_others()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = bench(options, Path(folder))
    load = f"load {before:.1f} before and {os.getloadavg()[0]:.1f} after"
    text = f"## {date.today()} · {where()}, {load}\n\n{CELLS}\n\n{found}\n"
    print(text)
    if options.write:
        TABLE.write_text(text + "\n" + (TABLE.read_text() if TABLE.exists() else ""))


if __name__ == "__main__":
    main()
