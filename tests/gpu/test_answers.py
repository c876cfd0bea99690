"""Three answers: there are none, there are these, something is there that does not answer.

The table source x fault, over fake libraries and trees of /dev, /sys and /proc; ``tests/daemon/test_silent_devices.py``
has what the daemon makes of each answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.fake_nvml import (
    LOST,
    MISMATCH,
    NO_LIBRARY,
    NO_PERMISSION,
    NOT_LOADED,
    UNSUPPORTED,
    FakeNvml,
    GiB,
    Gpu,
    NVMLError,
)
from tests.gpu.trees import amd_card, fdinfo, intel_card, kfd_node, nvidia_card, write
from vllmd.config.types import Config, DeviceConfig
from vllmd.daemon.expectations import host_budget
from vllmd.gpu import Devices, Presence, environment, gpus, open_devices
from vllmd.gpu.nvml import NvmlDevices

A, B = "GPU-aaaa0000", "GPU-bbbb0000"


def asked(root: Path, nvml: Any = None, known: dict[str, int] | None = None, **env: str) -> Devices:
    """The answer on a machine whose files are under ``root``."""
    return open_devices(Config(reserve=GiB), env, nvml, Presence(root), known or {})


# -- NVIDIA ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [NO_LIBRARY, NOT_LOADED, ImportError("No module named 'pynvml'")])
def test_without_card_node_and_driver_there_are_none(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine for the CPU, be the library installed in its image or not: no error, nothing to mend."""
    if isinstance(error, ImportError):
        monkeypatch.setitem(sys.modules, "pynvml", None)
    devices = asked(tmp_path, None if isinstance(error, ImportError) else FakeNvml(broken=error))
    assert (devices.source, devices.trouble, gpus(devices.inventory())) == ("cpu", None, ())
    assert devices.note == "there is no GPU with a driver; engines run on the CPU"  # nothing to install


def test_a_card_without_any_driver_is_worth_a_word(tmp_path: Path) -> None:
    """It is none that could be used, and whoever expected it reads why."""
    nvidia_card(tmp_path)
    devices = asked(tmp_path, FakeNvml(broken=NO_LIBRARY))
    assert devices.trouble is None
    assert "an NVIDIA card at 0000:01:00.0 without its driver" in devices.note


@pytest.mark.parametrize(
    ("error", "nodes", "card", "remedy"),
    [
        (MISMATCH, True, True, "reboot"),
        (NOT_LOADED, False, True, "modprobe nvidia"),
        (NO_LIBRARY, True, True, "apt install libnvidia-ml1"),
        (NO_PERMISSION, True, True, "/dev/nvidiactl"),
        (NVMLError("Timeout", 10), True, True, "Xid"),
        (NVMLError("Unknown Error", 999), True, True, "dmesg"),
        (NVMLError("Unknown Error", 999), False, False, "dmesg"),
        (NVMLError("Driver/library version mismatch"), True, False, "reboot"),  # a release that tells no number
    ],
)
def test_what_is_there_and_fails_does_not_answer(
    tmp_path: Path, error: NVMLError, nodes: bool, card: bool, remedy: str
) -> None:
    """With NVML's own words, what speaks for a device, and what mends it."""
    if nodes:
        write(tmp_path, "dev/nvidiactl", "dev/nvidia0")
    if card:
        nvidia_card(tmp_path)
    devices = asked(tmp_path, FakeNvml(broken=error))
    assert devices.trouble
    assert (devices.source, devices.inventory(), devices.readable) == ("nvml", (), False)
    assert str(error).split("/", 1)[0].split()[0] in devices.trouble.why or "libnvidia-ml" in devices.trouble.why
    assert remedy in devices.trouble.remedy


def test_under_wsl_the_cure_is_windows(tmp_path: Path) -> None:
    """/dev/dxg is all that there is of the GPU."""
    write(tmp_path, "dev/dxg")
    devices = asked(tmp_path, FakeNvml(broken=NVMLError("Unknown Error", 999)))
    assert devices.trouble and "wsl --update" in devices.trouble.remedy


def test_a_driver_without_its_python_module_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The devices are there; that we cannot ask is not that there are none."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    write(tmp_path, "dev/nvidiactl")
    devices = asked(tmp_path)
    assert devices.trouble and "pip install nvidia-ml-py" in devices.trouble.remedy


def test_a_driver_that_tells_of_no_gpu_does_not_answer(tmp_path: Path) -> None:
    """Its nodes are there: the GPU fell off the bus before the driver took it."""
    write(tmp_path, "dev/nvidiactl", "dev/nvidia0")
    devices = asked(tmp_path, FakeNvml())
    assert devices.trouble and "lists no GPU" in devices.trouble.why


def test_hidden_on_purpose_is_none(tmp_path: Path) -> None:
    """CUDA_VISIBLE_DEVICES= is how somebody says: engines run on the CPU."""
    write(tmp_path, "dev/nvidiactl", "dev/nvidia0")
    devices = asked(tmp_path, FakeNvml(Gpu(A)), CUDA_VISIBLE_DEVICES="")
    assert (devices.source, devices.trouble) == ("cpu", None)


def test_all_devices_failing_is_no_answer_and_one_failing_hides_no_other(tmp_path: Path) -> None:
    """Each is looked at on its own."""
    broken = Gpu(A, refuses={"memory": LOST})
    devices = asked(tmp_path, FakeNvml(broken, Gpu(B)))
    assert [device.index for device in devices.inventory()] == [1]
    assert "it fell off the bus" in devices.note
    devices = asked(tmp_path, FakeNvml(broken))
    assert devices.trouble and "GPU is lost" in devices.trouble.why


def test_declared_devices_are_not_asked_for(tmp_path: Path) -> None:
    """Who declares them knows better, whatever NVML would have said."""
    devices = open_devices(Config(devices=(DeviceConfig(GiB),)), {}, FakeNvml(broken=MISMATCH), Presence(tmp_path))
    assert (devices.source, devices.trouble) == ("declared", None)


def test_unified_memory_is_the_hosts(tmp_path: Path) -> None:
    """GB10 and Jetson: NVML has no figures for memory; the kernel's are taken, and processes as NVML has them."""
    write(tmp_path, **{"proc/meminfo": f"MemTotal: {128 << 20} kB\nMemFree: 1 kB\nMemAvailable: {100 << 20} kB\n"})
    gpu = Gpu(A, name="GB10", computing={7: 20 * GiB}, refuses={"memory": UNSUPPORTED, "power": UNSUPPORTED})
    devices = NvmlDevices(GiB, {}, FakeNvml(gpu), tmp_path / "proc", Presence(tmp_path))
    assert devices.inventory()[0].memory == 128 * GiB
    budgets = [host_budget(Config(host_memory=size), devices.inventory()) for size in (None, 5 * GiB)]
    assert budgets == [0, 5 * GiB]  # sleeping in the host's memory would free nothing
    sample = devices.sample().devices[0]
    assert (sample.used, sample.free, sample.processes, sample.power) == (28 * GiB, 100 * GiB, {7: 20 * GiB}, None)
    assert "shares the host's memory" in devices.note


def test_mps_clients_are_processes_too(tmp_path: Path) -> None:
    """Under MPS the list of computing processes has the server; its clients are in a list of their own."""
    devices = asked(tmp_path, FakeNvml(Gpu(A, used=3 * GiB, computing={1: GiB}, sharing={7: 2 * GiB})))
    assert devices.sample().devices[0].processes == {1: GiB, 7: 2 * GiB}


def test_ill_and_throttled_are_told(tmp_path: Path) -> None:
    """ECC errors and rows to be remapped make a device unfit; that it is slowed down is only shown."""
    ecc, rows, hot = Gpu(A, errors=2), Gpu(B, rows=(0, 1, 1, 0)), Gpu("GPU-c", reasons=0x40 | 0x1, heat=88)
    sample = asked(tmp_path, FakeNvml(ecc, rows, hot)).sample()
    assert sample.ill.keys() == {0, 1}
    assert "2 uncorrectable ECC errors" in sample.ill[0] and "nvidia-smi --gpu-reset" in sample.ill[1]
    assert (sample.devices[2].throttled, sample.devices[2].temperature) == ("hardware thermal slowdown", 88.0)
    assert not sample.lost


def test_topology_is_told(tmp_path: Path) -> None:
    """Which devices NVLink joins, and the NUMA node of each."""
    for number, node in ((1, 0), (2, 1)):
        write(tmp_path, **{f"sys/bus/pci/devices/0000:0{number}:00.0/numa_node": f"{node}\n"})
    gpus = (Gpu(A, address="00000000:01:00.0", linked=frozenset({B})), Gpu(B, address="00000000:02:00.0"))
    first, second = asked(tmp_path, FakeNvml(*gpus)).inventory()
    assert (first.links, first.node, second.links, second.node) == (frozenset({1}), 0, frozenset(), 1)


# -- numbers and ids ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ((Gpu(A), Gpu(B)), "0,1"),
        ((Gpu(A), Gpu(B, capability=(3, 0))), f"{A},{B}"),  # CUDA may leave an old one out, and count differently
        ((Gpu(A, refuses={"capability": "x"}), Gpu(B)), f"{A},{B}"),
        ((Gpu(A, slices=[Gpu("MIG-1"), Gpu("MIG-2")]),), "MIG-1,MIG-2"),
    ],
)
def test_numbers_where_they_are_exact_and_ids_where_not(tmp_path: Path, gpus: tuple[Gpu, ...], said: str) -> None:
    """vLLM up to 0.23 does int() on them; a number that means another card would be worse than none."""
    found = environment(asked(tmp_path, FakeNvml(*gpus)).inventory())
    assert found == {"CUDA_VISIBLE_DEVICES": said, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_a_device_keeps_its_index_when_others_come(tmp_path: Path) -> None:
    """Engines hold memory by it, and users have written it down."""
    known = {device.id: device.index for device in asked(tmp_path, FakeNvml(Gpu(B))).inventory()}
    devices = asked(tmp_path, FakeNvml(Gpu(A), Gpu(B)), known)
    assert {device.id: (device.index, device.number) for device in devices.inventory()} == {B: (0, 1), A: (2, 0)}
    assert devices.sample().devices.keys() == {0, 2}


# -- AMD and Intel -----------------------------------------------------------------------


def test_amd_is_read_from_sysfs(tmp_path: Path) -> None:
    """Memory, power and use by the driver's files, processes by its compute driver's, for everybody to read."""
    card = amd_card(tmp_path, 0, "0000:03:00.0", total=192 * GiB, used=21 * GiB, unique="7a1b", busy=40, watts=300)
    kfd_node(tmp_path, 1, gpu=51_000, bus=3, held={4711: 20 * GiB})
    devices = asked(tmp_path, FakeNvml(broken=NO_LIBRARY))
    device = devices.inventory()[0]
    assert (devices.source, device.id, device.memory, device.runtime) == ("amdgpu", "GPU-7a1b", 192 * GiB, "hip")
    sample = devices.sample().devices[0]
    assert (sample.used, sample.processes, sample.power) == (21 * GiB, {4711: 20 * GiB}, 300.0)
    assert environment(devices.inventory()) == {"HIP_VISIBLE_DEVICES": "0"}
    (card / "device/mem_info_vram_used").unlink()
    assert devices.sample().devices[0].used == 20 * GiB  # what cannot be read is what the processes hold


def test_the_cpus_own_graphics_is_no_device(tmp_path: Path) -> None:
    """A desktop's 512 MiB beside the real card."""
    amd_card(tmp_path, 0, "0000:03:00.0", total=GiB // 2, used=0)
    amd_card(tmp_path, 1, "0000:07:00.0", total=24 * GiB, used=GiB)
    devices = asked(tmp_path, FakeNvml(broken=NO_LIBRARY))
    assert [(device.index, device.memory) for device in devices.inventory()] == [(1, 24 * GiB)]
    assert "0000:03:00.0 is left out" in devices.note


def test_an_amd_card_that_goes_away_is_lost_and_its_neighbour_read(tmp_path: Path) -> None:
    """A link of its folder leads nowhere any more."""
    first = amd_card(tmp_path, 0, "0000:03:00.0", total=24 * GiB, used=GiB)
    amd_card(tmp_path, 1, "0000:07:00.0", total=24 * GiB, used=GiB)
    devices = asked(tmp_path, FakeNvml(broken=NO_LIBRARY))
    (first / "device").unlink()
    sample = devices.sample()
    assert sample.devices.keys() == {1} and sample.lost.keys() == sample.failed.keys() == {0}


def test_an_amd_card_that_cannot_be_read_does_not_answer(tmp_path: Path) -> None:
    """Its file is there; what reading it gives is no number that could be had."""
    card = amd_card(tmp_path, 0, "0000:03:00.0", total=24 * GiB, used=0)
    (card / "device/mem_info_vram_total").unlink()
    (card / "device/mem_info_vram_total").mkdir()  # EISDIR, even for root
    devices = asked(tmp_path, FakeNvml(broken=NO_LIBRARY))
    assert devices.trouble and "0000:03:00.0 cannot be read" in devices.trouble.why


@pytest.mark.parametrize("driver", ["xe", "i915"])
def test_intel_is_read_from_sysfs_and_fdinfo(tmp_path: Path, driver: str) -> None:
    """xe tells what there is, i915 what is free; each process tells its own in its fdinfo, once per client."""
    intel_card(tmp_path, 0, "0000:04:00.0", driver, total=48 * GiB, free=40 * GiB if driver == "i915" else None)
    fdinfo(tmp_path, 77, "0000:04:00.0", client=5, resident=6 * GiB, times=2)
    devices = asked(tmp_path, FakeNvml(broken=NO_LIBRARY))
    device = devices.inventory()[0]
    assert (devices.source, device.memory, device.runtime) == ("intel", 48 * GiB, "xpu")
    sample = devices.sample().devices[0]
    assert sample.processes == {77: 6 * GiB}
    assert sample.used == (8 * GiB if driver == "i915" else 6 * GiB)
    assert environment(devices.inventory()) == {"ZE_AFFINITY_MASK": "0", "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1"}


def test_intels_integrated_graphics_is_none(tmp_path: Path) -> None:
    """Nearly every office machine has one, and no memory of its own in it."""
    intel_card(tmp_path, 0, "0000:00:02.0", "i915", total=None)
    devices = asked(tmp_path, FakeNvml(broken=NO_LIBRARY))
    assert (devices.source, devices.trouble) == ("cpu", None)


def test_nvidia_goes_before_the_others(tmp_path: Path) -> None:
    """And an NVIDIA driver that does not answer is not hidden by another maker's card."""
    amd_card(tmp_path, 0, "0000:03:00.0", total=24 * GiB, used=0)
    assert asked(tmp_path, FakeNvml(Gpu(A))).source == "nvml"
    write(tmp_path, "dev/nvidiactl")
    assert asked(tmp_path, FakeNvml(broken=MISMATCH)).trouble
