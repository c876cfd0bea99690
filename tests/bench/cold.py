"""How long a model that is not loaded takes to answer; `make bench-cold`, whose tables are in cold.md.

::

    python -m tests.bench.cold swap [--gib 3] [--sleep 6] [--rounds 3]
    python -m tests.bench.cold vllm [--rounds 2] [--compiled] [--cold] [--standby]

``swap``: two stand-ins on one declared device, of which one falls asleep in ``--sleep`` seconds and the other reads a
real file. That file's pages are dropped before each swap; with and without ``engines.read_ahead``, by turns.

``vllm``: a real vLLM on the CPU with a tiny model. `vllm serve` alone, until its /health is 200 and a first answer has
come, and the same through vllmd from the client's request on, by turns, so that the load of the machine falls on both.
``--standby``: also with a standby that waits; what its imports took while nobody waited is told beside it.
``--cold`` drops the pages of vLLM's environment and of the model before each start. Beside the seconds stands the CPU
time of all its processes, which hardly depends on who else is at work. That of vllmd's daemon and launcher is told:
until the first token, and until vLLM's program runs.

``make bench-cold COLD='"vllm --standby" "vllm --compiled --standby"' ROUNDS=2`` takes ten minutes on a machine at rest.

Pages are dropped file by file (POSIX_FADV_DONTNEED): that troubles nobody else on the machine, as drop_caches would.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.installed import Site, daemon
from tests.engines.test_real_standby import script
from tests.engines.test_standbys import pid_of
from tests.launcher.test_sessions import children
from tests.machine import container

LIMIT = 900.0  # seconds for a start
TICKS = os.sysconf("SC_CLK_TCK")
VLLM_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
VLLM_ARGS = ("--max-model-len", "512", "--max-num-seqs", "8")
STANDBY = "vllmd with a standby"
QUESTION = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@dataclass(frozen=True)
class Took:
    """Seconds until the first token, and seconds of CPU time of all processes of the engine.

    ``ours``: seconds of CPU time of vllmd's daemon and launcher; ``until``: until the engine's program ran, that is
    after ``program`` seconds; 0 where it was not seen.
    """

    wall: float
    cpu: float = 0.0
    ours: float = 0.0
    until: float = 0.0
    program: float = 0.0


def main() -> None:
    """Print a table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("swap", "vllm"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=3.0, help="size of the file that is read")
    parser.add_argument("--sleep", type=float, default=6.0, help="seconds in which the victim falls asleep")
    parser.add_argument("--compiled", action="store_true", help="without --enforce-eager")
    parser.add_argument("--cold", action="store_true", help="with none of the files in the page cache")
    parser.add_argument("--standby", action="store_true", help="with a standby engine, too")
    arguments = parser.parse_args()
    when = time.strftime("%Y-%m-%d %H:%M")
    given = [arguments.what, *(f"--{name}" for name in ("compiled", "cold", "standby") if getattr(arguments, name))]
    print(f"\n## {' '.join(given)}, {when}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} before\n")
    (swap if arguments.what == "swap" else vllm)(arguments)
    print(f"\nLoad {os.getloadavg()[0]:.1f} after.")


# -- a swap


def swap(arguments: argparse.Namespace) -> None:
    """With and without reading ahead, by turns."""
    with tempfile.TemporaryDirectory(dir=container.cache(), prefix="cold-") as folder:
        file = Path(folder) / "weights.safetensors"
        fill(file, arguments.gib)
        took: dict[bool, list[float]] = {True: [], False: []}
        with contextlib.ExitStack() as stack:
            sites = {ahead: stack.enter_context(two_models(Path(folder) / f"{ahead}", file, arguments.sleep, ahead))
                     for ahead in took}  # fmt: skip
            for turn in range(2 * arguments.rounds):
                ahead = bool(turn % 2)
                took[ahead].append(one_swap(sites[ahead], file))
        alone = read_time(file)
    with_it, without = statistics.median(took[True]), statistics.median(took[False])
    print(
        f"A victim that falls asleep in {arguments.sleep:g} s, a file of {arguments.gib:g} GiB that this disk reads in "
        f"{alone:.1f} s. Seconds from the request to the answer, median of {arguments.rounds} (all).\n"
    )
    print("| without reading ahead | with it | ratio |\n|---|---|---|")
    print(f"| {without:.1f} ({_all(took[False])}) | {with_it:.1f} ({_all(took[True])}) | {with_it / without:.2f} |")


@contextlib.contextmanager
def two_models(folder: Path, file: Path, sleep: float, ahead: bool) -> Iterator[Site]:
    """A daemon with two models of which one fits."""
    models: Mapping[str, Any] = {
        "victim": {"engine": "sim", "gpu_memory": "60GiB", "options": {"sleep_time": f"{sleep}s"}},
        "target": {"engine": "sim", "gpu_memory": "60GiB", "model": str(file), "options": {"read_weights": True}},
    }
    config = {"devices": [{"memory": "80GiB"}], "server": {"idle_exit": "never"}, "models": models}
    with daemon(folder, {**config, "engines": {"read_ahead": ahead, **_ports(ahead)}}) as site:
        site.http.timeout = LIMIT
        yield site


def _ports(ahead: bool) -> dict[str, int]:
    return {"port_start": 33400 + 20 * ahead, "port_end": 33419 + 20 * ahead}


def one_swap(site: Site, file: Path) -> float:
    """Seconds from a request for the target, while the victim serves, to its answer."""
    site.admin.timeout = LIMIT
    site.unload("target")
    site.answer("victim")
    drop([file])
    began = time.monotonic()
    site.answer("target")
    return time.monotonic() - began


# -- vLLM


def vllm(arguments: argparse.Namespace) -> None:
    """`vllm serve` alone, through vllmd, and through vllmd with a standby, by turns."""
    args = VLLM_ARGS if arguments.compiled else (*VLLM_ARGS, "--enforce-eager")
    names = ["vllm serve alone", "vllmd", *([STANDBY] if arguments.standby else [])]
    took: dict[str, list[Took]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="vllmd-cold-", dir="/tmp") as folder, contextlib.ExitStack() as stack:
        home = Path(folder) / "home"  # of both: what is compiled is found by both
        home.mkdir()
        sites = {name: stack.enter_context(served(Path(folder) / f"s{number}", home, args, number == 1))
                 for number, name in enumerate(names[1:])}  # fmt: skip
        if arguments.compiled:  # once uncounted, so that all of them find what was compiled
            alone(Path(folder), home, args, cold=False)
            if not arguments.standby:
                through(sites[names[1]], cold=False, standby=False)
        if arguments.standby:
            print(f"(a standby's imports beforehand: {waiting_standby(sites[STANDBY]):.1f} s of CPU time)\n")
        for _ in range(arguments.rounds):
            took[names[0]].append(alone(Path(folder), home, args, cold=arguments.cold))
            for name, site in sites.items():
                took[name].append(through(site, cold=arguments.cold, standby=name == STANDBY))
    what = "compiled, with a warm cache of it" if arguments.compiled else "--enforce-eager"
    cache = "none of its files in the page cache" if arguments.cold else "its files in the page cache"
    print(f"vLLM on the CPU, a model of 3.4 M parameters, {what}, {cache}; until the first token, median of "
          f"{arguments.rounds} (all).\n")  # fmt: skip
    table(took)


def table(took: Mapping[str, Sequence[Took]]) -> None:
    """Print it; the first row is what the others are compared with."""
    print("| | seconds | to alone | CPU seconds | to alone | vllmd's own CPU seconds | both to alone |")
    print("|---|---|---|---|---|---|---|")
    first = next(iter(took.values()))
    wall, cpu = (statistics.median(getattr(each, of) for each in first) for of in ("wall", "cpu"))
    for name, all_of_it in took.items():
        walls, cpus = [each.wall for each in all_of_it], [each.cpu for each in all_of_it]
        ours = statistics.median(each.ours for each in all_of_it)
        both = statistics.median(each.cpu + each.ours for each in all_of_it)
        print(f"| {name} | {statistics.median(walls):.1f} ({_all(walls)}) | {statistics.median(walls) / wall:.2f} | "
              f"{statistics.median(cpus):.1f} ({_all(cpus)}) | {statistics.median(cpus) / cpu:.2f} | {ours:.2f} | "
              f"{both / cpu:.3f} |")  # fmt: skip
    seen = [each for each in took["vllmd"] if each.program]
    if seen:
        until, program = (statistics.median(getattr(each, of) for each in seen) for of in ("until", "program"))
        print(f"\nFrom the request until vLLM's program runs, without a standby: {1000 * program:.0f} ms; meanwhile "
              f"vllmd computes for {1000 * until:.0f} ms, {until / cpu:.4f} of what vLLM's start does.")  # fmt: skip


def _environment(home: Path) -> dict[str, str]:
    return {**VLLM_ENV, "HOME": str(home), "PATH": os.environ["PATH"]}


def alone(folder: Path, home: Path, args: Sequence[str], *, cold: bool) -> Took:
    """`vllm serve` by itself."""
    program, model = script(container.cache() / "vllm/bin/python", folder), container.cache() / "tiny-model"
    address = folder / "alone.sock"
    address.unlink(missing_ok=True)
    if cold:
        drop(files_below(container.cache() / "vllm", model))
    argv = [str(program), "serve", str(model), "--uds", str(address), "--served-model-name", "m", *args]
    env = {**_environment(home), "VLLM_SERVER_DEV_MODE": "1", "VLLM_RPC_BASE_PATH": str(folder)}
    with (folder / "alone.log").open("ab") as log:
        began = time.monotonic()
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            while not asked(address, "GET", "/health"):
                assert process.poll() is None, (folder / "alone.log").read_text()[-3000:]
                assert time.monotonic() - began < LIMIT
                time.sleep(0.02)
            assert asked(address, "POST", "/v1/chat/completions", {**QUESTION, "model": "m"})
            return Took(time.monotonic() - began, cpu_of(process.pid))
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def served(folder: Path, home: Path, args: Sequence[str], standby: bool) -> Iterator[Site]:
    """A daemon with the one model."""
    folder.mkdir()
    program, model = script(container.cache() / "vllm/bin/python", folder), container.cache() / "tiny-model"
    entry = {"engine": "vllm", "command": [str(program)], "model": str(model), "extra_args": list(args),
             "env": _environment(home), "start_timeout": LIMIT}  # fmt: skip
    engines = {"port_start": 33440 + 20 * standby, "port_end": 33459 + 20 * standby, "standby": int(standby)}
    config = {"devices": [], "server": {"idle_exit": "never"}, "engines": engines}
    with daemon(folder, {**config, "models": {"m": entry}}) as site:
        site.http.timeout = site.admin.timeout = LIMIT
        yield site


def through(site: Site, *, cold: bool, standby: bool) -> Took:
    """The same from a client's request on; of a standby without what it did beforehand."""
    site.unload("m")
    before = waiting_standby(site) if standby else 0.0
    if cold:
        drop(files_below(container.cache() / "vllm", container.cache() / "tiny-model"))
    with Own(site) as own:
        began = time.monotonic()
        reply = site.http.post("/v1/chat/completions", json={**QUESTION, "model": "m"})
        assert reply.status_code == 200, reply.text
        wall = time.monotonic() - began
    pid = site.view("m")["pid"]
    assert not standby or f"pid {pid} " in made_of_standbys(site)
    return Took(wall, cpu_of(pid) - before, own.cpu, *((0.0, 0.0) if standby else (own.until, own.program)))


class Own:
    """What a daemon and its launcher compute meanwhile; and until the launcher has a child that is another program."""

    def __init__(self, site: Site) -> None:
        daemon = site.process.pid
        (launcher,) = [pid for pid in children(daemon) if b"vllmd.launcher" in command(pid)]
        self._pids, self._launcher = (daemon, launcher), launcher
        self.cpu = self.until = self.program = 0.0

    def __enter__(self) -> Own:
        self._known = set(children(self._launcher))
        self._cpu, self._began, self._over = self._spent(), time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.cpu = self._spent() - self._cpu

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            for pid in set(children(self._launcher)) - self._known:
                if b"vllmd.launcher" not in (said := command(pid)) and b"serve" in said:
                    self.until, self.program = self._spent() - self._cpu, time.monotonic() - self._began
                    return

    def _spent(self) -> float:
        """Seconds of CPU time, to the microsecond; of threads that have ended as well, where they are told."""
        total = 0.0
        for pid in self._pids:
            fine = 0.0
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):  # one has just ended
                    fine += int(path.read_text().split()[0]) / 1e9
            ticks = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / TICKS
            total += max(fine, ticks)
        return total


def command(pid: int) -> bytes:
    """A process's command line; nothing of one that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def waiting_standby(site: Site) -> float:
    """Wait until there is one, for which a first start has to tell what it is for; CPU seconds of its imports."""
    if not made_of_standbys(site) and not kept(site):
        assert site.http.post("/v1/chat/completions", json={**QUESTION, "model": "m"}).status_code == 200
        site.unload("m")
    deadline = time.monotonic() + LIMIT
    while not (found := [one["instance"] for one in kept(site) if one["state"] == "waiting"]):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return cpu_of(pid_of(site, found[0]))


def kept(site: Site) -> list[dict[str, Any]]:
    """The standbys that there are."""
    return list(site.admin.get("/admin/status").json().get("standbys") or [])


def made_of_standbys(site: Site) -> str:
    """The lines of the log that tell of engines that were made of one."""
    return "\n".join(line for line in site.log.read_text().splitlines() if "made of standby-" in line)


# -- the machine


def asked(address: Path, method: str, path: str, body: object = None) -> bool:
    """Whether a server on a Unix socket answers with 200."""
    connection = http.client.HTTPConnection("x", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    try:
        connection.sock.connect(str(address))
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def cpu_of(pid: int) -> float:
    """Seconds of CPU time of a process and its descendants, those that have ended and were waited for included."""
    children: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for each in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = each.read_text().rpartition(")")[2].split()
            children.setdefault(int(words[1]), []).append(int(each.parent.name))
            times[int(each.parent.name)] = sum(map(int, words[11:15])) / TICKS
    todo, total = [pid], 0.0
    while todo:
        one = todo.pop()
        total += times.get(one, 0.0)
        todo += children.get(one, [])
    return total


def fill(path: Path, gib: float) -> None:
    """Write a file that no disk can compress, and have it on the disk."""
    piece = os.urandom(64 << 20)
    with path.open("wb") as file:
        for number in range(round(gib * 16)):
            file.write(number.to_bytes(8, "big") + piece[8:])
        os.fsync(file.fileno())


def files_below(*paths: Path) -> list[Path]:
    """Every plain file."""
    return [file for path in paths for file in path.rglob("*") if file.is_file() and not file.is_symlink()]


def drop(paths: Sequence[Path]) -> None:
    """Drop their pages from the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_time(path: Path) -> float:
    """Seconds that the disk takes for a file."""
    drop([path])
    began = time.monotonic()
    with path.open("rb", buffering=0) as file:
        while file.read(8 << 20):
            pass
    return time.monotonic() - began


def _all(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


if __name__ == "__main__":
    main()
