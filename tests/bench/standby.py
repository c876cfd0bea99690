"""A cold vLLM: alone, through vllmd, and through vllmd with a standby; eager and compiled. ``make bench-standby``.

A real vLLM on the CPU and a tiny model. Seconds from the start (alone) or from the request (vllmd) to the first token
of an answer, and the processor time of all processes of the engine until then, which a busy machine changes less. A
standby's imports are not in it: they were done while nobody waited; they are in a column of their own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.conftest import RealVllm
from tests.engines.installed import Site, daemon, ports
from tests.engines.test_real_standby import script, worked
from tests.engines.test_standbys import pid_of, until, waiting
from tests.machine import container

LIMIT = 900.0  # seconds
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
FLAGS = ["--max-num-seqs", "8"]
BODY = {"prompt": "a b c", "max_tokens": 1, "temperature": 0}


def main(words: Sequence[str]) -> int:
    """Print the table, in Markdown. ``words``: eager, compiled, or both where there are none."""
    vllm = RealVllm(container.cache() / "vllm/bin/vllm", container.cache() / "tiny-model")
    print("| | first token after, s | processor time, s | of `vllm serve` alone | imports beforehand, s |")
    print("|---|---|---|---|---|", flush=True)
    for mode in words or ("eager", "compiled"):
        with tempfile.TemporaryDirectory(dir="/tmp", prefix="v") as name:
            measure(mode, vllm, Path(name))
    return 0


def measure(mode: str, vllm: RealVllm, folder: Path) -> None:
    """Three rows. Each way is started once before where something is compiled, so that the caches are warm."""
    flags = [*FLAGS, *(["--enforce-eager"] if mode == "eager" else [])]
    if mode == "compiled":
        alone(vllm, folder, flags)
    seconds, base = alone(vllm, folder, flags)
    row(f"{mode}: `vllm serve` alone", seconds, base, base)
    model = {
        "engine": "vllm",
        "command": [str(script(vllm, folder))],
        "model": str(vllm.model),
        "max_model_len": 512,
        "extra_args": flags,
        "start_timeout": LIMIT,
        "env": ENV,
    }
    home = {"home": str(folder / "home")}
    models = {"a": model, "b": model}
    for count in (0, 1):
        config = {"engines": {**ports(), **home, "standby": count}, "devices": [], "models": models}
        with daemon(folder / f"site{count}", config) as site:
            site.http.timeout = LIMIT
            asked(site, "a")  # with its caches where vllmd has them
            if count == 0:
                seconds = asked(site, "b")
                row(f"{mode}: through vllmd", seconds, worked(site.view("b")["pid"]), base)
                continue
            pid = pid_of(site, until(lambda site=site: waiting(site), LIMIT))
            before = worked(pid)
            seconds = asked(site, "b")
            row(f"{mode}: through vllmd, standby", seconds, worked(site.view("b")["pid"]) - before, base, before)


def asked(site: Site, model: str) -> float:
    """Seconds until the model has answered."""
    began = time.monotonic()
    reply = site.http.post("/v1/completions", json={"model": model, **BODY})
    assert reply.status_code == 200, reply.text
    return time.monotonic() - began


def alone(vllm: RealVllm, folder: Path, flags: Sequence[str]) -> tuple[float, float]:
    """``vllm serve`` as one would type it: seconds to the first token, processor time until then."""
    uds = folder / "s"
    base = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "LANG": "C.UTF-8", "VLLM_NO_USAGE_STATS": "1"}
    (folder / "home").mkdir(exist_ok=True)
    argv = [str(script(vllm, folder)), "serve", str(vllm.model), "--uds", str(uds), "--max-model-len", "512"]
    with running([*argv, "--served-model-name", "a", *flags], {**base, **ENV}, folder) as process:
        began = time.monotonic()
        while not answered(uds):
            if process.poll() is not None or time.monotonic() > began + LIMIT:
                raise SystemExit(f"vllm serve ended with {process.poll()}: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)
        return time.monotonic() - began, worked(process.pid)


@contextlib.contextmanager
def running(argv: list[str], env: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, ended with all that it has begun."""
    (folder / "s").unlink(missing_ok=True)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(argv, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def answered(uds: Path) -> bool:
    """Whether it gives a first token."""
    connection = http.client.HTTPConnection("localhost")
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(uds))
        connection.request("POST", "/v1/completions", json.dumps({"model": "a", **BODY}),
                           {"Content-Type": "application/json"})  # fmt: skip
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def row(what: str, seconds: float, work: float, base: float, before: float | None = None) -> None:
    """A row of the table."""
    imports = "" if before is None else f"{before:.1f}"
    print(f"| {what} | {seconds:.1f} | {work:.1f} | {work / base:.2f} x | {imports} |", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
