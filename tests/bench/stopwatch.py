"""From nothing to the first token: a bare Debian 12 and 13, two commands, each as typed with what it printed.

`make stopwatch`; stopwatch.md has a run. The machines are booted containers with systemd and nothing that vllmd depends
on; they use this computer's network, for Debian's packages and for PyPI. The .deb is there, as if downloaded.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from tests.conftest import build_package
from tests.machine import container
from tests.machine.container import Machine

SUITES = ("bookworm", "trixie")
INSTALL = "apt install -y ./vllmd.deb"
RUN = 'vllmctl run smollm2 "What is the capital of France?"'
LIMIT = 900.0
TOLD = 12  # lines of a command's output that are shown


def main() -> int:
    """Print the table, in Markdown; the exit status says whether both gave an answer."""
    package = build_package("deb")
    fine = [stopwatch(suite, package) for suite in sys.argv[1:] or SUITES]
    return 0 if all(fine) else 1


def stopwatch(suite: str, package: Path) -> bool:
    """One machine's life; whether the model knew the answer."""
    lower = container.cache() / f"bare-{suite}"
    machine = Machine(lower=str(lower), network=True)
    try:
        machine.boot()
        machine.copy_in(package, "/root/vllmd.deb")
        for path in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):  # how this computer reaches the network
            machine.copy_in(Path(path), path)
        machine.run("apt-get -qq update", timeout=LIMIT)  # the lists of packages are on every Debian that is in use
        print(f"\n## {machine.out('. /etc/os-release; echo $PRETTY_NAME')}\n")
        total = sum(timed(machine, command) for command in (INSTALL, RUN))
        again = timed(machine, RUN)
        print(f"From nothing to the answer: {total:.1f} s. The same question again: {again:.1f} s.")
        answer = machine.run(["/bin/sh", "-c", RUN], check=False, timeout=LIMIT).stdout
        machine.stop()
        return "Paris" in answer
    finally:
        machine.remove()


def timed(machine: Machine, command: str) -> float:
    """Run it, print it with the end of what it said, and return the seconds it took."""
    began, worked = time.monotonic(), processor(machine)
    done = machine.run(f"cd /root && DEBIAN_FRONTEND=noninteractive {command} 2>&1", check=False, timeout=LIMIT)
    took, worked = time.monotonic() - began, processor(machine) - worked
    lines = [line.rstrip() for line in done.stdout.splitlines() if line.strip()]
    fetched = [line for line in lines if re.search(r"Need to get|downloading", line)]
    shown = lines[-TOLD:]
    print(f"```\n# {command}")
    print("\n".join([*[line for line in fetched if line not in shown], *shown]))
    print(f"```\nexit status {done.returncode}, **{took:.1f} s**, {worked:.1f} s of a processor's time\n", flush=True)
    return took


def processor(machine: Machine) -> float:
    """Seconds that processors have worked for the machine; what a busy computer takes longer is not in them."""
    found = re.search(r"usage_usec (\d+)", (machine.cgroup / "cpu.stat").read_text())
    assert found
    return int(found[1]) / 1e6


if __name__ == "__main__":
    sys.exit(main())
