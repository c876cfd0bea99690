"""What noting requests and use costs: ``python -m tests.bench.records``.

- microseconds of one request's note, and of what the thread that writes does for it (arrivals, SQLite); the
  least of many rounds, for others only add to it; and what a function that does nothing costs at the same time, for the
  machine may be busy: 0.04 µs where it is not;
- memory of a full ring, with heads as large as any that is kept, and what gathers between two writes;
- milliseconds of questions to a store of 10 million requests: 90 days, 40 keys, 12 models, each used in half the hours.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
import timeit
import tracemalloc
from pathlib import Path
from typing import Any, cast

from vllmd.config.types import RecordsConfig
from vllmd.daemon.records import Records
from vllmd.proxy.access import Caller
from vllmd.proxy.account import Account
from vllmd.proxy.exchange import Exchange, Wire
from vllmd.proxy.http import Headers, Peer, Request
from vllmd.proxy.tokens import Tokens
from vllmd.records.ring import LONGEST_HEAD
from vllmd.records.store import Question, Store
from vllmd.records.sums import DAY, FIELDS, HOUR, REQUESTS, Sums

ROUNDS, EACH = 50, 2000
DAYS, KEYS, MODELS, REQUESTS_IN_ALL = 90, 40, 12, 10_000_000
NOON = 20_000 * DAY + 12 * HOUR
QUESTIONS = {
    "by key, 30 days": ("key",), "by model, 30 days": ("model",), "by day, 30 days": ("day",),
    "by key, model and day, 30 days": ("key", "model", "day"),
}  # fmt: skip


def exchange(number: int, head: int = 200) -> Exchange:
    """A request that has ended."""
    headers = Headers([], b"x" * head)
    request = Request("POST", "/v1/chat/completions", "/v1/chat/completions", "", headers, Peer("127.0.0.1", 4711),
                      id=f"{number:032x}", caller=Caller(f"key{number % 7}"), route="/v1/chat/completions")  # fmt: skip
    made = Exchange(request, cast(Wire, None), lambda data: None, keep_alive=True)
    made.model, made.status, made.first_byte, made.account = f"model{number % 5}", 200, 0.1, Account(stream=True)
    made.account.admit("model")
    made.account.tokens = Tokens(100, 20)
    return made


async def note() -> float:
    """Microseconds of one."""
    records = Records(RecordsConfig(), Path("/nonexistent/usage.db"))
    records._timer = cast(Any, True)  # nothing is written meanwhile
    ended = [exchange(number) for number in range(EACH)]

    def all_of_them() -> None:
        for each in ended:
            records.ended(each)

    return min(timeit.repeat(all_of_them, number=1, repeat=ROUNDS)) / EACH * 1e6


async def write(path: Path) -> float:
    """Microseconds of one."""
    records = Records(RecordsConfig(), path)
    records._timer = cast(Any, True)
    took = []
    for _ in range(ROUNDS // 5):
        for number in range(EACH):
            records.ended(exchange(number))
        records._add_up()
        began = time.thread_time()
        assert records._write(records._sums, records._arrivals) == ""
        took.append(time.thread_time() - began)
        records._sums = Sums()
        records._arrivals.clear()
    return min(took) / EACH * 1e6


async def memory() -> float:
    """MiB that are held once the ring is full."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    config = RecordsConfig()
    records = Records(config, Path("/nonexistent/usage.db"))
    records._timer = cast(Any, True)
    for number in range(config.requests + 500):
        records.ended(exchange(number, LONGEST_HEAD))
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held / (1 << 20)


def questions(path: Path) -> dict[str, float]:
    """Milliseconds of each question."""
    store, choose = Store(path), random.Random(1)
    each = REQUESTS_IN_ALL / (DAYS * 24 * KEYS * MODELS / 2)
    for day in range(DAYS):
        rows = {}
        for hour in range(24):
            for key in range(KEYS):
                for model in range(MODELS):
                    if choose.random() < 0.5:
                        values = [1000 * choose.random() for _ in FIELDS]
                        values[REQUESTS] = each
                        rows[NOON // HOUR + day * 24 + hour, f"key{key}", f"model{model}"] = values
        store.write(rows, [], 1e9, 1e9)
    until = NOON + DAYS * DAY
    asked = {name: Question(by, until - 30 * DAY, until) for name, by in QUESTIONS.items()}
    asked["by key, all of it"] = Question(("key",), 0, until)
    asked["by hour, 7 days"] = Question(("hour",), until - 7 * DAY, until)
    asked["by key and hour, 2 days"] = Question(("key", "hour"), until - 2 * DAY, until)
    found = {}
    for name, question in asked.items():
        times = []
        for _ in range(5):
            began = time.perf_counter()
            store.ask(question)
            times.append(time.perf_counter() - began)
        found[name] = min(times) * 1000
    return found


def main() -> None:
    """Measure and print."""
    idle = min(timeit.repeat("nothing()", "def nothing(): pass", number=10_000, repeat=ROUNDS)) / 10_000 * 1e6
    with tempfile.TemporaryDirectory() as folder:
        written = asyncio.run(write(Path(folder) / "usage.db"))
    print(f"one request: {asyncio.run(note()):.2f} µs, writing it {written:.2f} µs; a call of nothing {idle:.3f} µs")
    print(f"a full ring, largest heads: {asyncio.run(memory()):.1f} MiB")
    with tempfile.TemporaryDirectory() as folder:
        for name, took in questions(Path(folder) / "usage.db").items():
            print(f"{name}: {took:.0f} ms")
        print(f"the store: {(Path(folder) / 'usage.db').stat().st_size / (1 << 20):.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
