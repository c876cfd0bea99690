"""Two models that do not fit together take turns under load; then the daemon is killed and its successor adopts.

One sleeps when the other needs the room, the other one cannot and is stopped. Meanwhile the device is read many times
a second: it must never be fuller than the ledger has it, and what an engine gives back must be free within two seconds.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.gpu.check.attribution import alive
from tests.gpu.check.bench import Bench, GiB, MiB, gib, wait_for
from tests.gpu.check.daemon import Site, site

SHARE = 0.6  # of the device, for each of the two
CLIENTS = 4  # per model
MODELS = ("sleeper", "stopper")
SPELLS = 6
RETURN_LIMIT = 2.0
SLACK = 512 * MiB  # between what the ledger has and what the driver counts, contexts that come up included
INTERVAL = 0.03


@dataclass
class Return:
    """An engine that gave memory back."""

    what: str  # sleep, or stop: it may have freed the memory just before its end
    pid: int
    at: float
    held: int
    before: int
    took: float | None = None


@dataclass
class Watcher:
    """Reads device and ledger all the time, in threads of its own."""

    bench: Bench
    site: Site
    highest: int = 0
    readings: int = 0
    over: int = 0  # by how much the device held more than the ledger had, at the worst
    returns: list[Return] = field(default_factory=list)
    failures: set[str] = field(default_factory=set)
    _ledger: int | None = None
    _most: int = 0  # bytes that the device held at most since the ledger was last read
    _held: dict[int, int] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def watching(self) -> Any:
        threads = [threading.Thread(target=each, daemon=True) for each in (self._device, self._books)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._end.set()
            for thread in threads:
                thread.join(timeout=30)

    def _device(self) -> None:
        while not self._end.is_set():
            with contextlib.suppress(RuntimeError):
                self._look()
            time.sleep(INTERVAL)

    def _look(self) -> None:
        sample, now = self.bench.sample(), time.monotonic()
        self.readings += 1
        self.highest = max(self.highest, sample.used)
        self._most = max(self._most, sample.used)
        for each in self.returns:
            if each.took is None and sample.used <= each.before - 0.9 * each.held:
                each.took = now - each.at
        for pid, size in self._held.items():
            left = sample.processes.get(pid, 0)
            if not alive(pid):
                self._ended(pid, now, size, sample.used if left else sample.used + size)
            elif left < size // 2:
                self.returns.append(Return("sleep", pid, now, size - left, sample.used + size - left))
        self._held = {pid: size for pid, size in sample.processes.items() if alive(pid)}

    def _ended(self, pid: int, now: float, size: int, before: int) -> None:
        for each in self.returns:
            if each.pid == pid and now - each.at < 5.0:
                each.what = "stop"
                return
        if size > GiB // 4:
            self.returns.append(Return("stop", pid, now, size, before))

    def _compare(self, ledger: int) -> None:
        """What the device held since the last look, against the ledger before and after: either may be a moment old."""
        most, self._most = self._most, 0
        if self._ledger is not None:
            self.over = max(self.over, most - max(ledger, self._ledger))
        self._ledger = ledger

    def _books(self) -> None:
        index = self.bench.device.index
        while not self._end.is_set():
            with contextlib.suppress(OSError, ValueError):
                status = self.site.status()
                device = next(each for each in status["devices"] if each["index"] == index)
                self._compare(device["promised"] + device["external"])
                self.failures |= {f"{line['name']}: {line['failure']}" for line in status["models"] if line["failure"]}
            time.sleep(0.2)


@dataclass
class Load:
    """Clients of both models. Those of one ask in one spell, those of the other in the next, and again.

    At the change of a spell the last answers of the one are still on their way when the other is asked for.
    """

    site: Site
    seconds: float
    began: float = field(default_factory=time.monotonic)
    outcomes: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        clients = [threading.Thread(target=self._client, args=(which, number))
                   for which in range(len(MODELS)) for number in range(CLIENTS)]  # fmt: skip
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def _client(self, which: int, number: int) -> None:
        pause = random.Random(number)
        while (began := time.monotonic()) < self.began + self.seconds:
            if int((began - self.began) / self.seconds * SPELLS) % len(MODELS) != which:
                time.sleep(0.1)
                continue
            status, text, finish = self.site.chat(MODELS[which], stream=number % 2 == 0, tokens=pause.randint(10, 60))
            good = status == 200 and finish in ("length", "stop")
            with self._lock:
                self.outcomes["good" if good else f"{status} {finish} {text[:120]}"] += 1
                self.longest = max(self.longest, time.monotonic() - began)
            time.sleep(pause.uniform(0.0, 0.5))


def run(bench: Bench) -> None:
    """Under load for as long as the bench says; then death and adoption."""
    size = int(bench.device.memory * SHARE) - 2 * GiB if bench.device.memory > 16 * GiB else bench.device.memory // 2
    options = {"cuda": [0], "memory": size, "memory_asleep": 0, "tokens_per_second": 20, "quiet": True}
    model = {"engine": "sim", "gpu_memory": SHARE, "options": options, "log_file": True,
             "env": {"PYTHONPATH": bench.environment()["PYTHONPATH"], **bench.torch}}  # fmt: skip
    models = dict(zip(MODELS, (model, {**model, "sleep_mode": False}), strict=True))
    with site(bench, "turns", {"models": models}) as here:
        _load(bench, here)
        if bench.left > 45:
            _adopted(bench, here)


def _load(bench: Bench, here: Site) -> None:
    watcher, load = Watcher(bench, here), Load(here, bench.load_seconds)
    began = time.monotonic()
    with watcher.watching():
        for name in (*MODELS, MODELS[0]):  # once around, at an operator's word: now the costs are known, not guessed
            here.admin(f"models/{name}/load", {})
            here.chat(name)
        load.began = time.monotonic()
        load.run()
        time.sleep(RETURN_LIMIT)
    add = bench.table.add
    bad = {outcome: count for outcome, count in load.outcomes.items() if outcome != "good"}
    add("answers under load", "all whole", f"{load.outcomes['good']} whole, {bad or 'none cut or refused'}", not bad)
    bench.table.figure("longest wait for an answer", f"{load.longest:.1f} s in {time.monotonic() - began:.0f} s")
    for what, least in (("sleep", 1), ("stop", 1)):
        returns = [each for each in watcher.returns if each.what == what]
        times = [each.took for each in returns if each.took is not None]
        held = len(returns) >= least and len(times) == len(returns) and max(times) <= RETURN_LIMIT
        seen = f"{len(returns)} times, {len(times)} seen back, at most {max(times, default=0):.2f} s"
        add(f"memory back after each {what}", f"< {RETURN_LIMIT:.0f} s", seen, held)
    log = here.engine_logs() + here.log("daemon1")
    oom = [line for line in log.splitlines() if "out of memory" in line.lower()]
    add("out of memory", "never", oom[0][:200] if oom else "never", not oom)
    add("failures of engines", "none", "; ".join(sorted(watcher.failures))[:300] or "none", not watcher.failures)
    add("highest use of the device", f"<= {gib(bench.device.memory)}", f"{gib(watcher.highest)} in "
        f"{watcher.readings} readings", watcher.highest <= bench.device.memory)  # fmt: skip
    add("the device held more than the ledger had, at the worst", f"<= {gib(SLACK)}", gib(max(0, watcher.over)),
        watcher.over <= SLACK)  # fmt: skip


def _adopted(bench: Bench, here: Site) -> None:
    """SIGKILL to the daemon; the next one goes on with the engines that are there."""
    here.chat("sleeper")
    before = {name: here.model(name) for name in MODELS}
    held = bench.sample().used
    here.kill()
    time.sleep(1.0)
    kept = all(alive(line["pid"]) for line in before.values() if line["pid"])
    bench.table.add("engines after SIGKILL of the daemon", "run on", "run on" if kept else "ended", kept)
    began = time.monotonic()
    here.start()
    took = time.monotonic() - began
    after = {name: here.model(name) for name in before}
    same = all(before[name]["pid"] == after[name]["pid"] for name in before)
    pids = {name: (before[name]["pid"], after[name]["pid"]) for name in before}
    bench.table.add("adopted by the next daemon", "the same processes", f"{pids} after {took:.1f} s", same)
    status, text, finish = here.chat("sleeper")
    bench.table.add("the adopted engine answers", "200", f"{status} {finish} {text[:40]!r}", status == 200)
    index = bench.device.index

    def agrees() -> bool:
        device = next(each for each in here.status()["devices"] if each["index"] == index)
        return bool(abs(device["promised"] + device["external"] - bench.sample().used) <= 2 * SLACK)

    known = wait_for(agrees, 15.0, 0.5)
    device = next(each for each in here.status()["devices"] if each["index"] == index)
    bench.table.add("its memory in the new ledger", gib(held), gib(device["promised"] + device["external"]), known)
