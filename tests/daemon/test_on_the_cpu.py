"""A machine without a GPU: the CPU is a device, whose memory is what control groups leave of the host's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.world import World
from tests.gpu.trees import write
from vllmd.core.commands import Admit, StartEngine, StopEngine
from vllmd.core.events import DevicesChanged, EngineStopped, MemorySampled, RequestFinished
from vllmd.core.types import Device, Footprint, ModelSpec, Placement, ReplicaSpec
from vllmd.daemon.specs import on_cpu
from vllmd.gpu.cpu import CpuDevice
from vllmd.place import available_memory, host_memory
from vllmd.sizes import GiB

CPU = Device(0, "cpu", 16 * GiB, GiB, "CPU", "cpu")


def model(name: str, awake: int, host: int = 0, count: int = 1) -> ModelSpec:
    """One as it is expected to be without a GPU: the size of its engine, and all that takes of the host."""
    footprint = Footprint(awake * GiB, awake * GiB)
    spec = ReplicaSpec(name, footprint, device_count=count, devices=(3,), host_running=host * GiB)
    return ModelSpec(name, (on_cpu(spec, CPU),))


def test_what_does_not_fit_beside_the_others_takes_turns_with_them() -> None:
    """It was loaded at once, and the kernel killed one of them."""
    w = World([model("a", 8), model("b", 6, host=7), model("c", 8)], [CPU])
    assert w.ask("r1", "a") == [StartEngine("a", Placement((0,)), 8 * GiB)]
    w.answer("a")
    assert w.ask("r2", "b") == [StartEngine("b", Placement((0,)), 7 * GiB)]
    w.answer("b")
    w.do(RequestFinished("r1"))
    (stop,) = w.ask("r3", "c")
    assert isinstance(stop, StopEngine) and stop.replica == "a"
    assert w.do(EngineStopped("a")) == [StartEngine("c", Placement((0,)), 8 * GiB)]


def test_one_that_is_larger_than_all_memory_has_it_to_itself() -> None:
    """A file that is mapped may be larger: slow is better than refused."""
    w = World([model("huge", 60), model("far", 0, count=0)], [CPU])
    assert w.ask("r1", "huge") == [StartEngine("huge", Placement((0,)), 15 * GiB)]
    assert isinstance(w.ask("r2", "far")[0], StartEngine)  # it runs elsewhere, and takes nothing here


@pytest.mark.parametrize("size", [4, 60])
def test_what_others_hold_keeps_no_model_from_running_alone(size: int) -> None:
    """The machine's own programs hold some at all times; on a GPU one would wait for them, and here for ever."""
    w = World([model("a", size), model("small", 2)], [CPU])
    w.do(MemorySampled({0: 14 * GiB}, {}))
    assert isinstance(w.ask("r1", "a")[0], StartEngine)


def test_what_others_hold_counts_beside_it() -> None:
    """Two that would fit the memory together do not fit what others leave of it: they take turns."""
    w = World([model("a", 6), model("b", 6)], [CPU])
    w.do(MemorySampled({0: 5 * GiB}, {}))
    w.ask("r1", "a")
    w.answer("a")
    w.do(RequestFinished("r1"))
    (stop,) = w.ask("r2", "b")
    assert isinstance(stop, StopEngine) and stop.replica == "a"


def test_a_gpu_that_comes_late_is_none_that_engines_run_on_already() -> None:
    """They have its number; they end, and start where they belong."""
    w = World([model("a", 8)], [CPU])
    w.ask("r1", "a")
    assert Admit("r1", "a") in w.answer("a")
    gpu = Device(0, "GPU-a", 80 * GiB, GiB, "H100", "cuda", 0)
    assert w.do(DevicesChanged((gpu,))) == []
    (stop,) = w.do(RequestFinished("r1"))
    assert isinstance(stop, StopEngine) and "device 0 is another one now: H100" in stop.reason


def test_a_device_that_was_declared_and_is_asked_for_now_stays_the_same() -> None:
    """A reload with another word for it ends no engine."""
    gpu = Device(0, "GPU-a", 80 * GiB, GiB, "H100", "cuda", 0)
    w = World([ModelSpec("a", (ReplicaSpec("a", Footprint(8 * GiB, 8 * GiB)),))], [Device(0, "0", 80 * GiB, GiB)])
    w.ask("r1", "a")
    w.answer("a")
    w.do(RequestFinished("r1"))
    assert w.do(DevicesChanged((gpu,))) == []


OWN, TOP = {"proc/self/cgroup": "0::/\n"}, "sys/fs/cgroup"
MEMINFO = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {3 << 20} kB\n"}
CONTAINER = {
    f"{TOP}/memory.max": f"{4 * GiB}\n",
    f"{TOP}/memory.current": f"{3 * GiB}\n",
    f"{TOP}/memory.stat": f"anon {GiB}\nactive_file {GiB}\ninactive_file {GiB // 2}\n",
}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MEMINFO, 3 * GiB),
        ({**OWN, **CONTAINER}, 5 * GiB // 2),  # the cache of files is the first to go
        ({**OWN, **MEMINFO, **CONTAINER}, 5 * GiB // 2),
    ],
)
def test_free_memory_is_what_the_machine_and_its_groups_leave(tmp_path: Path, files: dict[str, str], free: int) -> None:
    """In a container the machine's own figures say nothing."""
    write(tmp_path, **files)
    assert available_memory(tmp_path) == free


def test_the_cpu_is_read_and_never_fails(tmp_path: Path) -> None:
    """What is in use beside what the ledger has for engines is others'; without figures nothing is said."""
    write(tmp_path, **OWN)
    cpu = CpuDevice("no GPU", GiB // 2, tmp_path)
    (device,) = cpu.inventory()
    assert (device.memory, device.runtime) == (host_memory(tmp_path), "cpu")
    assert device.reserve == max(GiB // 2, device.memory // 20)
    assert cpu.sample().devices == {} and not cpu.sample().silent
    assert not device.read, "or who waits until others leave it free would wait for ever"
    write(tmp_path, **CONTAINER)
    cpu = CpuDevice("no GPU", GiB // 2, tmp_path)
    assert cpu.inventory()[0].memory == 4 * GiB and cpu.inventory()[0].read
    sample = cpu.sample().devices[0]
    assert (sample.used, sample.free, sample.hides_processes) == (3 * GiB // 2, 5 * GiB // 2, True)
