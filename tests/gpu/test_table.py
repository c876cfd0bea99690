"""Source x fault: what each source of devices answers where it is absent, fails, hangs, comes late or goes away.

What a daemon makes of each answer does not depend on the source (``tests/daemon/test_silent_devices.py``); here every
source is shown to give the answer. docs/gpus.md has the table.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.fake_amdsmi import Card, FakeAmdSmi
from tests.gpu.fake_nvml import LOST, MISMATCH, NO_LIBRARY, FakeNvml, Gpu
from tests.gpu.trees import amd_card, intel_card, kfd_node, write
from vllmd.config.types import Config, DeviceConfig
from vllmd.daemon import device_watch, memory
from vllmd.daemon.device_watch import DeviceWatch
from vllmd.daemon.memory import Memory
from vllmd.gpu import Devices, Presence, environment, gpus, open_devices
from vllmd.simengine.device import make_device
from vllmd.sizes import GiB

FIRST, SECOND = "0000:03:00.0", "0000:07:00.0"


class Machine:
    """Two devices of 24 GiB of one source, and the ways in which they fail."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self, known: dict[str, int] | None = None) -> Devices:
        """What the daemon asks."""
        return open_devices(Config(reserve=GiB), {}, self.nvml(), Presence(self.root), known or {}, self.smi())

    def nvml(self) -> Any:
        return FakeNvml(broken=NO_LIBRARY)

    def smi(self) -> Any:
        return FakeAmdSmi(broken="no library")

    def come(self) -> None:
        """The driver is loaded, and both devices are there."""
        raise NotImplementedError

    def break_all(self) -> None:
        """They are there, and nothing about them can be read."""
        raise NotImplementedError

    def break_first(self) -> None:
        """The same of the first."""
        raise NotImplementedError

    def lose_first(self) -> None:
        """It falls off the bus."""
        raise NotImplementedError

    def strip(self) -> None:
        """Nothing is told but memory."""

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """A reading of the first does not come back."""
        raise NotImplementedError
        yield


class Nvml(Machine):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gpus: list[Gpu] = []
        self.library: Any = FakeNvml(broken=NO_LIBRARY)

    def nvml(self) -> Any:
        return self.library

    def come(self) -> None:
        write(self.root, "dev/nvidiactl", "dev/nvidia0", "dev/nvidia1")
        self.gpus = [Gpu("GPU-a", total=24 * GiB), Gpu("GPU-b", total=24 * GiB)]
        self.library = FakeNvml(*self.gpus)

    def break_all(self) -> None:
        self.library.broken = MISMATCH
        for gpu in self.gpus:
            gpu.refuses = {"memory": MISMATCH, "handle": MISMATCH}

    def break_first(self) -> None:
        self.gpus[0].refuses = {"memory": "Unknown Error"}

    def lose_first(self) -> None:
        self.gpus[0].refuses = {"memory": LOST}

    def strip(self) -> None:
        for gpu in self.gpus:
            gpu.refuses = dict.fromkeys(
                ("power", "busy", "heat", "name", "computing", "drawing", "sharing", "ecc", "rows", "reasons", "pci"),
                "-",
            )

    @contextmanager
    def hanging(self) -> Iterator[None]:
        stuck, read = threading.Event(), self.library.nvmlDeviceGetMemoryInfo
        self.library.nvmlDeviceGetMemoryInfo = lambda gpu: stuck.wait(60) and read(gpu)
        yield
        stuck.set()


class Files(Machine):
    """A source that is a tree of files; ``USED`` is one that each reading opens."""

    USED = "mem_info_vram_used"
    TOTAL = "mem_info_vram_total"

    def folder(self, number: int) -> Path:
        return self.root / "sys/bus/pci/devices" / (FIRST, SECOND)[number]

    def break_all(self) -> None:
        for number in (0, 1):
            self._break(number)

    def break_first(self) -> None:
        self._break(0)

    def _break(self, number: int) -> None:
        for name in (self.TOTAL, self.USED):
            path = self.folder(number) / name
            if path.is_file():
                path.unlink()
                path.mkdir()  # EISDIR, even for root

    def lose_first(self) -> None:
        (self.root / "sys/class/drm/card0/device").unlink()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        path = self.folder(0) / self.USED
        text = path.read_text()
        path.unlink()
        os.mkfifo(path)  # opening it waits for a writer
        yield
        stuck = path.rename(path.with_name("stuck"))
        path.write_text(text)
        stuck.write_text(text)


class Amdgpu(Files):
    def come(self) -> None:
        for number, address in enumerate((FIRST, SECOND)):
            amd_card(self.root, number, address, total=24 * GiB, used=GiB, unique=f"7a1{number}", busy=3, watts=90)

    def strip(self) -> None:
        for number in (0, 1):
            for name in ("gpu_busy_percent", "hwmon/hwmon3/power1_average"):
                (self.folder(number) / name).unlink()


class Amdsmi(Amdgpu):
    """The library on top of the files; where it fails the files are asked, so both have to."""

    cards: tuple[Card, ...] = ()

    def smi(self) -> Any:
        return FakeAmdSmi(*self.cards)

    def come(self) -> None:
        super().come()
        self.cards = (Card(FIRST, 24 * GiB, GiB, power=90, busy=3), Card(SECOND, 24 * GiB, GiB, power=90, busy=3))

    def _break(self, number: int) -> None:
        super()._break(number)
        self.cards[number].refuses = frozenset({"gpu_memory_total", "gpu_memory_usage"})

    def lose_first(self) -> None:
        super().lose_first()
        self._break(0)

    def strip(self) -> None:
        super().strip()
        for card in self.cards:
            card.power = card.busy = "N/A"
            card.refuses = frozenset({"gpu_total_ecc_count", "gpu_process_list"})

    @contextmanager
    def hanging(self) -> Iterator[None]:
        self.cards[0].refuses = frozenset({"gpu_memory_usage"})
        with super().hanging():
            yield


class Xe(Files):
    USED = TOTAL = "tile0/physical_vram_size_bytes"
    DRIVER = "xe"

    def come(self) -> None:
        for number, address in enumerate((FIRST, SECOND)):
            intel_card(self.root, number, address, self.DRIVER, total=24 * GiB)


class I915(Files):
    USED = TOTAL = "lmem_total_bytes"

    def come(self) -> None:
        for number, address in enumerate((FIRST, SECOND)):
            intel_card(self.root, number, address, "i915", total=24 * GiB, free=23 * GiB)

    def folder(self, number: int) -> Path:
        return self.root / f"sys/class/drm/card{number}"

    def lose_first(self) -> None:
        shutil.rmtree(self.folder(0))


class Declared(Machine):
    """Stand-ins' files; there are as many as the configuration says, whatever becomes of those."""

    def open(self, known: dict[str, int] | None = None) -> Devices:
        devices = tuple(DeviceConfig(24 * GiB, file=self.root / name) for name in ("a", "b") if self.there)
        return open_devices(Config(devices=devices, reserve=GiB), {}, None, Presence(self.root), known or {})

    there = False

    def come(self) -> None:
        self.there = True
        for name in ("a", "b"):
            make_device(self.root / name, 24 * GiB)

    def break_first(self) -> None:
        (self.root / "a").write_text("no device")


ALL = (Nvml, Amdsmi, Amdgpu, Xe, I915, Declared)
REAL = (Nvml, Amdsmi, Amdgpu, Xe, I915)


@pytest.fixture
def here(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    machine: Machine = request.param(tmp_path)
    return machine


def of(*sources: type[Machine]) -> Any:
    return pytest.mark.parametrize("here", sources, indirect=True, ids=[source.__name__.lower() for source in sources])


@of(*ALL)
def test_absent_is_none(here: Machine) -> None:
    """No trouble, and the note says that engines run on the CPU."""
    devices = here.open()
    source = "none" if isinstance(here, Declared) else "cpu"
    assert (devices.source, devices.trouble, gpus(devices.inventory())) == (source, None, ())
    assert "engines run on the CPU" in devices.note


@of(*ALL)
def test_there_they_are_read(here: Machine) -> None:
    """The row that all faults are held against."""
    here.come()
    devices = here.open()
    assert [(device.index, device.memory, device.reserve) for device in devices.inventory()] == [
        (0, 24 * GiB, GiB), (1, 24 * GiB, GiB)]  # fmt: skip
    sample = devices.sample()
    assert sample.devices.keys() == {0, 1} and not sample.failed


@of(*REAL)
def test_failing_at_init_is_trouble_with_a_cure(here: Machine) -> None:
    """Never taken for none."""
    here.come()
    here.break_all()
    devices = here.open()
    assert devices.trouble and devices.trouble.why and devices.trouble.remedy
    assert devices.inventory() == () and not devices.readable


@of(*REAL)
def test_failing_later_is_a_reading_without_figures(here: Machine) -> None:
    """The devices stay known, each with why it cannot be read; the daemon calls that silent."""
    here.come()
    devices = here.open()
    here.break_all()
    sample = devices.sample()
    assert sample.failed.keys() == {0, 1} and sample.silent and not sample.lost
    assert len(devices.inventory()) == 2


@of(*ALL)
def test_one_that_fails_hides_no_other(here: Machine) -> None:
    """The second is read as ever."""
    here.come()
    devices = here.open()
    here.break_first()
    sample = devices.sample()
    assert (sample.failed.keys(), sample.devices.keys()) == ({0}, {1})


@of(*REAL)
def test_one_that_goes_away_is_lost(here: Machine) -> None:
    """What ran on it has failed; the second is read as ever."""
    here.come()
    devices = here.open()
    here.lose_first()
    sample = devices.sample()
    assert sample.lost.keys() == sample.failed.keys() == {0}
    assert sample.devices.keys() == {1}


@of(*REAL)
def test_what_is_not_told_is_missing_and_nothing_else(here: Machine) -> None:
    """Power, use, heat, names, processes: memory is all that cannot be done without."""
    here.come()
    here.strip()
    sample = here.open().sample()
    assert sample.devices.keys() == {0, 1}
    for device in sample.devices.values():
        assert (device.power, device.utilisation, device.temperature, device.throttled) == (None, None, None, "")


@of(*REAL)
def test_a_reading_that_hangs_holds_nobody_for_long(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is known that one hangs, whoever asks is told at once, and no second thread gets stuck."""
    monkeypatch.setattr(memory, "SAMPLE_LIMIT", 0.05)
    monkeypatch.setattr(memory, "LATE", 0.01)
    here.come()
    devices = here.open()

    async def story() -> None:
        readings = Memory(devices)
        threads = threading.active_count()
        with here.hanging():
            assert await readings.sample() is None
            assert await readings.sample() is None
            assert "a reading hangs" in readings.trouble
            assert threading.active_count() == threads + 1
        for _ in range(1000):  # the stuck one comes back: its thread's turn, not ours
            if await readings.sample():
                break
            await asyncio.sleep(0.01)
        assert readings.trouble == ""

    asyncio.run(asyncio.wait_for(story(), 20))


@of(*REAL)
def test_one_that_comes_late_is_found_at_the_kernels_word(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is loaded after the daemon's start."""
    spoken: asyncio.Event
    monkeypatch.setattr(device_watch, "SETTLE", 0.0)

    class Words:
        async def wait(self, limit: float | None) -> bool:
            await spoken.wait()
            spoken.clear()
            return True

        def close(self) -> None: ...

    monkeypatch.setattr(device_watch, "Uevents", Words)

    async def story() -> None:
        nonlocal spoken
        spoken = asyncio.Event()
        watch, taken = DeviceWatch(lambda known: here.open(dict(known))), asyncio.Queue[Devices]()
        assert gpus((await watch.begin()).inventory()) == ()
        run = asyncio.ensure_future(watch.run(taken.put))
        here.come()
        spoken.set()
        assert len((await taken.get()).inventory()) == 2
        run.cancel()

    asyncio.run(asyncio.wait_for(story(), 20))


# -- what only some have: MIG and unified memory are test_nvml's and test_answers'


def test_amds_library_is_asked_first_and_its_files_for_what_it_does_not_tell(tmp_path: Path) -> None:
    """It sees processes of others; a field that it refuses is the driver's own; its end is told to it."""
    here = Amdsmi(tmp_path)
    here.come()
    here.cards[0].used, here.cards[0].held, here.cards[0].power = 5 * GiB, {4711: 4 * GiB}, 210
    here.cards[1].refuses = frozenset({"power_info", "gpu_activity", "gpu_memory_usage", "gpu_process_list"})
    here.cards[1].uncorrectable = 2
    library = here.smi()
    devices = open_devices(Config(reserve=GiB), {}, here.nvml(), Presence(tmp_path), {}, library)
    assert "amdsmi 7.0.2" in devices.note
    sample = devices.sample()
    first, second = sample.devices[0], sample.devices[1]
    assert (first.used, first.power, first.processes) == (5 * GiB, 210.0, {4711: 4 * GiB})
    assert (second.used, second.power, second.utilisation) == (GiB, 90.0, 3.0)
    assert sample.ill.keys() == {1} and "2 uncorrectable" in sample.ill[1]
    devices.close()
    assert not library.open


def test_amds_library_that_cannot_be_begun_with_costs_nothing(tmp_path: Path) -> None:
    """It is said, and the files are read."""
    here = Amdgpu(tmp_path)
    here.come()
    devices = here.open()
    assert "amdsmi does not answer: no library" in devices.note and len(devices.inventory()) == 2


def test_amds_links_nodes_and_switches(tmp_path: Path) -> None:
    """XGMI by the compute driver's topology; a PCIe link in it is none."""
    here = Amdgpu(tmp_path)
    here.come()
    kfd_node(tmp_path, 1, gpu=51_000, bus=3, held={})
    kfd_node(tmp_path, 2, gpu=52_000, bus=7, held={})
    nodes = "sys/class/kfd/kfd/topology/nodes"
    write(tmp_path, **{f"{nodes}/1/io_links/0/properties": "type 2\nnode_from 1\nnode_to 0\n",
                       f"{nodes}/1/io_links/1/properties": "type 11\nnode_from 1\nnode_to 2\n",
                       f"{nodes}/2/io_links/0/properties": "type 2\nnode_from 2\nnode_to 1\n"})  # fmt: skip
    write(here.folder(0), numa_node="1\n")
    first, second = here.open().inventory()
    assert (first.links, first.node, second.links, second.node) == (frozenset({1}), 1, frozenset(), None)


def test_devices_below_one_switch_know_it(tmp_path: Path) -> None:
    """By the path of the buses that lead to them."""
    here = Nvml(tmp_path)
    here.come()
    port = "sys/devices/pci0000:00/0000:00:01.0"
    for gpu, address, path in zip(
        [*here.gpus, Gpu("GPU-c", total=24 * GiB)], ("0000:03:00.0", "0000:04:00.0", "0000:09:00.0"),
        (f"{port}/0000:01:00.0/0000:02:00.0/0000:03:00.0", f"{port}/0000:01:00.0/0000:02:01.0/0000:04:00.0",
         "sys/devices/pci0000:00/0000:00:02.0/0000:09:00.0"), strict=True,
    ):  # fmt: skip
        gpu.address = f"0000{address}"
        write(tmp_path, f"{path}/vendor")
        (tmp_path / "sys/bus/pci/devices").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/bus/pci/devices" / address).symlink_to(tmp_path / path)
        here.library.gpus = [*here.library.gpus[:2], gpu] if gpu not in here.gpus else here.library.gpus
    assert [device.switch for device in here.open().inventory()] == ["0000:00:01.0", "0000:00:01.0", "0000:00:02.0"]


def test_power_of_a_driver_that_counts_joules(tmp_path: Path) -> None:
    """Intel's: the second reading knows what was drawn since the first; heat, and what slows it down."""
    here = Xe(tmp_path)
    here.come()
    write(here.folder(0), **{
        "hwmon/hwmon2/energy1_input": "1000000\n", "hwmon/hwmon2/temp2_input": "61000\n",
        "hwmon/hwmon2/temp3_input": "95000\n", "hwmon/hwmon2/temp3_crit": "90000\n",
        "hwmon/hwmon2/temp3_label": "vram\n",
        "tile0/gt0/freq0/throttle/reason_prochot": "1\n", "tile0/gt0/freq0/throttle/reason_pl1": "1\n",
    })  # fmt: skip
    devices = here.open()
    first = devices.sample().devices[0]
    assert (first.power, first.temperature, first.throttled) == (None, 95.0, "prochot")
    write(here.folder(0), **{"hwmon/hwmon2/energy1_input": "9000000\n"})
    power = devices.sample().devices[0].power
    assert power is not None and power > 8  # 8 J in less than a second
    (here.folder(0) / "tile0/gt0/freq0/throttle/reason_prochot").write_text("0\n")
    assert "its sensor vram is at the critical 90" in devices.sample().devices[0].throttled


def test_where_processes_cannot_be_seen_intels_use_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xe has no figure for the whole device: nothing seen of others' processes is not nothing in use."""

    def forbidden(folder: Path) -> Iterator[tuple[str, int]]:
        raise PermissionError(13, "Permission denied")

    for source, hides in ((Xe, True), (I915, True)):
        here = source(tmp_path / source.__name__)
        here.come()
        write(here.root, "proc/4711/fdinfo/3")
        devices = here.open()
        assert not devices.sample().devices[0].hides_processes
        with monkeypatch.context() as patch:
            patch.setattr("vllmd.gpu.sysfs._of_process", forbidden)
            assert devices.sample().devices[0].hides_processes is hides


def test_amds_files_tell_of_memory_errors(tmp_path: Path) -> None:
    """Uncorrectable ones of the memory's controller make it unfit; corrected ones do not."""
    here = Amdgpu(tmp_path)
    here.come()
    write(here.folder(0), **{"ras/umc_err_count": "ue: 0\nce: 17\n"})
    write(here.folder(1), **{"ras/umc_err_count": "ue: 1\nce: 0\n"})
    assert here.open().sample().ill == {1: "1 uncorrectable ECC errors since its driver was loaded: reset it or reboot"}


@pytest.mark.parametrize(
    ("source", "env", "left"),
    [
        (Amdgpu, {"HIP_VISIBLE_DEVICES": "1"}, {1: {"HIP_VISIBLE_DEVICES": "1"}}),
        (Amdgpu, {"CUDA_VISIBLE_DEVICES": "1"}, {1: {"HIP_VISIBLE_DEVICES": "1"}}),
        (Amdgpu, {"ROCR_VISIBLE_DEVICES": "1"}, {1: {"ROCR_VISIBLE_DEVICES": "GPU-7a11"}}),
        (Amdgpu, {"ROCR_VISIBLE_DEVICES": "GPU-7a11,0", "HIP_VISIBLE_DEVICES": "0"},
         {1: {"ROCR_VISIBLE_DEVICES": "GPU-7a11"}}),
        (Amdgpu, {"HIP_VISIBLE_DEVICES": ""}, {}),
        (Xe, {"ZE_AFFINITY_MASK": "1.0,1.1"},
         {1: {"ZE_AFFINITY_MASK": "1", "ZE_ENABLE_PCI_ID_DEVICE_ORDER": "1"}}),
    ],
)  # fmt: skip
def test_what_the_environment_leaves(
    tmp_path: Path, source: Callable[[Path], Machine], env: dict[str, str], left: dict[int, dict[str, str]]
) -> None:
    """Each maker's own variables, as its runtime reads them; engines are told what means the same to them."""
    here = source(tmp_path)
    here.come()
    devices = open_devices(Config(reserve=GiB), env, here.nvml(), Presence(tmp_path), {}, here.smi())
    assert {device.index: environment([device]) for device in gpus(devices.inventory())} == left
    assert devices.trouble is None
    if not left:
        assert "hides every device" in devices.note


def test_a_card_that_rocm_does_not_have_makes_its_count_uncertain(tmp_path: Path) -> None:
    """Such a one is told by its id."""
    here = Amdgpu(tmp_path)
    here.come()
    kfd_node(tmp_path, 1, gpu=51_000, bus=7, held={})
    assert [(device.id, device.number) for device in here.open().inventory()] == [("GPU-7a11", 0), ("GPU-7a10", None)]


def test_the_table_names_tests_that_there_are() -> None:
    """docs/gpus.md says for each row what proves it."""
    root = Path(__file__).resolve().parents[2]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs/gpus.md").read_text()))
    folders = [root / "tests" / name for name in ("gpu", "daemon", "core", "cli", "engines", "launcher", "systemd")]
    source = "".join(path.read_text() for folder in folders for path in folder.glob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in source} == set()
