"""Start a Ray head or find a cluster, wait for its devices, then become vLLM. A script; imports nothing of ours.

    ray_start.py '{"host": "10.0.0.1", "port": 6379, "head": true, "here": 1, "needed": 2, "wait": 120}' vllm serve ...

The process stays the one that was started, so that signals reach vLLM; the head's processes
end with the scope. Ray is that of vLLM's Python, beside ``vllm``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

PAUSE = 1.0  # seconds between looks
LOOK_LIMIT = 20.0  # seconds for one: Ray's own client waits for ever
OBJECT_STORE = 256 << 20  # bytes; vLLM's ranks do not use it, and Ray would take 30% of the host's memory
LOOK = """
import json, logging, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
nodes = {n["NodeManagerAddress"]: n["Resources"].get("GPU", 0) for n in ray.nodes() if n["Alive"]}
print("CLUSTER", json.dumps([nodes, ray.available_resources().get("GPU", 0)]))
"""  # its line is marked: Ray, and what sits in its interpreter, print lines of their own at any time


class RayError(Exception):
    """Why vLLM cannot be started; its name and words are the last line of the log."""


def main(settings: dict[str, Any], argv: list[str]) -> None:
    """Start or join the Ray cluster, then execute the engine's command in this process. Never returns."""
    python = python_of(argv)
    check_installed(python)
    if settings["head"]:
        start_head(python, settings)
    wait_for_devices(python, settings)
    os.environ["RAY_ADDRESS"] = address_of(settings)
    os.execvp(argv[0], argv)


def address_of(settings: dict[str, Any]) -> str:
    host = f"[{settings['host']}]" if ":" in settings["host"] else settings["host"]
    return f"{host}:{settings['port']}"


def python_of(argv: list[str]) -> str:
    """The Python that the command runs vLLM with: the one that it names, or the one beside ``vllm``."""
    word = next((word for word in argv if os.path.basename(word).startswith(("vllm", "python"))), "")
    if not word:
        raise RayError(f"command names neither vllm nor its Python, with which Ray is to be found: {argv[0]}")
    program = shutil.which(word)
    if not program:
        raise RayError(f"there is no command {word!r}: looked in {os.environ.get('PATH', os.defpath)}")
    if os.path.basename(word).startswith("python"):
        return program
    beside = os.path.join(os.path.dirname(os.path.realpath(program)), "python3")
    if not os.access(beside, os.X_OK):
        raise RayError(f"there is no {beside} to find Ray with; name vLLM's Python in command: [.../python3, -m, ...]")
    return beside


def check_installed(python: str) -> None:
    ask = "import sys, importlib.util; sys.exit(importlib.util.find_spec('ray') is None)"
    if subprocess.run([python, "-c", ask], check=False).returncode:
        raise ModuleNotFoundError(f"No module named 'ray' in {python}")


def start_head(python: str, settings: dict[str, Any]) -> None:
    """A head with this machine's share of the devices (CUDA_VISIBLE_DEVICES says which) and nothing to do but vLLM."""
    command = [python, "-m", "ray.scripts.scripts", "start", "--head", "--disable-usage-stats"]
    command += [
        "--node-ip-address",
        settings["host"],
        "--port",
        str(settings["port"]),
        "--num-gpus",
        str(settings["here"]),
    ]
    command += ["--num-cpus", "1", "--object-store-memory", str(OBJECT_STORE), "--include-dashboard", "false"]
    command += ["--temp-dir", fresh_folder(f"/tmp/vllmd-ray-{settings['port']}")]
    # Ray runs its workers at nice 15; vLLM's ranks are no background work, and would starve beside anything else.
    env = {"RAY_worker_niceness": "0"} | {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if status := subprocess.run(command, env=env, check=False).returncode:
        sys.exit(f"ray start has ended with status {status}")  # its own output says why


def fresh_folder(path: str) -> str:
    """A folder with a short path, for Ray's sockets, emptied of the last head's logs."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        raise RayError(f"{path} is somebody else's: remove it, or take another port") from None
    return path


def wait_for_devices(python: str, settings: dict[str, Any]) -> None:
    """Raises RayError when the time is up."""
    deadline, logged = time.monotonic() + settings["wait"], ""
    while missing := what_is_missing(python, settings):
        if time.monotonic() > deadline:
            raise RayError(f"{missing} (waited {settings['wait']} s)")
        if missing != logged:
            print(f"Waiting for Ray: {missing}", flush=True)
        logged = missing
        time.sleep(PAUSE)


def what_is_missing(python: str, settings: dict[str, Any]) -> str:
    """What the cluster lacks, in words; "" if it has as many free devices as vLLM will ask for."""
    address = address_of(settings)
    try:
        socket.create_connection((settings["host"], settings["port"]), LOOK_LIMIT).close()
    except OSError as error:
        return f"nothing answers at {address} ({error.strerror or error}); there should be a Ray head"
    try:
        look = subprocess.run([python, "-c", LOOK, address], capture_output=True, text=True, timeout=LOOK_LIMIT)
    except subprocess.TimeoutExpired:
        return f"Ray at {address} does not answer within {LOOK_LIMIT:g} s"
    if look.returncode:
        return f"Ray at {address}: {(look.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    report = next((line for line in look.stdout.splitlines() if line.startswith("CLUSTER ")), "")
    if not report:
        return f"Ray at {address} has ended without a word about its nodes"
    nodes, free = json.loads(report.removeprefix("CLUSTER "))
    return "" if free >= settings["needed"] else too_small(address, nodes, free, settings["needed"])


def too_small(address: str, nodes: dict[str, float], free: float, needed: int) -> str:
    total = sum(nodes.values())
    each = ", ".join(f"{host}: {count:g}" for host, count in sorted(nodes.items()))
    busy = f", {free:g} of them free" if free != total else ""
    what = f"Ray at {address} has {counted(len(nodes), 'node')} with {counted(total, 'GPU')} ({each}){busy}"
    return f"{what}; the model needs {needed}. Another machine joins by: ray start --address={address}"


def counted(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]), sys.argv[2:])
    except (RayError, ModuleNotFoundError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
