"""MemoryMax and OOMPolicy for real, on a kernel with all controllers: the engine dies, it is told why, and no one else
is touched.

    pytest -m qemu -s tests/machine/test_memory_limits.py       (packaging/dev/setup qemu; some minutes)
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.machine import virtual
from tests.machine.container import CannotBoot

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(1800)]

POLICIES = ("continue", "stop", "kill")
CONFIG = """
server: {idle_exit: never}
idle: never
devices: []
defaults: {engine: sim, start_timeout: 5m, restart_backoff: 1s, options: {load_time: 0.1s, quiet: true}}
models:
  neighbour: {}
""" + "".join(
    f"  {policy}: {{command: [/usr/bin/python3, /opt/hungry.py], "
    f"limits: {{memory_max: 120MiB, memory_swap_max: 0, oom_policy: {policy}}}}}\n"
    for policy in POLICIES
)
# The stand-in; in it, or in a process that it starts, memory is taken as soon as a file says so.
HUNGRY = """
import os, subprocess, sys, threading, time
name = sys.argv[sys.argv.index("--served-model-name") + 1]
EAT = "x = []\\nwhile True: x.append(bytearray(b'x' * (8 << 20)))"
def eat():
    while True:
        if os.path.exists(f"/run/eat-{name}"):
            exec(EAT)
        if os.path.exists(f"/run/helper-{name}"):
            subprocess.run([sys.executable, "-c", EAT])
            time.sleep(1)
        time.sleep(0.2)
threading.Thread(target=eat, daemon=True).start()
sys.path.insert(0, "/usr/lib/python3/dist-packages")
from vllmd.simengine.options import main_options
from vllmd.simengine.server import run
sys.exit(run(main_options()))
"""
PROGRAM = """
import json, os, subprocess, time, urllib.request

def ask(model):
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]}).encode()
    where = "http://127.0.0.1:33258/v1/chat/completions"
    request = urllib.request.Request(where, body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=300).status
    except urllib.error.HTTPError as error:
        return error.code

def out(*argv):
    return subprocess.run(argv, capture_output=True, text=True).stdout

def views():
    told = out("curl", "-s", "--unix-socket", "/run/vllmd/admin.sock", "http://x/admin/status")
    return {view["name"]: view for view in json.loads(told)["models"]}

def daemon():
    return out("systemctl", "show", "-P", "MainPID", "vllmd.service").strip()

def play(model, file, gone):
    row = {"asked before": ask(model)}
    before = views()
    if model != "neighbour":
        limit = out("systemctl", "show", "-P", "MemoryMax", before[model]["unit"]).strip()
        row["MemoryMax"] = int(limit) >> 20 if limit.isdigit() else limit
    first, master = before["neighbour"]["pid"], daemon()
    open(file, "w").close()
    events, end = f"/sys/fs/cgroup/vllmd.slice/{before[model]['unit']}/memory.events", time.time() + 120
    while time.time() < end:
        try:
            killed = "oom_kill 0" not in open(events).read()
        except OSError:
            killed = True
        if killed:
            break
        time.sleep(0.2)
    os.unlink(file)
    while gone and time.time() < end and views()[model]["pid"] == before[model]["pid"]:
        time.sleep(0.3)
    time.sleep(3 if not gone else 0)
    row["the engine lives"] = views()[model]["pid"] == before[model]["pid"]
    row["asked afterwards"] = ask(model)
    lines = out("journalctl", "-q", "-u", "vllmd", "-u", "vllmd-launcher").splitlines()
    row["reason"] = [line.partition("]: ")[2] for line in lines if model in line and "memory" in line][-2:]
    row["neighbour and daemon untouched"] = (views()["neighbour"]["pid"], daemon()) == (first, master)
    row["neighbour answers"] = ask("neighbour")
    return row

print(json.dumps({"controllers": open("/sys/fs/cgroup/cgroup.controllers").read().split()}))
ask("neighbour")
for policy in ("continue", "stop", "kill"):
    print(json.dumps({"policy": policy, "who": "the engine", **play(policy, f"/run/eat-{policy}", True)}), flush=True)
for policy in ("continue", "stop", "kill"):
    row = play(policy, f"/run/helper-{policy}", policy != "continue")
    print(json.dumps({"policy": policy, "who": "a helper of it", **row}), flush=True)
"""


def test_an_engine_that_takes_too_much_dies_alone_and_it_is_told_why(package: Path) -> None:
    """Whatever the policy, if its main process is killed; a helper's death alone costs nothing under `continue`."""
    files = {"/etc/vllmd/vllmd.yaml": CONFIG, "/opt/hungry.py": HUNGRY}
    try:
        told = virtual.run(package, PROGRAM, files, timeout=900)
    except CannotBoot as reason:
        pytest.skip(str(reason))
    print(told)
    first, *rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert {"memory", "cpu", "pids", "io"} <= set(first["controllers"])
    assert len(rows) == 2 * len(POLICIES), told
    for row in rows:
        assert row["MemoryMax"] == 120
        assert row["the engine lives"] is (row["policy"] == "continue" and row["who"] != "the engine"), row
        assert [row[name] for name in ("asked before", "asked afterwards", "neighbour answers")] == [200] * 3, row
        assert row["neighbour and daemon untouched"], row
        assert row["the engine lives"] or any("for memory" in line for line in row["reason"]), row
