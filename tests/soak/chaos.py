"""Kills, stops, hangs and full disks from a seed, against the installed package under load; after each round all must
be well.

usage: python -m tests.soak.chaos [SECONDS [SEED]]     (``make soak``: an hour)

A round that loses something is told with its journal, and the rest of the time goes on with a new machine.
"""

from __future__ import annotations

import collections
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.machine import container
from tests.machine.container import REPOSITORY, Machine, TimedOut
from tests.soak.blows import ALL, DISKS, FAILURES

FOLDER = Path(__file__).parent
MODELS = ("a", "b", "c", "d")
DEVICE = "/run/device0"  # in which the stand-ins note what they hold
CONFIG = f"""
server: {{idle_exit: 5s, drain_timeout: 10s}}
idle: {{sleep_after: 3s, stop_after: 8s}}
devices: [{{memory: 80GiB, file: {DEVICE}}}]
defaults: {{engine: sim, gpu_memory: 30GiB, start_timeout: 5s, stop_timeout: 5s, restart_backoff: 0.2s,
           max_restarts: 20, options: {{load_time: 0.3s, tokens_per_second: 40, quiet: true, fail_file: {FAILURES}}}}}
models: {{a: {{}}, b: {{}}, c: {{gpu_memory: 50GiB}}, d: {{options: {{load_time: 0.1s}}}}}}
"""
KILLS = (1, 1, 1, 2, 5, 10, 20)
CALM_LIMIT = 120.0  # seconds after a round within which all must be well
# What a client may see of all this: answers, refusals that say to come back, and connections that break with a process.
EXPECTED = {"200", "200 cut", "502", "503", "ConnectionResetError", "RemoteDisconnected", "IncompleteRead", "vanished"}
EXPECTED |= {"BrokenPipeError", "CannotSendRequest", "ResponseNotReady"}
# The sockets are systemd's: nobody is refused a connection but while they are restarted themselves.
REFUSED, CLOSING = "ConnectionRefusedError", "restart the sockets"
# What the two may hold when nobody is connected and four engines are loaded; a leak of one per request is hundreds.
DESCRIPTORS, THREADS, MEMORY = 80, 40, 200 << 20


class Broken(AssertionError):
    """Something that was promised to survive did not."""


class Soak:
    """Rounds on one machine that has vllmd installed."""

    def __init__(
        self, machine: Machine, seed: int, blows: Mapping[str, str] = ALL, kills: Sequence[int] = KILLS
    ) -> None:
        """``kills``: how often one blow may kill, for each of these alike."""
        self.machine, self.dice, self.seed, self.blows = machine, random.Random(seed), seed, blows
        self.rounds, self.kills, self._times = 0, 0, kills
        self.tried: collections.Counter[str] = collections.Counter()
        self.lost: list[Broken] = []
        self.ends: collections.Counter[str] = collections.Counter()
        self.most: collections.Counter[str] = collections.Counter()  # what daemon and launcher held at a calm moment
        self.prepare(machine)

    def prepare(self, machine: Machine) -> None:
        """Go on with this one: small disks, one device, and every engine's ways learnt, how long a sleep takes too."""
        self.machine = machine
        machine.run("systemctl stop vllmd.service vllmd-launcher.service", check=False)
        for disk in DISKS:
            mode = machine.out(f"mkdir -p {disk} && stat -c 'mode=%a,uid=%u,gid=%g' {disk}")
            machine.run(f"mount -t tmpfs -o size=4m,nr_inodes=400,{mode} tmpfs {disk}")
        machine.run(f"chown vllmd:vllmd {DISKS[0]} {DISKS[1]}")
        machine.write("/etc/vllmd/vllmd.yaml", CONFIG)
        machine.write(FAILURES, "")
        for name in ("load.py", "look.py"):
            machine.write(f"/run/{name}", (FOLDER / name).read_text())
        machine.python(f"from vllmd.simengine.device import make_device; make_device({DEVICE!r}, 80 << 30)")
        machine.run("systemctl reset-failed 'vllmd*'; systemctl start vllmd.socket", check=False)
        for model in MODELS:
            for level in (1, 2):
                machine.wait_until(ASK.replace("MODEL", model), timeout=CALM_LIMIT)
                machine.run(f"vllmctl sleep {model} --level {level}", timeout=90)
        machine.run("systemctl stop vllmd.service")

    def round(self, actions: int = 5, clients: int = 6) -> None:
        """Load, a few blows, calm; raises Broken, which is also kept in ``lost``."""
        self.rounds += 1
        blows: list[str] = []
        try:
            self._round(blows, actions, clients)
        except Broken as broken:
            self.lost.append(broken)
            raise
        finally:
            self.tried.update(blows)

    def _round(self, blows: list[str], actions: int, clients: int) -> None:
        machine = self.machine
        machine.run("rm -f /run/enough; systemctl reset-failed 'vllmd*'; systemctl start vllmd.socket", check=False)
        began = self.look()
        load = machine.popen(["/usr/bin/python3", "/run/load.py", str(self.dice.random())[2:8], str(clients), *MODELS])
        for _ in range(actions):
            time.sleep(self.dice.uniform(0.1, 1.5))
            blows.append(self.dice.choice(list(self.blows)))
            times = {"TIMES": str(self.dice.choice(self._times))}
            self.kills += machine.run(self.blows[blows[-1]], check=False, timeout=120, env=times).stdout.count("killed")
        machine.write("/run/enough", "")
        try:
            out, error = load.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            raise self._broken("clients wait for ever", blows) from None
        ends = collections.Counter(json.loads(out)) if out else collections.Counter({error[-300:]: 1})
        self.ends += ends
        allowed = EXPECTED | ({"500"} if "engines are dead" in blows else set())  # so one without its core answers
        allowed |= {REFUSED} if CLOSING in blows else set()
        if unexpected := {end for end in ends if end not in allowed and not end.startswith("{")}:
            raise self._broken(f"{unexpected} of {dict(ends)}", blows)
        self.calm(blows, began, ends)

    def calm(self, blows: list[str], began: dict[str, Any], ends: Mapping[str, int]) -> None:
        """Every model answers, and all accounts agree; then and again it is stopped, and nothing may be left."""
        machine = self.machine
        try:
            machine.run("systemctl reset-failed 'vllmd*'; systemctl start vllmd.socket", check=False)
            for model in MODELS:
                machine.wait_until(ASK.replace("MODEL", model), timeout=CALM_LIMIT)
            self._await(lambda seen: wrongs(seen, began, ends))
            if self.dice.random() < 0.5:
                machine.run("systemctl stop vllmd.service", timeout=120)
                self._await(left_overs)
        except (TimedOut, AssertionError) as error:
            raise self._broken(str(error)[:6000], blows) from None

    def look(self) -> dict[str, Any]:
        """See look.py."""
        return json.loads(self.machine.out(["/usr/bin/python3", "/run/look.py", DEVICE]))  # type: ignore[no-any-return]

    def _await(self, wrong: Callable[[dict[str, Any]], list[str]]) -> None:
        end = time.monotonic() + CALM_LIMIT
        while found := wrong(seen := self.look()):
            if time.monotonic() > end:
                raise TimedOut(f"{found}; seen: {json.dumps(seen)[:4000]}")
            time.sleep(0.3)
        for unit in ("vllmd.service", "vllmd-launcher.service"):
            for what in ("descriptors", "threads", "memory"):
                self.most[f"{unit} {what}"] = max(self.most[f"{unit} {what}"], seen[unit][what])

    def _broken(self, what: str, blows: list[str]) -> Broken:
        state = self.machine.run("systemd-cgls --no-pager /vllmd.slice; pgrep -u vllmd-engine -a", check=False).stdout
        return Broken(f"after {blows} (seed {self.seed}): {what}\n{state}")

    def table(self) -> str:
        """What was tried, survived and lost, how the requests ended, and the most that was held afterwards."""
        parts = {"tried": self.tried, "requests": self.ends, "most, at rest after a round": self.most}
        lines = [[f"{name}:", *(f"{n:10} {what}" for what, n in rows.most_common())] for name, rows in parts.items()]
        head = f"{self.rounds} rounds, {self.rounds - len(self.lost)} survived, {len(self.lost)} lost something; "
        head += f"{sum(self.tried.values())} blows, {self.kills} processes killed"
        return "\n".join([head, *(line for part in lines for line in part)])


def wrongs(seen: dict[str, Any], began: dict[str, Any], ends: Mapping[str, int]) -> list[str]:
    """What does not agree now, and must, soon after the last request."""
    status, found = seen["status"], []
    if not status.get("opened"):
        return ["the daemon is not there"]
    if seen["scopes"] != seen["processes"]:
        found.append("scopes and processes differ")
    if status["requests"] or any(view["in_flight"] or view["queued"] for view in status["models"]):
        found.append("requests are open, and no client is there")
    promised = {view["instance"]: view["memory"] for view in status["models"] if view["memory"]}
    if promised != seen["held"] or sum(promised.values()) != status["devices"][0]["promised"]:
        found.append(f"promised {promised}, {status['devices'][0]['promised']} in all; held {seen['held']}")
    if len(seen["run directories"]) != len(seen["scopes"]):
        found.append("run directories without an engine")
    answered = sum(count for end, count in ends.items() if end in ("200", "502", "503"))
    same, counted = began["vllmd.service"]["pid"] == seen["vllmd.service"]["pid"], seen["answered"] - began["answered"]
    if same and counted < answered:
        found.append(f"{answered} requests were answered, {counted} counted")
    for unit in ("vllmd.service", "vllmd-launcher.service"):
        holds = seen[unit]
        if holds["descriptors"] > DESCRIPTORS or holds["threads"] > THREADS or holds["memory"] > MEMORY:
            found.append(f"{unit} holds {holds}")
    return found


def left_overs(seen: dict[str, Any]) -> list[str]:
    """What is there still, and must not be when the daemon was stopped."""
    return [f"{name}: {seen[name]}" for name in ("scopes", "processes", "held", "run directories") if seen[name]]


ASK = (
    "test $(curl -s -m 100 -o /dev/null -w '%{http_code}' http://127.0.0.1:33258/v1/chat/completions "
    "-H 'Content-Type: application/json' "
    """-d '{"model": "MODEL", "messages": [{"role": "user", "content": "hi"}]}') = 200"""
)


def main() -> int:
    """Rounds until the time is over, on a new machine after one that lost something; 1 if any did."""
    seconds, seed = float((sys.argv[1:2] or ["3600"])[0]), int((sys.argv[2:3] or [str(time.time_ns() % 10**6)])[0])
    package = subprocess.run([REPOSITORY / "packaging/dev/build", "deb"], check=True, capture_output=True, text=True)
    end, soak = time.monotonic() + seconds, None
    print(f"seed {seed}", flush=True)
    while time.monotonic() < end:
        with container.booted() as machine:
            container.install(machine, REPOSITORY / package.stdout.strip())
            if soak is None:
                soak = Soak(machine, seed)
            else:
                soak.prepare(machine)
            try:
                while time.monotonic() < end:
                    soak.round()
                    print(f"round {soak.rounds}: survived", flush=True)
            except Broken as error:
                print(f"round {soak.rounds}: {error}\n{machine.journal()[-20000:]}", flush=True)
    print(soak.table() if soak else "no time for a round")
    return int(soak is None or bool(soak.lost))


if __name__ == "__main__":
    sys.exit(main())
