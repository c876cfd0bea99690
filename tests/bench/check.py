"""Whether a request costs more than it did: ``make bench-check``, against the newest table of check.md.

Held against each other is only what hardly depends on who else is at work on the machine:

- the calls of the program's functions that one request takes (``request_path``), which are counted;
- the daemon's CPU time per JSON answer and per stream, in units of a yardstick: what this interpreter takes, in the
  same run, for a piece of work that never changes. A faster machine, or a crowded one, does both faster or slower.

On two cores with a load of 20 the count came out the same within two calls, answers between 3.7 and 5.2 yardsticks and
streams between 17 and 29: so it is the count that finds what is small, and the times find what is not Python's.

Machines differ in what the kernel's part costs beside the interpreter's: the same code took 1.1 yardsticks for an
answer on one and 3.2 on another, both at rest. So on another machine than the newest table's only the count says
anything; there a change is held against its parent: ``--update`` before it, and without after it.

``--update`` puts a new table before the others: in the commit that makes a request dearer or cheaper, which says why.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

TABLES = Path(__file__).with_name("check.md")
REPOSITORY = Path(__file__).resolve().parents[2]
CALLS, JSON, STREAM = "calls of one request", "JSON answer, in yardsticks", "stream of 20 events, in yardsticks"
# How much dearer each may be: a count hardly at all, for chores of the daemon come between; times by their noise.
ALLOWED = {CALLS: 1.02, JSON: 1.5, STREAM: 1.8}
_OUT = re.compile(r"(\d+) calls.*?JSON: (\d+) µs.*?stream: (\d+) µs", re.S)
_ROW = re.compile(r"^\| ([^|]+?) \| ([\d.]+) \|$", re.M)


def main() -> int:
    """Print what was, what is, and what is too much; the exit status is 1 if anything is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    now, was = measured(), {}
    if parser.parse_args().update:
        TABLES.write_text(with_table(TABLES.read_text(), now, time.strftime("%Y-%m-%d %H:%M")))
    else:
        was = newest(TABLES.read_text())
    for name, value in now.items():
        print(f"{name}: {value:g}" + (f" (it was {was[name]:g})" if name in was else ""))
    for told in (found := worse(was, now)):
        print(told, file=sys.stderr)
    return 1 if found else 0


def worse(was: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """What has grown beyond its noise."""
    return [
        f"{name}: {now[name]:g}, {now[name] / before:.2f} times what it was; {ALLOWED[name]:g} times is noise"
        for name, before in was.items()
        if name in now and now[name] > before * ALLOWED[name]
    ]


def newest(tables: str) -> dict[str, float]:
    """The figures of the first table. Raises SystemExit where there is none."""
    sections = re.split(r"^## ", tables, flags=re.M)
    found = {name: float(value) for name, value in _ROW.findall(sections[1] if len(sections) > 1 else "")}
    if not found:
        raise SystemExit(f"{TABLES} has no table; python -m tests.bench.check --update makes one")
    return found


def with_table(tables: str, figures: Mapping[str, float], when: str) -> str:
    """The tables with one more before the others."""
    head, mark, rest = tables.partition("## ")
    rows = "\n".join(f"| {name} | {value:g} |" for name, value in figures.items())
    return f"{head}## {when}\n\n| figure | value |\n|---|---|\n{rows}\n\n{mark}{rest}".rstrip("\n") + "\n"


def measured() -> dict[str, float]:
    """The figures now."""
    before = yardstick()
    argv = [sys.executable, "-m", "tests.bench.request_path", "--rounds", "5", "--requests", "300"]
    out = subprocess.run(argv, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    found = _OUT.search(out.stdout)
    if out.returncode or not found:
        raise SystemExit(out.stderr or out.stdout)
    unit = min(before, yardstick())
    calls, answer, stream = map(int, found.groups())
    return {CALLS: calls, JSON: round(answer / unit, 3), STREAM: round(stream / unit, 3)}


def yardstick() -> float:
    """Microseconds of CPU time for a piece of work that is a request's like: calls, dictionaries, bytes. The least."""
    return min(_work() for _ in range(40))


def _work() -> float:
    began = time.process_time_ns()
    for number in range(50):
        head = b"GET /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n" % number
        fields = dict(_field(line) for line in head.split(b"\r\n")[1:-2])
        assert int(fields["content-length"]) == 17
    return (time.process_time_ns() - began) / 1000


def _field(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("latin-1").partition(":")
    return name.lower(), value.strip()


if __name__ == "__main__":
    sys.exit(main())
