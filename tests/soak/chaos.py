"""Kills, stops and restarts from a seed, against the installed package under load; after each round all must be well.

usage: python -m tests.soak.chaos [SECONDS [SEED]]     (``make soak``: an hour)
"""

from __future__ import annotations

import collections
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.machine import container
from tests.machine.container import REPOSITORY, Machine, TimedOut

LOAD = Path(__file__).with_name("load.py")
MODELS = ("a", "b", "c", "d")
CONFIG = """
server: {idle_exit: 5s, drain_timeout: 10s}
idle: {sleep_after: 3s, stop_after: 8s}
devices: [{memory: 80GiB}]
defaults: {engine: sim, gpu_memory: 30GiB, stop_timeout: 5s, restart_backoff: 0.2s, max_restarts: 20,
           options: {load_time: 0.3s, tokens_per_second: 40, quiet: true}}
models: {a: {}, b: {}, c: {gpu_memory: 50GiB}, d: {options: {load_time: 0.1s, tokens_per_second: 40, quiet: true}}}
"""
ACTIONS: dict[str, str] = {
    "kill the daemon": "systemctl kill -s KILL --kill-who=main vllmd.service",
    "kill the launcher": "systemctl kill -s KILL --kill-who=main vllmd-launcher.service",
    "kill both": "systemctl kill -s KILL --kill-who=main vllmd.service vllmd-launcher.service",
    "kill an engine": "pids=$(pgrep -u vllmd-engine) && kill -9 $(echo $pids | tr ' ' '\\n' | shuf -n 1)",
    "stop": "systemctl stop vllmd.service",
    "restart": "systemctl restart vllmd.service",
    "reload": "systemctl reload vllmd.service",
    "restart the bus": "systemctl restart dbus.service",
    "re-execute systemd": "systemctl daemon-reexec",
    "restart journald": "systemctl restart systemd-journald.service",
    "stop the launcher for a moment": "p=$(systemctl show -P MainPID vllmd-launcher); [ $p != 0 ] && "
    "{ kill -STOP $p; sleep 0.7; kill -CONT $p; }",
}
CALM_LIMIT = 90.0  # seconds after a round within which all must be well
# What a client may see of all this: answers, refusals that say to come back, and connections that break with a process.
EXPECTED = {"200", "200 cut", "502", "503", "ConnectionResetError", "RemoteDisconnected", "IncompleteRead"}
EXPECTED |= {"BrokenPipeError", "ConnectionRefusedError", "CannotSendRequest", "ResponseNotReady"}


class Broken(AssertionError):
    """Something that was promised to survive did not."""


class Soak:
    """Rounds on one machine that has vllmd installed."""

    def __init__(self, machine: Machine, seed: int, say: Callable[[str], None] = print) -> None:
        self.machine, self.dice, self.seed, self.say = machine, random.Random(seed), seed, say
        self.tried: collections.Counter[str] = collections.Counter()
        self.ends: collections.Counter[str] = collections.Counter()
        machine.write("/etc/vllmd/vllmd.yaml", CONFIG)
        machine.write("/run/load.py", LOAD.read_text())

    def round(self, actions: int = 5, clients: int = 6) -> None:
        """Load, a few blows, calm; raises Broken."""
        machine = self.machine
        machine.run("rm -f /run/enough; systemctl reset-failed 'vllmd*'; systemctl start vllmd.socket", check=False)
        load = machine.popen(["/usr/bin/python3", "/run/load.py", str(self.dice.random())[2:8], str(clients), *MODELS])
        blows = []
        for _ in range(actions):
            time.sleep(self.dice.uniform(0.1, 1.5))
            blows.append(self.dice.choice(list(ACTIONS)))
            machine.run(ACTIONS[blows[-1]], check=False, timeout=120)
        self.tried.update(blows)
        machine.write("/run/enough", "")
        try:
            out, error = load.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            raise Broken(f"clients wait for ever after {blows}") from None
        ends = collections.Counter(json.loads(out)) if out else collections.Counter({error[-300:]: 1})
        self.ends += ends
        if unexpected := {end for end in ends if end not in EXPECTED and not end.startswith("{")}:
            raise Broken(f"{unexpected} after {blows}")
        self.calm(blows)

    def calm(self, blows: list[str]) -> None:
        """Every model answers, every process is in a scope and every scope has one; stopped, nothing is left."""
        machine = self.machine
        try:
            machine.run("systemctl reset-failed 'vllmd*'; systemctl start vllmd.socket", check=False)
            for model in MODELS:
                machine.wait_until(ASK.replace("MODEL", model), timeout=CALM_LIMIT)
            machine.wait_until(lambda: self._scopes() == self._processes(), timeout=CALM_LIMIT)
            machine.run("systemctl stop vllmd.service", timeout=120)
            machine.wait_until(lambda: not self._scopes() and not self._processes(), timeout=CALM_LIMIT)
        except (TimedOut, AssertionError) as error:
            state = machine.run("systemd-cgls --no-pager /vllmd.slice; pgrep -u vllmd-engine -a", check=False).stdout
            raise Broken(f"after {blows} (seed {self.seed}): {str(error)[:3000]}\n{state}") from None

    def _scopes(self) -> set[str]:
        """The scopes that systemd has, and groups of such that are there without one."""
        listed = self.machine.out("systemctl list-units --plain --no-legend 'vllmd-model-*.scope'").splitlines()
        groups = self.machine.run("ls /sys/fs/cgroup/vllmd.slice", check=False).stdout.split()
        return {line.split()[0] for line in listed} | {name for name in groups if name.endswith(".scope")}

    def _processes(self) -> set[str]:
        """The groups in which processes of the engines' user are."""
        found = self.machine.run("cat $(pgrep -u vllmd-engine | sed 's#.*#/proc/&/cgroup#') 2>/dev/null", check=False)
        return {line.rpartition("/")[2] for line in found.stdout.splitlines()}

    def table(self) -> str:
        """What was tried, and how the requests ended."""
        lines = [f"{count:6} {what}" for what, count in self.tried.most_common()]
        return "\n".join([*lines, "requests:", *(f"{count:6} {what}" for what, count in self.ends.most_common())])


ASK = (
    "test $(curl -s -m 30 -o /dev/null -w '%{http_code}' http://127.0.0.1:33258/v1/chat/completions "
    "-H 'Content-Type: application/json' "
    """-d '{"model": "MODEL", "messages": [{"role": "user", "content": "hi"}]}') = 200"""
)


def main() -> int:
    """Rounds until the time is over; 1 as soon as one is not survived."""
    seconds, seed = float((sys.argv[1:2] or ["3600"])[0]), int((sys.argv[2:3] or [str(time.time_ns() % 10**6)])[0])
    package = subprocess.run([REPOSITORY / "packaging/dev/build", "deb"], check=True, capture_output=True, text=True)
    with container.booted() as machine:
        container.install(machine, REPOSITORY / package.stdout.strip())
        soak, end, rounds = Soak(machine, seed), time.monotonic() + seconds, 0
        print(f"seed {seed}", flush=True)
        while time.monotonic() < end:
            try:
                soak.round()
            except Broken as error:
                print(f"round {rounds}: {error}\n{soak.table()}\n{machine.journal()[-8000:]}")
                return 1
            rounds += 1
            print(f"round {rounds}: survived", flush=True)
        print(f"{rounds} rounds, {sum(soak.tried.values())} blows, nothing lost\n{soak.table()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
