"""The process: its start by phases, its refusals, its end and its crashes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllmd.simengine.device import FakeGpu, device_usage, make_device

LIMIT = 60.0  # seconds
READY = "Application startup complete"
CHAT = {"messages": [{"role": "user", "content": "a b c d e"}]}


class Process:
    """A stand-in of its own, its log in a file."""

    def __init__(self, tmp_path: Path, *args: str, serve: bool = False, **env: str) -> None:
        self.uds, self.log = tmp_path / "s", tmp_path / "log"
        program = [sys.executable, "-m", "vllmd.simengine"]
        argv = [*program, *args] if serve else [*program, "--uds", str(self.uds), *args]
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(argv, stdout=log, stderr=log, env=os.environ | env)

    def wait_log(self, text: str) -> str:
        """Wait for a text in the log, or for the end."""
        return self._wait(lambda: text in self.log.read_text() or self.popen.poll() is not None)

    def _wait(self, condition: object) -> str:
        deadline = time.monotonic() + LIMIT
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        return self.log.read_text()

    def ready(self) -> Process:
        assert READY in self.wait_log(READY)
        return self

    def status(self) -> int:
        return self.popen.wait(LIMIT)

    def post(self, path: str, body: object) -> bytes:
        """All that comes until the connection ends."""
        with socket.socket(socket.AF_UNIX) as wire:
            wire.settimeout(LIMIT)
            wire.connect(str(self.uds))
            data = json.dumps(body).encode()
            head = f"POST {path} HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
            wire.sendall(head.encode() + b"connection: close\r\n\r\n" + data)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := wire.recv(65536):
                    answer += piece
            return answer


@pytest.fixture
def started(tmp_path: Path) -> Iterator[object]:
    """Starts stand-ins, and ends those that are still there."""
    running: list[Process] = []

    def start(*args: str, serve: bool = False, **env: str) -> Process:
        running.append(Process(tmp_path, *args, serve=serve, **env))
        return running[-1]

    yield start
    for process in running:
        process.popen.kill()
        process.popen.wait(LIMIT)


def refused(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as wire:
        return wire.connect_ex(str(path)) == 111


def test_it_binds_at_once_and_listens_when_loaded(started) -> None:
    """The file is no sign of readiness: until then a connection is refused."""
    sim = started("--fail", "never-ready")
    sim.wait_log("init engine")
    assert sim.uds.exists()
    assert refused(sim.uds)


def test_the_log_tells_the_phases_in_vllms_words(started) -> None:
    """What a manager shows of a start."""
    log = started("--memory", "20GiB", "--weights", "12GiB").ready().log.read_text()
    marks = ["Starting to load model", "Model loading took 12.00 GiB", "torch.compile took", "GPU KV cache size:"]
    marks += ["Graph capturing finished in", "init engine (profile", "Starting vLLM server on unix:", READY]
    places = [log.find(mark) for mark in marks]
    assert places == sorted(places)
    assert -1 not in places


def test_the_load_takes_its_time(started) -> None:
    """As declared, so that a rehearsal means something."""
    began = time.monotonic()
    started("--load-time", "300ms").ready()
    assert time.monotonic() - began >= 0.3


def test_sigterm_ends_it_quickly_and_well(started) -> None:
    """Status 0, a running answer aborted, and the socket's file left behind: the next start must remove it."""
    sim = started("--tokens-per-second", "0.01").ready()
    wire = socket.socket(socket.AF_UNIX)
    wire.connect(str(sim.uds))
    data = json.dumps(CHAT | {"stream": True}).encode()
    wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\ncontent-type: application/json\r\n"
                 + f"content-length: {len(data)}\r\n\r\n".encode() + data)  # fmt: skip
    wire.recv(65536)
    sim.popen.send_signal(signal.SIGTERM)
    assert sim.status() == 0
    assert b'"finish_reason":"abort"' in wire.recv(65536)
    assert sim.uds.exists()
    assert "Address already in use" in _last(started())


def _last(sim: Process) -> str:
    assert sim.status() == 1
    return sim.log.read_text()


def test_sigterm_ends_a_load(started) -> None:
    """A start that is no longer wanted."""
    sim = started("--load-time", "1h")
    sim.wait_log("Starting to load model")
    sim.popen.send_signal(signal.SIGTERM)
    assert sim.status() == 0


def test_sigterm_can_be_ignored(started) -> None:
    """Then only SIGKILL helps."""
    sim = started("--fail", "ignore-sigterm").ready()
    sim.popen.send_signal(signal.SIGTERM)
    assert b"200 OK" in sim.post("/v1/chat/completions", CHAT)
    assert sim.popen.poll() is None


def test_too_little_memory_ends_the_start_in_vllms_words(started, tmp_path: Path) -> None:
    """The very text that a manager reads the needed memory from."""
    device = make_device(tmp_path / "gpu", 24 << 30)
    FakeGpu(device, pid=1).hold(6 << 30)
    log = _last(started("--device-file", str(device), "--memory", "20GiB"))
    assert "ValueError: Free memory on device cuda:0 (18.00/24.00 GiB) on startup is less than desired" in log
    assert "(0.8333, 20.00 GiB)" in log


def test_memory_is_held_from_the_load_to_the_death(started, tmp_path: Path) -> None:
    """More while starting, if so declared; nothing once it is dead."""
    device = tmp_path / "gpu"
    sizes = ("--memory", "20GiB", "--memory-starting", "22GiB", "--device-memory", "24GiB")
    sim = started("--device-file", str(device), *sizes, "--load-time", "500ms")
    sim.wait_log("Starting to load model")
    assert device_usage(device).processes == {sim.popen.pid: 22 << 30}
    sim.ready()
    assert device_usage(device).processes == {sim.popen.pid: 20 << 30}
    sim.popen.kill()
    sim.status()
    assert device_usage(device).processes == {}


def test_a_share_of_the_device_is_held_in_vllms_place(started, tmp_path: Path) -> None:
    """``--gpu-memory-utilization`` means what it means to vLLM."""
    device = make_device(tmp_path / "gpu", 24 << 30)
    sim = Process(
        tmp_path, "serve", "m", "--uds", str(tmp_path / "s"), "--gpu-memory-utilization", "0.5", serve=True,
        VLLMD_SIM_ARGS=f"--device-file {device}",
    )  # fmt: skip
    try:
        sim.ready()
        assert device_usage(device).used == 12 << 30
    finally:
        sim.popen.kill()
        sim.status()


@pytest.mark.parametrize(("failure", "status"), [("exit-at-start", 1), ("exit-at-start=3", 3), ("oom-at-start", 1)])
def test_a_start_can_fail(started, failure: str, status: int) -> None:
    """With the status and the log that go with it."""
    sim = started("--fail", failure)
    assert sim.status() == status
    assert "EngineCore failed to start" in sim.log.read_text()


def test_a_crash_in_mid_stream_cuts_the_answer(started) -> None:
    """No end of the body, no [DONE], and status 0, as vLLM has it."""
    sim = started("--fail", "crash-mid-stream").ready()
    answer = sim.post("/v1/chat/completions", CHAT | {"stream": True})
    assert answer.count(b"data: ") == 4
    assert not answer.endswith(b"0\r\n\r\n")
    assert sim.status() == 0


def test_a_crash_after_so_many_requests(started) -> None:
    """The last of them is still answered."""
    sim = started("--fail", "crash-after=2").ready()
    assert b"a b c d e" in sim.post("/v1/chat/completions", CHAT)
    assert b"a b c d e" in sim.post("/v1/chat/completions", CHAT)
    assert sim.status() == 1


def test_grandchildren_outlive_it(started, tmp_path: Path) -> None:
    """Sessions of their own, deaf to SIGTERM, named like vLLM's core: only a cgroup's kill gets them."""
    sim = started("--fail", "fork-grandchildren=2", VLLMD_TEST_MARK=str(tmp_path)).ready()
    strays = _marked(f"VLLMD_TEST_MARK={tmp_path}", sim.popen.pid)
    try:
        assert len(strays) == 2
        for pid in strays:
            assert Path(f"/proc/{pid}/comm").read_text() == "VLLM::EngineCor\n"
            assert os.getsid(pid) != os.getsid(sim.popen.pid)
            os.kill(pid, signal.SIGTERM)
        sim.popen.send_signal(signal.SIGTERM)
        assert sim.status() == 0
        assert _marked(f"VLLMD_TEST_MARK={tmp_path}", sim.popen.pid) == strays
    finally:
        for pid in strays:
            os.kill(pid, signal.SIGKILL)


def _marked(mark: str, besides: int) -> list[int]:
    """The processes with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return sorted(pid for pid in found if pid != besides)


def test_a_lost_log_does_not_end_it(tmp_path: Path) -> None:
    """The launcher that read it may die; the engine serves on."""
    reader, writer = os.pipe()
    argv = [sys.executable, "-m", "vllmd.simengine", "--uds", str(tmp_path / "s")]
    popen = subprocess.Popen(argv, stdout=writer, stderr=writer)
    os.close(writer)
    try:
        with os.fdopen(reader) as log:
            assert any(READY in line for line in log)
        sim = Process.__new__(Process)
        sim.uds = tmp_path / "s"
        assert b"200 OK" in sim.post("/v1/chat/completions", CHAT)
        assert b"200 OK" in sim.post("/v1/chat/completions", CHAT)
    finally:
        popen.kill()
        popen.wait(LIMIT)
