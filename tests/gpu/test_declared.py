"""Declared devices: what the configuration says, read through a stand-in's device file where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.gpu.fake_nvml import FakeNvml, GiB, Gpu
from vllmd.config.types import Config, DeviceConfig
from vllmd.gpu import Sample, open_devices, present
from vllmd.simengine.device import FakeGpu, make_device


def test_declared_devices_win_over_nvml() -> None:
    """A rehearsal on a machine with GPUs must not touch them."""
    config = Config(devices=(DeviceConfig(8 * GiB), DeviceConfig(4 * GiB)), reserve=1)
    devices = open_devices(config, {}, FakeNvml(Gpu("GPU-a")))
    assert devices.source == "declared"
    found = [(device.index, device.id, device.memory, device.reserve) for device in devices.inventory()]
    assert found == [(0, "0", 8 * GiB, 1), (1, "1", 4 * GiB, 1)]


def test_an_empty_list_means_no_devices() -> None:
    """``devices: []`` keeps vllmd off the GPUs."""
    devices = open_devices(Config(devices=()), {}, FakeNvml(Gpu("GPU-a")))
    assert (devices.source, devices.inventory()) == ("none", ())


def test_without_a_file_there_is_nothing_to_read() -> None:
    """Then only the ledger knows; an empty sample is not a claim that nothing is used."""
    devices = open_devices(Config(devices=(DeviceConfig(8 * GiB),)), {})
    assert (devices.readable, devices.sample()) == (False, Sample())


def test_a_device_file_is_read_like_a_device(tmp_path: Path) -> None:
    """Rehearsals see exact memory, by process."""
    path = make_device(tmp_path / "gpu0", 8 * GiB)
    FakeGpu(path).hold(3 * GiB)
    devices = open_devices(Config(devices=(DeviceConfig(8 * GiB, file=path),)), {})
    device = devices.sample().devices[0]
    assert (device.total, device.used, device.free) == (8 * GiB, 3 * GiB, 5 * GiB)
    assert device.processes == {os.getpid(): 3 * GiB}


def test_a_broken_device_file_fails_alone(tmp_path: Path) -> None:
    """A torn or contradicting file is a failed device, never an exception."""
    torn, other = tmp_path / "torn", make_device(tmp_path / "other", 4 * GiB)
    torn.write_text('{"mem')
    files = (torn, other, make_device(tmp_path / "good", 8 * GiB))
    sample = open_devices(Config(devices=tuple(DeviceConfig(8 * GiB, file=file) for file in files)), {}).sample()
    assert set(sample.devices) == {2}
    assert "torn" in sample.failed[0]
    assert "its size changed from 8 GiB to 4 GiB" in sample.failed[1]


def test_a_device_file_that_nobody_made_yet_is_an_empty_device(tmp_path: Path) -> None:
    """The first stand-in that holds something makes it; until then the device is free, not broken."""
    sample = open_devices(Config(devices=(DeviceConfig(8 * GiB, file=tmp_path / "later"),)), {}).sample()
    assert (sample.failed, sample.devices[0].free) == ({}, 8 * GiB)


def test_what_belongs_to_nobody_is_in_use(tmp_path: Path) -> None:
    """As on a device whose driver did not take back what a dead process held."""
    path = make_device(tmp_path / "gpu", 8 * GiB)
    FakeGpu(path).hold(3 * GiB)
    FakeGpu(path).lose(2 * GiB)
    device = open_devices(Config(devices=(DeviceConfig(8 * GiB, file=path),)), {}).sample().devices[0]
    assert (device.used, device.ownerless) == (5 * GiB, 2 * GiB)


def test_the_variables_of_whoever_asks_hide_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell's CUDA_VISIBLE_DEVICES is not the daemon's: vllmctl assign would refuse a device that is there."""
    two = FakeNvml(Gpu("GPU-a"), Gpu("GPU-b"))
    monkeypatch.setattr(present, "open_devices", lambda config, env: open_devices(config, env, two))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert [device.index for device in present.present(Config())] == [0, 1]
