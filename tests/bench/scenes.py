"""Scenes in which the scheduler once let somebody wait for nothing, played with the installed daemon: how long now?

The daemon and stand-in engines on declared devices, in the booted container: ``python -m tests.bench.scenes``, and
``--before`` for the package of 50a92b2, where each was first seen. An engine loads in 0.2 s and sleeps at once, so a
wait is what the scheduler makes of it, and the second that Python takes to begin.
"""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

from tests.conftest import build_package
from tests.e2e.site import CONFIG_FILE, Site
from tests.machine import container

LONGEST = 150.0  # seconds that a client waits

CLIENT = """
import asyncio, json, subprocess, sys, time
import httpx
URL, LONGEST = "http://127.0.0.1:33258/v1/completions", float(sys.argv[2])

async def ask(client, model, timeout=LONGEST):
    began = time.monotonic()
    try:
        answer = await client.post(URL, json={"model": model, "prompt": "x", "max_tokens": 1}, timeout=timeout)
        assert answer.status_code == 200, answer.text
    except httpx.TimeoutException:
        pass
    return time.monotonic() - began

async def stream(client, model):
    body = {"model": model, "prompt": "x", "max_tokens": 3000, "stream": True, "ignore_eos": True}
    async with client.stream("POST", URL, json=body, timeout=900) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            yield line

async def hold(client, model, running):
    async for _ in stream(client, model):
        running.set()

async def streaming(client, model):
    running = asyncio.Event()
    task = asyncio.ensure_future(hold(client, model, running))
    await asyncio.wait_for(running.wait(), 60)
    return task

def vllmctl(*words):
    subprocess.run(["vllmctl", *words], check=True, capture_output=True)

def decisions(*kinds):
    told = subprocess.run(
        ["curl", "-s", "--unix-socket", "/run/vllmd/admin.sock", "http://x/admin/decisions"], capture_output=True
    )
    return sum(each["what"] in kinds for each in json.loads(told.stdout)["decisions"])

async def main():
    limits = httpx.Limits(max_connections=300)
    async with httpx.AsyncClient(limits=limits) as client:
        scope = {**globals(), "client": client}
        exec("async def scene():\\n" + "\\n".join("    " + line for line in sys.argv[1].splitlines()), scope)
        print(json.dumps(await scope["scene"]()))
asyncio.run(main())
"""

VISITS = """
for _ in range({number}):
    await ask(client, "a")
    await asyncio.sleep(10 / {number})
return [await ask(client, "b")]
"""
HANG_UP = """
await asyncio.gather(*(ask(client, "a", 0.5) for _ in range(5)))
await asyncio.sleep(3)
return [await ask(client, "b")]
"""
ONE_VISIT = """
await ask(client, "a")
return [await ask(client, "b")]
"""
SLEEPER = """
await ask(client, "c")
vllmctl("sleep", "c")
await ask(client, "a")
task = await streaming(client, "a")
wait = await ask(client, "c")
task.cancel()
return [wait]
"""
IN_TURN = """
for model in {names}:
    await ask(client, model)
before = decisions("sleep", "stop")
waits = [await ask(client, model) for _ in range(30) for model in {names}]
return [max(waits), decisions("sleep", "stop") - before]
"""
BATCH = """
waits = sorted(await asyncio.gather(*(ask(client, f"m{n % 20:02}") for n in range(200))))
return [waits[100], waits[-1]]
"""
BEHIND = """
task = await streaming(client, "a")
wait = await ask(client, "b")
task.cancel()
return [wait]
"""
THREE_LOADS = """
socket, path = "/run/vllmd/admin.sock", "http://x/api/v1/models/start"
body = json.dumps({"model_name": "a", "gpu_id": 1})
load = ["curl", "-sf", "--unix-socket", socket, "-H", "Content-Type: application/json", "-d", body, path]
for each in [subprocess.Popen(load, stdout=subprocess.DEVNULL) for _ in range(3)]:
    assert each.wait() == 0
await asyncio.sleep(3)
units = ["systemctl", "list-units", "--no-legend", "vllmd-model-*.scope"]
return [len(subprocess.run(units, capture_output=True, text=True).stdout.splitlines())]
"""


class Scene(NamedTuple):
    """Devices (GiB), models, what clients do, what the figures are, and what they were when it was first seen."""

    name: str
    devices: tuple[int, ...]
    models: dict[str, str]
    play: str
    before: str


def engine(gib: int, more: str = "", options: str = "") -> str:
    return f"{{engine: sim, gpu_memory: {gib}GiB, options: {{load_time: 0.2{options}}}{more}}}"


BIG, SLOW = engine(60), engine(60, options=", tokens_per_second: 5")
SCENES = [
    Scene("20 requests to A in 10 s, then B waits, s", (80,), {"a": BIG, "b": BIG}, VISITS.format(number=20), "26.8"),
    Scene("60 requests to A in 10 s, then B waits, s", (80,), {"a": BIG, "b": BIG}, VISITS.format(number=60), "52.0"),
    Scene("five hung up during A's load, then B waits, s", (80,), {"a": BIG, "b": BIG}, HANG_UP, "9.6"),
    Scene("one request to A, priority 10, B waits, s", (80,), {"a": engine(60, ", priority: 10"), "b": BIG},
          ONE_VISIT, "19"),
    Scene("one request to A, priority 100, B waits, s", (80,), {"a": engine(60, ", priority: 100"), "b": BIG},
          ONE_VISIT, "78"),
    Scene("C asleep on device 0, A streams there, 1 is empty: C waits, s", (80, 80), {"a": SLOW, "c": BIG},
          SLEEPER, "121 and longer"),
    Scene("A and C in turn 30 times, 2 devices: longest wait, s, and departures", (80, 80), {"a": BIG, "c": BIG},
          IN_TURN.format(names=("a", "c")), "30 swaps"),
    Scene("35 and 70 GiB in turn 30 times on 80 and 40: the same", (80, 40), {"small": engine(35), "large": engine(70)},
          IN_TURN.format(names=("small", "large")), "a swap each time"),
    Scene("four in turn on four devices: the same", (80,) * 4, dict.fromkeys("abcd", BIG),
          IN_TURN.format(names=tuple("abcd")), ""),
    Scene("200 cold requests, 20 models, 3 places: median and longest wait, s", (90,),
          {f"m{n:02}": engine(30) for n in range(20)}, BATCH, "13.7, 16.4"),
    Scene("B behind a busy A with drain_limit 2s waits, s", (80,),
          {"a": engine(60, ", drain_limit: 2s", ", tokens_per_second: 5"), "b": BIG}, BEHIND, "90.9"),
    Scene("three loads on GPU 1 at once: engines", (80, 80), {"a": engine(30)}, THREE_LOADS, "2"),
]  # fmt: skip


def main() -> None:
    """Play each from nothing learnt, and print its figures beside those of 50a92b2."""
    parser = argparse.ArgumentParser(prog="scenes", description="Scenes of waits for nothing, played again.")
    parser.add_argument("--before", action="store_true", help="with the package of 50a92b2")
    parser.add_argument("words", nargs="*", help="only scenes whose name contains one of these")
    arguments = parser.parse_args()
    package = container.cache() / "old/vllmd.deb" if arguments.before else build_package("deb")
    with container.booted() as machine:
        container.install(machine, package)
        site = Site(machine)
        for scene in SCENES:
            if not arguments.words or any(word in scene.name for word in arguments.words):
                print(f"{scene.name:<72} {played(site, scene):<14} at first: {scene.before}", flush=True)


def played(site: Site, scene: Scene) -> str:
    """Its figures."""
    models = "".join(f"  {name}: {engine}\n" for name, engine in scene.models.items())
    devices = ", ".join(f"{{memory: {gib}GiB}}" for gib in scene.devices)
    site.to_rest()
    site.machine.run("rm -rf /var/cache/vllmd/* /var/lib/vllmd/*", check=False)
    site.machine.write(CONFIG_FILE, f"devices: [{devices}]\nserver: {{queue_limit: 1000}}\nmodels:\n{models}")
    done = site.machine.run(
        ["/usr/bin/python3", "-c", CLIENT, scene.play, str(LONGEST)], check=False, timeout=3 * LONGEST
    )
    if done.returncode:
        return f"failed: {done.stderr.strip().splitlines()[-1]}"
    return ", ".join(
        f"{figure:.1f}" if isinstance(figure, float) else str(figure) for figure in json.loads(done.stdout)
    )


if __name__ == "__main__":
    main()
