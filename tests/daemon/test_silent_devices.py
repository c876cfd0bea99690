"""What a daemon makes of devices that do not answer: a real one, with a stand-in for NVML that fails when told to.

Source x fault is in ``tests/gpu/test_answers.py``; here it is what clients, operators and running engines see.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.admin.site import REPOSITORY, Site, running, until
from tests.gpu.check.bench import Bench, Table
from tests.gpu.check.daemon import site as outliving
from vllmd.core.types import Device
from vllmd.gpu import NoDevices
from vllmd.simengine.device import device_usage, make_device
from vllmd.sizes import GiB

MISMATCH = {"init": ["Driver/library version mismatch", 18]}
CONFIG = """
models:
  gpu: {{engine: sim, gpu_memory: 0.5, options: {{device_file: {gpu}, memory: 8GiB, quiet: true}}}}
  big: {{engine: sim, gpu_memory: 0.6, options: {{device_file: {gpu}, memory: 9GiB, quiet: true}}}}
  cpu:
    engine: command
    command: [{python}, -m, vllmd.simengine, --uds, "${{SOCKET}}", --model, cpu, --quiet]
    options: {{cpu: true}}
    env: {{PYTHONPATH: {root}}}
"""


class Machine:
    """Where the daemon runs: one GPU of 16 GiB, and what fails of it now."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gpu = folder, make_device(folder / "gpu", 16 * GiB)
        self._fault = folder / "fault"
        self.fails()

    def fails(self, **fault: Any) -> None:
        """From now on."""
        new = self.folder / "fault.new"
        new.write_text(json.dumps(fault))
        new.replace(self._fault)

    def environment(self) -> dict[str, str]:
        path = [str(REPOSITORY), str(REPOSITORY / "tests/gpu/rehearsal/nvml")]
        return {"GPU_CHECK_DEVICE": str(self.gpu), "GPU_CHECK_FAULT": str(self._fault), "PYTHONPATH": ":".join(path)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path)
    for name, value in machine.environment().items():
        monkeypatch.setenv(name, value)
    return machine


@contextlib.contextmanager
def daemon(here: Machine) -> Iterator[Site]:
    config = CONFIG.format(gpu=here.gpu, python=sys.executable, root=REPOSITORY)
    with running(here.folder, config) as site:
        yield site


def status(site: Site) -> dict[str, Any]:
    return site.operate("GET", "/admin/status")  # type: ignore[no-any-return]


def answers_in(act: Callable[[], object], limit: float) -> None:
    """It is not held up by what hangs."""
    began = time.monotonic()
    act()
    assert time.monotonic() - began < limit


def test_a_driver_that_fails_is_an_error_and_not_a_machine_without_gpus(here: Machine) -> None:
    """503 with cause and cure for who needs one, CPU models served, health not ok; and all is well once it answers."""
    here.fails(**MISMATCH)
    with daemon(here) as site:
        refused = site.chat("gpu")
        assert refused.status == 503 and "retry-after" in refused.headers
        assert "Driver/library version mismatch" in refused.error and "reboot" in refused.error
        assert site.chat("cpu").status == 200
        health = site.ask("GET", "/health")
        assert health.status == 503 and "the devices do not answer" in health.json["status"]
        assert site.ask("GET", "/health/ready").status == 200
        gpus = site.ask("GET", "/api/v1/gpus", admin=True)
        assert gpus.status == 503 and "mismatch" in gpus.error
        assert "mismatch" in status(site)["trouble"]
        assert site.log.count("the devices do not answer (models without") == 1  # once, not with each attempt
        here.fails()
        until(lambda: site.chat("gpu").status == 200)
        assert site.ask("GET", "/health").status == 200
        assert status(site)["trouble"] == ""
        assert status(site)["devices"][0]["promised"] == 8 * GiB  # sizes were reckoned anew: a share of 16 GiB
        second = site.ask("POST", "/admin/models/big/load", admin=True)
        assert second.status < 300
        until(lambda: site.line("big")["state"] == "running")
        assert site.line("gpu")["state"] != "running"  # it had to make room: not both onto one device


def test_a_driver_that_hangs_at_the_start_holds_up_nobody_who_needs_no_gpu(here: Machine) -> None:
    """Who needs one waits for the answer, which may still come."""
    here.fails(hang=True)
    with daemon(here) as site:
        answers_in(lambda: site.chat("cpu"), 5.0)
        answers_in(lambda: site.ask("GET", "/metrics"), 1.9)  # it took 2 s
        site.operate("POST", "/admin/models/gpu/load")
        assert site.line("gpu")["state"] == "stopped"
        here.fails()
        until(lambda: site.line("gpu")["state"] == "running")


def test_a_driver_that_hangs_later_leaves_running_engines_alone(here: Machine) -> None:
    """They answer; who would have to start is told, in a moment and not after a queue's patience."""
    with daemon(here) as site:
        assert site.chat("gpu").status == 200
        here.fails(hang=True)
        until(lambda: "a reading hangs" in status(site)["trouble"])
        answers_in(lambda: site.chat("gpu"), 2.0)
        answers_in(lambda: site.chat("cpu"), 5.0)
        answers_in(lambda: site.ask("GET", "/metrics"), 1.9)  # it took 2 s
        assert "a reading hangs" in site.chat("big").error
        assert site.ask("GET", "/health").status == 503
        here.fails()
        until(lambda: status(site)["trouble"] == "")
        assert site.ask("GET", "/health").status == 200
        assert site.line("gpu")["state"] == "running"


def test_a_device_with_ecc_errors_is_shown_avoided_and_left(here: Machine) -> None:
    """Its engine ends once drained; who comes waits, and is told for what."""
    with daemon(here) as site:
        assert site.chat("gpu").status == 200
        here.fails(ecc_errors=3)
        until(lambda: "3 uncorrectable ECC errors" in status(site)["devices"][0]["wedged"])
        until(lambda: site.line("gpu")["state"] == "stopped")
        site.operate("POST", "/admin/models/gpu/load")
        until(lambda: "device 0 is avoided: 3 uncorrectable" in site.line("gpu")["waiting_for"])
        here.fails()
        until(lambda: site.line("gpu")["state"] == "running")


def test_a_device_that_falls_off_the_bus_takes_its_engine_along_with_the_reason(here: Machine) -> None:
    """What runs there can only hang: it is ended, and the reason is in its line."""
    with daemon(here) as site:
        assert site.chat("gpu").status == 200
        here.fails(memory=["GPU is lost", 15])
        until(lambda: site.line("gpu")["state"] in ("stopped", "error"))
        assert "GPU is lost" in json.dumps(site.operate("GET", "/admin/decisions?model=gpu"))
        assert device_usage(here.gpu).processes == {}


def test_a_daemon_that_starts_while_the_driver_fails_adopts_what_runs(here: Machine) -> None:
    """The driver was upgraded, the daemon restarted: no healthy engine is ended for it, and later it is booked."""
    bench = Bench(NoDevices(""), Device(0, "0", 0), here.folder, Table(), time.monotonic() + 120)
    options = {"device_file": str(here.gpu), "memory": 8 * GiB, "quiet": True}
    models = {"gpu": {"engine": "sim", "gpu_memory": 0.5, "options": options}}
    with outliving(bench, "s", {"models": models}) as site:
        assert site.chat("gpu")[0] == 200
        pid = site.model("gpu")["pid"]
        here.fails(**MISMATCH)
        site.kill()
        site.start()
        assert "mismatch" in site.status()["trouble"]
        assert (site.model("gpu")["pid"], site.model("gpu")["state"]) == (pid, "running")
        assert site.chat("gpu")[0] == 200
        here.fails()
        until(lambda: [each["promised"] for each in site.status()["devices"]] == [8 * GiB])
        assert site.model("gpu")["pid"] == pid


def test_a_reload_changes_reserve_and_devices(here: Machine) -> None:
    """Not silently at the next start."""
    with daemon(here) as site:
        was = site.config.read_text()
        site.reconfigure(f"reserve: 3GiB\n{was}")
        until(lambda: [each["reserve"] for each in status(site)["devices"]] == [3 * GiB])
        site.reconfigure(f"devices: [{{memory: 8GiB}}, {{memory: 8GiB}}]\n{was}")
        until(lambda: [each["memory"] for each in status(site)["devices"]] == [8 * GiB] * 2)
        assert status(site)["source"].startswith("declared")
        site.reconfigure(was)
        until(lambda: [each["index"] for each in status(site)["devices"]] == [0])
        assert site.chat("gpu").status == 200


def test_the_daemon_ends_while_the_driver_hangs(here: Machine) -> None:
    """A stuck thread keeps no process from ending."""
    here.fails(hang=True)
    with daemon(here) as site:
        site.process.send_signal(signal.SIGTERM)
        assert site.process.wait(120) == 0
