"""Before the machine sleeps engines leave the devices, and those that are to be there come back: a real daemon."""

from __future__ import annotations

import time
from pathlib import Path

from tests.admin.site import running, until
from vllmd.daemon.suspension import SleptTime
from vllmd.simengine.device import device_usage, make_device
from vllmd.sizes import GiB


def test_engines_leave_and_the_pinned_one_comes_back(tmp_path: Path) -> None:
    """Memory is free while the machine sleeps; who asks then waits, and reads for what."""
    gpu = make_device(tmp_path / "gpu", 16 * GiB)
    options = f"options: {{device_file: {gpu}, memory: 4GiB, quiet: true}}"
    config = f"""
devices: [{{memory: 16GiB, file: {gpu}}}, {{memory: 16GiB}}]
models:
  kept: {{engine: sim, pin: true, devices: [0], {options}}}
  other: {{engine: sim, devices: [0], {options}}}
"""
    with running(tmp_path, config) as site:
        for model in ("kept", "other"):
            assert site.chat(model).status == 200
        site.operate("POST", "/admin/devices/1/drain")
        told = site.operate("POST", "/admin/suspend", {"suspended": True})
        assert (told["devices"], sorted(told["stopped"]), told["left"]) == ([0], ["kept", "other"], [])
        assert device_usage(gpu).processes == {}
        site.operate("POST", "/admin/models/other/load")
        until(lambda: "the machine is about to sleep" in site.line("other")["waiting_for"])
        assert site.operate("POST", "/admin/suspend", {"suspended": False})["devices"] == [0]
        until(lambda: site.line("kept")["state"] == site.line("other")["state"] == "running")
        wedged = [device["wedged"] for device in site.operate("GET", "/admin/status")["devices"]]
        assert wedged == ["", "an operator drained it"]  # what he took out stays out


def test_how_long_the_machine_slept_is_the_difference_of_two_clocks() -> None:
    """Each sleep once; that the clocks are not read at the same moment is none."""
    clocks = {time.CLOCK_MONOTONIC: 10.0, time.CLOCK_BOOTTIME: 15.0}
    slept = SleptTime(clocks.__getitem__)
    clocks.update({time.CLOCK_MONOTONIC: 20.0, time.CLOCK_BOOTTIME: 25.2})
    assert slept.passed() == 0.0
    clocks.update({time.CLOCK_MONOTONIC: 30.0, time.CLOCK_BOOTTIME: 3635.2})
    assert slept.passed() == 3600.0
    assert slept.passed() == 0.0
