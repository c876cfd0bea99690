"""The NVML probe against a fake ``pynvml``: nothing that one field or device does may hurt the rest."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.gpu.fake_nvml import NOT_AVAILABLE, FakeNvml, GiB, Gpu
from vllmd.config.types import Config
from vllmd.core.types import Device
from vllmd.gpu import Sample, gpu_infos, gpus, open_devices
from vllmd.gpu.nvml import NvmlDevices

A, B = "GPU-aaaa0000", "GPU-bbbb0000"


def opened(*gpus: Gpu, proc: Path = Path("/proc"), **env: str) -> NvmlDevices:
    return NvmlDevices(512 << 20, env, FakeNvml(*gpus), proc)


def in_a_container(tmp_path: Path) -> Path:
    """A /proc whose pid namespace is not the machine's first."""
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").touch()
    return tmp_path


def test_inventory_has_uuid_size_reserve_and_name() -> None:
    """Engines are pinned by UUID, so the inventory carries it and not just a number."""
    devices = opened(Gpu(A, total=24 * GiB, name="Fake L4")).inventory()
    assert devices == (Device(0, A, 24 * GiB, 512 << 20, "Fake L4", "cuda", 0, read=True),)


def test_sample_has_every_figure() -> None:
    """Total, used, free, processes, power and utilisation are what NVML said."""
    gpu = Gpu(A, used=11 * GiB, computing={7: 10 * GiB}, watts=123.4, busy=55)
    device = opened(gpu).sample().devices[0]
    assert (device.total, device.used, device.free) == (80 * GiB, 11 * GiB, 69 * GiB)
    assert (device.processes, device.ownerless) == ({7: 10 * GiB}, 1 * GiB)
    assert (device.power, device.utilisation, device.name) == (123.4, 55.0, "Fake H100")


@pytest.mark.parametrize("what", ["power", "busy", "drawing", "name"])
def test_one_unreadable_field_costs_only_itself(what: str) -> None:
    """Power is not supported on many cards; the memory must be read all the same."""
    gpu = Gpu(A, used=2 * GiB, computing={7: GiB}, refuses={what: "Not Supported"})
    sample = opened(gpu).sample()
    assert sample.failed == {}
    assert (sample.devices[0].used, sample.devices[0].processes) == (2 * GiB, {7: GiB})
    assert (sample.devices[0].power is None) == (what == "power")


def test_a_device_that_cannot_be_read_costs_only_itself() -> None:
    """A GPU that fell off the bus is reported with NVML's words and what to do, and its neighbour still read."""
    bad = Gpu(A)
    devices = opened(bad, Gpu(B, used=GiB))
    bad.refuses["memory"] = "GPU is lost"
    sample = devices.sample()
    assert sample.failed.keys() == sample.lost.keys() == {0}
    assert sample.failed[0].startswith("NVML: GPU is lost; it fell off the bus")
    assert sample.devices[1].used == GiB


@pytest.mark.parametrize(
    ("total", "used", "says"),
    [
        (80 * GiB, 90 * GiB, "impossible"),
        (80 * GiB, -GiB, "impossible"),
        (0, 0, "impossible"),
        (40 * GiB, GiB, "its size changed from 80 GiB to 40 GiB"),
    ],
)
def test_figures_that_cannot_be_true_are_refused(total: int, used: int, says: str) -> None:
    """NVML that lies midway must not make the ledger promise memory that is not there."""
    gpu = Gpu(A)
    devices = opened(gpu)
    gpu.total, gpu.used = total, used
    sample = devices.sample()
    assert sample.devices == {}
    assert says in sample.failed[0]


def test_it_recovers_after_the_driver_was_reloaded() -> None:
    """When every device failed, the library is opened anew and the devices found again by UUID, in any order."""
    first, second = Gpu(A, used=GiB), Gpu(B, used=2 * GiB)
    nvml = FakeNvml(first, second)
    devices = NvmlDevices(0, {}, nvml)
    nvml.inits = 0  # the driver went away
    assert set(devices.sample().failed) == {0, 1}
    nvml.gpus.reverse()
    assert {index: device.used for index, device in devices.sample().devices.items()} == {0: GiB, 1: 2 * GiB}


def test_processes_of_unknown_or_absurd_size_are_kept_without_one() -> None:
    """NVML_VALUE_NOT_AVAILABLE comes as None or as 2**64-1; neither is a size."""
    gpu = Gpu(A, used=5 * GiB, computing={1: None, 2: NOT_AVAILABLE, 3: GiB}, drawing={4: 81 * GiB})
    device = opened(gpu).sample().devices[0]
    assert (device.processes, device.unsized) == ({3: GiB}, {1, 2, 4})


def test_a_process_that_computes_and_draws_counts_once() -> None:
    """It is in both of NVML's lists, with the same memory."""
    device = opened(Gpu(A, used=GiB, computing={1: GiB}, drawing={1: GiB, 2: None, 1_000: None})).sample().devices[0]
    assert (device.processes, device.unsized) == ({1: GiB}, {2, 1000})


def test_in_a_container_an_empty_process_list_means_nothing(tmp_path: Path) -> None:
    """The driver shows no processes of another pid namespace; that must not be read as: nobody of ours is there."""
    proc = in_a_container(tmp_path)
    assert opened(Gpu(A, used=GiB), proc=proc).sample().devices[0].hides_processes
    assert not opened(Gpu(A, used=GiB, computing={1: GiB}), proc=proc).sample().devices[0].hides_processes
    assert not opened(Gpu(A), proc=proc).sample().devices[0].hides_processes


def test_mig_slices_are_devices_of_their_own() -> None:
    """A GPU in MIG mode runs nothing itself; CUDA_VISIBLE_DEVICES takes the slices' UUIDs."""
    slices = [Gpu("MIG-1", total=20 * GiB), Gpu("MIG-2", total=20 * GiB)]
    devices = opened(Gpu(A, slices=slices), Gpu(B))
    assert [(device.index, device.id) for device in devices.inventory()] == [(0, "MIG-1"), (1, "MIG-2"), (2, B)]
    assert "GPU 0 is in MIG mode: its 2 slices are devices 0 and on" in devices.notes
    assert devices.sample().devices[1].total == 20 * GiB


def test_a_device_that_cannot_be_opened_does_not_shift_the_others_numbers() -> None:
    """``devices: [1]`` must mean nvidia-smi's 1, also on the day that 0 is broken."""
    devices = opened(Gpu(A, refuses={"handle": "Unknown Error"}), Gpu(B))
    assert [device.index for device in devices.inventory()] == [1]
    assert "GPU 0 is left out: NVML: Unknown Error" in devices.notes


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ("0,1", [0, 1]),
        ("1", [1]),
        (B, [1]),
        ("GPU-b", [1]),
        ("GPU-", []),  # fits both
        ("1,7,0", [1]),  # CUDA stops at the first that is none
        ("0,0", [0]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_respected(value: str, left: list[int]) -> None:
    """What the administrator hid from the daemon it must not hand to engines."""
    devices = opened(Gpu(A), Gpu(B), CUDA_VISIBLE_DEVICES=value)
    assert [device.index for device in devices.inventory()] == left
    assert any("CUDA_VISIBLE_DEVICES" in note for note in devices.notes)


def test_gpu_infos_have_percent_watts_and_names() -> None:
    """The figures of ``GET /api/v1/gpus``: per cent, watts, MiB, and the process's name."""
    me = os.getpid()
    gpu = Gpu(A, used=20 * GiB, computing={me: 3 * GiB, 999_999_999: None}, watts=150.74)
    info = asdict(gpu_infos(opened(gpu).sample())[0])
    assert (info["id"], info["memory_usage"], info["power_draw"]) == (0, 25.0, 150.7)
    mine = {"pid": me, "name": Path("/proc/self/comm").read_text().strip(), "gpu_memory_usage": 3072}
    assert list(info["processes"]) == [mine, {"pid": 999_999_999, "name": "", "gpu_memory_usage": None}]
    assert gpu_infos(Sample()) == []


@pytest.mark.parametrize(
    ("nvml", "says"),
    [
        (FakeNvml(broken="NVML Shared Library Not Found"), "there is no GPU with a driver"),
        (FakeNvml(), "no GPU is attached"),
    ],
)
def test_without_a_usable_gpu_it_says_why(nvml: FakeNvml, says: str) -> None:
    """A daemon on a CPU-only machine starts, and an administrator who expected a GPU reads the reason."""
    devices = open_devices(Config(), {}, nvml)
    assert (devices.source, gpus(devices.inventory())) == ("cpu", ())
    assert says in devices.note
    assert "engines run on the CPU" in devices.note


def test_with_a_gpu_the_source_is_nvml() -> None:
    """The source and the driver are said, for ``vllmctl info``."""
    devices = open_devices(Config(), {}, FakeNvml(Gpu(A)))
    assert (devices.source, devices.note, devices.readable) == ("nvml", "NVIDIA driver 550.1", True)
