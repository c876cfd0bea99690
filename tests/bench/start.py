"""What waking costs: at rest, from the first connection, a scope more than a plain process, the lag after readiness.

Runs in the booted container from the installed .deb; every figure stands beside
one of the same run, because these machines are noisy. `make bench-start`.
"""

from __future__ import annotations

import json
import statistics

from tests.conftest import build_package
from tests.e2e.site import Site
from tests.machine import container
from tests.machine.container import Machine

ROUNDS = 15
MODELS = "".join(f"  model-{n}: {{engine: sim, options: {{load_time: 0.2}}}}\n" for n in range(10))
CONFIG = f"server: {{idle_exit: never}}\ndevices: []\nmodels:\n{MODELS}"

PROCESS = """
import subprocess, time
def timed():
    began = time.perf_counter()
    subprocess.run(["/usr/bin/python3", "-c", "import asyncio"], check=True)
    return time.perf_counter() - began
print([timed() for _ in range(3)])
"""

FIRST_BYTE = """
import socket, time
began = time.perf_counter()
s = socket.create_connection(("127.0.0.1", 33258), timeout=30)
s.sendall(b"GET /v1/models HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
first = s.recv(1)
print(time.perf_counter() - began)
assert first == b"H"
"""

SCOPES = """
import asyncio, json, os, signal, subprocess, time
from vllmd.launcher.client import LauncherClient, StartOrder
async def main():
    ended = asyncio.Queue()
    client = await LauncherClient.at("/run/vllmd/launcher.sock", ended.put_nowait).open()
    starts, stops, plain_starts, plain_stops = [], [], [], []
    for n in range(ROUNDS):
        began = time.perf_counter()
        running = await client.start(StartOrder(f"bench-{os.getpid()}-{n}", ("/bin/sleep", "1000")))
        starts.append(time.perf_counter() - began)
        began = time.perf_counter()
        await client.signal(running.instance, signal.SIGTERM)
        await ended.get()
        stops.append(time.perf_counter() - began)
        began = time.perf_counter()
        process = subprocess.Popen(["/bin/sleep", "1000"])
        plain_starts.append(time.perf_counter() - began)
        began = time.perf_counter()
        process.terminate(); process.wait()
        plain_stops.append(time.perf_counter() - began)
    print(json.dumps([starts, stops, plain_starts, plain_stops]))
asyncio.run(main())
"""

MOVES = """
import json, os, subprocess, time
group, moves = "/sys/fs/cgroup/bench", []
os.mkdir(group)
procs = os.open(f"{group}/cgroup.procs", os.O_WRONLY)
for _ in range(ROUNDS):
    process = subprocess.Popen(["/bin/sleep", "1000"])
    began = time.perf_counter()
    os.write(procs, b"%d" % process.pid)
    moves.append(time.perf_counter() - began)
    process.kill(); process.wait()
print(json.dumps(moves))
"""


def main() -> None:
    """Print the table."""
    with container.booted() as machine:
        container.install(machine, build_package("deb"))
        site = Site(machine)
        site.configure(CONFIG)
        site.to_rest()
        rows = [*at_rest(machine), *activation(site), *memory(site), *scopes(site), lag(site)]
    print(f"\nmedians of {ROUNDS} rounds\n")
    for name, value, aim in rows:
        print(f"  {name:<52} {value:>22}   {aim}")


def at_rest(machine: Machine) -> list[tuple[str, str, str]]:
    """Processes and bytes of ours before anybody connects."""
    units = ("vllmd.service", "vllmd-launcher.service", "vllmd.slice")
    pids = [pid for unit in units for pid in machine.cgroup_pids(unit)]
    return [
        (
            "at rest: processes, bytes resident",
            f"{len(pids)}, {sum(memory_of(machine, pid, 'Rss') for pid in pids)}",
            "0, 0",
        )
    ]


def activation(site: Site) -> list[tuple[str, str, str]]:
    """First connection to first byte of /v1/models, and the process that does nothing but import asyncio."""
    nothing, first_byte = [], []
    for _ in range(ROUNDS):
        site.to_rest()
        nothing += json.loads(site.machine.python(PROCESS).stdout)
        first_byte.append(float(site.machine.python(FIRST_BYTE).stdout))
    ours, theirs = statistics.median(first_byte), statistics.median(nothing)
    return [
        ("python3 -c 'import asyncio'", f"{1000 * theirs:.0f} ms", ""),
        (
            "connect to first byte of /v1/models, activated",
            f"{1000 * ours:.0f} ms = {ours / theirs:.1f} x",
            "at most 3 x",
        ),
    ]


def memory(site: Site) -> list[tuple[str, str, str]]:
    """The daemon with ten configured models, after serving a while."""
    for n in range(3):
        site.chat(f"model-{n}", "hi")
    pid = int(site.machine.show("vllmd.service", "MainPID"))
    sizes = [f"{memory_of(site.machine, pid, kind) / 1e6:.1f}" for kind in ("Rss", "Pss", "Private_Dirty")]
    return [("the daemon's memory: resident, in proportion, its own", f"{', '.join(sizes)} MB", "at most 30 MB")]


def scopes(site: Site) -> list[tuple[str, str, str]]:
    """Start and stop through the launcher, beside fork, exec, kill and wait, and beside what the kernel alone takes."""
    code = f"ROUNDS = {ROUNDS}\n{SCOPES}"
    starts, stops, plain_starts, plain_stops = (
        statistics.median(times) for times in json.loads(site.machine.python(code, user="vllmd").stdout)
    )
    moves = statistics.median(json.loads(site.machine.python(f"ROUNDS = {ROUNDS}\n{MOVES}").stdout))
    return [
        ("a process moved to a control group, by the kernel", f"{1000 * moves:.1f} ms", ""),
        ("scope started, over a plain fork and exec", beside(starts, plain_starts), "at most 20 ms"),
        ("scope stopped and empty, over a plain kill and wait", beside(stops, plain_stops), "at most 10 ms"),
    ]


def lag(site: Site) -> tuple[str, str, str]:
    """From the engine's own 'startup complete' to its answer to the request that waited, by the journal's clock."""
    lags = []
    for n in range(3, 10):
        site.chat(f"model-{n}", "hi")
        records = [
            json.loads(line)
            for line in site.machine.out(
                f"journalctl --sync; journalctl -o json -u {site.scope(f'model-{n}')}"
            ).splitlines()
        ]
        ready = next(int(r["__MONOTONIC_TIMESTAMP"]) for r in records if "startup complete" in str(r["MESSAGE"]))
        answered = next(int(r["__MONOTONIC_TIMESTAMP"]) for r in records if "POST /v1/chat" in str(r["MESSAGE"]))
        lags.append((answered - ready) / 1e6)
    return ("engine ready to the waiting request answered", f"{1000 * statistics.median(lags):.0f} ms", "at most 50 ms")


def beside(ours: float, plain: float) -> str:
    return f"{1000 * ours:.1f} - {1000 * plain:.1f} = {1000 * (ours - plain):.1f} ms"


def memory_of(machine: Machine, pid: int, kind: str) -> int:
    """Bytes: ``Rss`` with all shared pages, ``Pss`` with each divided by its users, ``Private_Dirty`` without any."""
    for line in machine.read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
