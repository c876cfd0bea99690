"""From the package of an earlier commit to this one, in the daytime: engines loaded, clients asking all the while."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machine import container
from tests.machine.container import Machine

pytestmark = pytest.mark.machine

# Two that fit together, two that take turns, one with replicas of its own settings.
MODELS = """
server: {idle_exit: never, drain_timeout: 20s}
idle: never
devices: [{memory: 80GiB}, {memory: 80GiB}, {memory: 80GiB}, {memory: 80GiB}]
defaults: {engine: sim, gpu_memory: 30GiB, options: {load_time: 0.2s, tokens_per_second: 60, quiet: true}}
models:
  a: {devices: [0]}
  b: {devices: [0]}
  c: {devices: [1], gpu_memory: 60GiB}
  d: {devices: [1], gpu_memory: 60GiB}
  pair: {replicas: [{devices: [2]}, {devices: [3]}]}
"""
ENGINES = "for p in $(pgrep -u vllmd-engine); do tr '\\0' '\\n' </proc/$p/environ | grep ^VLLMD_INSTANCE= | " \
          "sed \"s/^VLLMD_INSTANCE=/$p /\"; done"  # fmt: skip


def engines(machine: Machine) -> dict[str, str]:
    """The instances that run, by the process ids of their engines."""
    return dict(line.split() for line in machine.out(ENGINES).splitlines())


def adopted(machine: Machine) -> dict[str, str]:
    """The process ids of engines, by the replicas that the daemon takes them for."""
    views = json.loads(machine.out("curl -sf --unix-socket /run/vllmd/admin.sock http://x/admin/status"))["models"]
    each = [replica for view in views for replica in view["replicas"] or [view]]
    return {view["name"]: str(view["pid"]) for view in each if view["pid"]}


def test_an_upgrade_of_an_earlier_version_under_load_loses_nothing(
    boot_machine: Callable[..., Machine], old_package: Path, package: Path
) -> None:
    """No request is refused or cut, engines run on under their new names, and what a model needs is there at once."""
    machine = boot_machine()
    container.install(machine, old_package)
    machine.write("/etc/vllmd/vllmd.yaml", MODELS)
    machine.write("/root/clients.py", CLIENTS)
    machine.run(["/usr/bin/python3", "/root/clients.py", "once", "a", "b", "c", "pair", "pair"], timeout=90)
    machine.wait_until(lambda: len(engines(machine)) == 5)
    before = {instance.rpartition("-")[0]: pid for pid, instance in engines(machine).items()}
    load = machine.popen(["/usr/bin/python3", "/root/clients.py", "on", "a", "b", "c", "d", "a", "b", "pair", "pair"])
    machine.wait_until("test -e /run/going")
    machine.copy_in(package, "/root/vllmd.deb")
    later = container.later_version(machine)
    machine.run(["apt-get", "install", "-qy", "--no-install-recommends", later], timeout=180)
    machine.write("/run/enough", "")
    out, error = load.communicate(timeout=120)
    told = json.loads(out)
    print("requests at the upgrade:", told)
    assert error == "" and told.pop("repeated", 0) < told["200"] / 10, told
    assert told.keys() == {"200"}, (told, machine.journal()[-8000:])
    assert json.loads(machine.out("vllmctl info --json"))["version"] == "99.0"
    now = adopted(machine)
    names = {"a": "a", "b": "b", "pair@1": "pair", "pair@2": "pair-2"}
    assert {name: now[name] for name in names} == {name: before[old] for name, old in names.items()}
    assert machine.out("systemctl is-active vllmd{,-admin,-read}.socket").split() == ["active"] * 3


# Half of them keep their connections, as every SDK does, and repeat a request on one that was closed meanwhile.
CLIENTS = """
import collections, http.client, json, os, sys, threading, time

how, models = sys.argv[1], sys.argv[2:]
ends = collections.Counter()
CLOSED = http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError


def ask(connection, model, stream):
    body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "one two three four five"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    told = answer.read()
    whole = told.rstrip().endswith(b"data: [DONE]") if stream and answer.status == 200 else True
    return str(answer.status) if whole and answer.status == 200 else f"{answer.status} {told[-200:]}"


def client(model, stream, kept):
    connection, used = http.client.HTTPConnection("127.0.0.1", 33258, timeout=80), False
    while True:
        try:
            ends[ask(connection, model, stream)] += 1
            used = True
        except CLOSED as error:
            ends["repeated" if used else repr(error)] += 1
            connection.close()
            used = False
            continue
        except Exception as error:
            ends[repr(error)] += 1
            connection.close()
        if not kept:
            connection.close()
            used = False
        if how == "once" or os.path.exists("/run/enough"):
            return
        time.sleep(0.5)


threads = [threading.Thread(target=client, args=(model, bool(number % 2), bool(number & 2)))
           for number, model in enumerate(models)]
if how == "once":
    threads = [threading.Thread(target=client, args=(model, True, False)) for model in models for _ in range(4)]
for thread in threads:
    thread.start()
    time.sleep(0.05)
while how == "on" and sum(ends.values()) < 40:
    time.sleep(0.1)
open("/run/going", "w").close()
for thread in threads:
    thread.join()
print(json.dumps(ends))
"""
