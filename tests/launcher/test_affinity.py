"""Where an engine computes and has its memory: on its devices' NUMA node, as far as the kernel lets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.fake_nvml import FakeNvml, Gpu
from tests.gpu.trees import write
from vllmd.config.types import Config, ModelConfig
from vllmd.core.types import Device
from vllmd.daemon.launch_planner import near_cpus
from vllmd.gpu import Presence, open_devices
from vllmd.launcher.protocol import ProtocolError, StartOrder
from vllmd.sizes import GiB

LOOK = """
import os, sys
from vllmd.launcher.affinity import set_affinity
set_affinity([int(word) for word in sys.argv[2:]], int(sys.argv[1]))
print(sorted(os.sched_getaffinity(0)), open("/proc/self/numa_maps").readline().split()[1])
"""


def settled(node: int, *cpus: int) -> list[str]:
    """Where a process is that asked for these, and which policy its memory has."""
    done = subprocess.run([sys.executable, "-c", LOOK, str(node), *map(str, cpus)], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])  # fmt: skip
    return done.stdout.rsplit(maxsplit=1)


@pytest.mark.skipif(not os.path.exists("/proc/self/numa_maps"), reason="a kernel without NUMA")
def test_a_process_is_put_onto_cpus_and_prefers_a_node() -> None:
    """What the kernel refuses leaves it where it was: no engine fails for that."""
    here = sorted(os.sched_getaffinity(0))
    assert settled(0, here[-1]) == [str([here[-1]]), "prefer:0"]
    assert settled(-1) == [str(here), "default"]
    assert settled(1023, 8191) == [str(here), "default"]  # there are none such


NODES = {"sys/devices/system/node/node0/cpulist": "0-3,8-11\n", "sys/devices/system/node/node1/cpulist": "4-7\n"}
FIRST, SECOND = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7)


def test_devices_know_the_cpus_of_their_node_where_there_is_more_than_one(tmp_path: Path) -> None:
    """A node that has memory alone is none that a process could be put on."""
    gpu = FakeNvml(Gpu("GPU-a", address="00000000:01:00.0"))
    write(tmp_path, **{"sys/bus/pci/devices/0000:01:00.0/numa_node": "1\n"})
    for files, cpus in (
        ({"sys/devices/system/node/node1/cpulist": "0-7\n", "sys/devices/system/node/node2/cpulist": "\n"}, ()),
        (NODES, SECOND),
    ):
        write(tmp_path, **files)
        (device,) = open_devices(Config(reserve=GiB), {}, gpu, Presence(tmp_path)).inventory()
        assert (device.node, device.cpus) == (1, cpus)


def test_an_engine_is_near_its_devices_where_these_are_near_each_other() -> None:
    """One that spans nodes is left where the scheduler puts it; so is one whose model does not want it."""
    gpus = [
        Device(i, str(i), GiB, node=node, cpus=cpus)
        for i, (node, cpus) in enumerate([(0, FIRST), (0, FIRST), (1, SECOND)])
    ]
    model = ModelConfig("m")
    assert near_cpus(model, gpus[:2]) == FIRST
    assert near_cpus(model, gpus[1:]) == ()
    assert near_cpus(model, [Device(0, "0", GiB)]) == ()
    assert near_cpus(ModelConfig("m", numa=False), gpus[:2]) == ()
    assert near_cpus(model, []) == ()


def test_an_order_names_cpus_that_there_may_be() -> None:
    """The launcher is root and believes nothing."""
    assert StartOrder("a", ("true",), cpus=SECOND, node=1).cpus == SECOND
    for wrong in ({"cpus": (-1,)}, {"cpus": (8192,)}, {"cpus": (0,) * 9000}, {"node": -2}, {"node": 1024}):
        with pytest.raises(ProtocolError):
            StartOrder("a", ("true",), **wrong)  # type: ignore[arg-type]
