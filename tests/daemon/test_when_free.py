"""``when_free``: devices that others use, read by NVML or from a device file, until the start is ordered.

S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.rig import Rig, soon, tell
from tests.engines.installed import daemon
from tests.gpu.fake_nvml import FakeNvml, Gpu
from vllmd.admin.counters import Counters
from vllmd.config.types import ModelConfig
from vllmd.core import commands, events
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import WhenFree
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.dispatcher import Dispatcher, executors
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.homes import Homes
from vllmd.daemon.launch_planner import LaunchPlanner, Paths
from vllmd.daemon.memory import Memory
from vllmd.daemon.preflight import Machine, look
from vllmd.daemon.quotas import Quotas
from vllmd.daemon.read_ahead import ReadAhead
from vllmd.daemon.specs import model_spec, replica_spec
from vllmd.engines.base import Listen
from vllmd.gpu.nvml import NvmlDevices
from vllmd.proxy.gate import Permit
from vllmd.simengine.device import FakeGpu, make_device
from vllmd.sizes import GiB


class Site:
    """All of the daemon between NVML and the launcher, for one model, ``m``; somebody else's process is 4242."""

    def __init__(self, rig: Rig, folder: Path, model: ModelConfig, *gpus: Gpu) -> None:
        self.gpus, self.launcher = gpus, rig.launcher
        self._memory = Memory(NvmlDevices(0, {}, FakeNvml(*gpus)))
        machine = Machine(self._memory.inventory, Homes(folder), folder / "run")
        self._fleet = EngineManager(
            rig.launcher,  # type: ignore[arg-type]
            self.post,
            self._memory,
            LaunchPlanner(self._memory, Paths(folder / "run"), EngineResolver(), rig.ports),
        )
        rig.launcher.on_exit = self._fleet.on_exit
        self._fleet.configure({"m": model}, {})
        self._gate = AdmissionGate(EngineResolver(), Quotas([]), Counters())
        self._gate.configure({"m": model}, {"m": model})
        (found,) = look([model], machine, EngineResolver())
        core = Scheduler([model_spec(model, [replica_spec(model, found.engine, found.estimate)])], machine.devices)
        self.dispatcher = Dispatcher(
            core, executors(self._fleet, self._gate, lambda command: None, ReadAhead(lambda replica: []))
        )
        self._gate.open(self)

    # -- what is behind the gate

    def post(self, event: events.Event) -> None:
        self.dispatcher.post(event)

    def admit_at_once(self, request: str, model: str) -> str | None:
        return self.dispatcher.admit_at_once(request, model)

    def finish_at_once(self, request: str) -> bool:
        return self.dispatcher.finish_at_once(request)

    def ask(self, event: events.Asking, answered: Callable[[commands.Answer], None]) -> None:
        self.dispatcher.ask(event, answered)

    def address_of(self, replica: str) -> Listen:
        return self._fleet.processes[replica].listen

    def phase_of(self, model: str) -> str:
        return ""

    def unreached(self, replica: str) -> None: ...

    # -- what a test does

    async def arrive(self) -> asyncio.Task[Permit]:
        """A client's request, which has arrived."""
        task = asyncio.ensure_future(self._gate.acquire("m", "key"))
        await asyncio.sleep(0)
        return task

    async def sample(self, *gib: int) -> None:
        """The devices are read while 4242 holds so much of each."""
        for gpu, size in zip(self.gpus, gib, strict=True):
            gpu.used, gpu.computing = size * GiB, {4242: size * GiB} if size else {}
        sampled = await self._memory.report({}, {})
        assert sampled
        self.dispatcher.post(sampled)

    @property
    def shares(self) -> list[str]:
        """The utilization that each engine was started with."""
        launch_planner = [order.argv for order in self.launcher.orders]
        return [argv[argv.index("--gpu-memory-utilization") + 1] for argv in launch_planner]

    def waiting_for(self) -> str:
        (view,) = self.dispatcher.scheduler.snapshot(self.dispatcher.now()).models
        return view.waiting_for


def waits(**settings: object) -> ModelConfig:
    return ModelConfig("m", when_free=WhenFree(), options={"rpc_dir": "/tmp"}, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("left", "share"), [(0, "0.8"), (4, "0.8"), (5, "0.7"), (9, "0.7")])
def test_S_is_gpu_free_starts_with_the_share_that_the_free_ratio_picks(tmp_path: Path, left: int, share: str) -> None:
    """Below 10,000 MB used it is free; 0.80 of the memory from a free ratio of 0.95 on, 0.70 from 0.85 on."""

    async def story(rig: Rig) -> None:
        site = Site(rig, tmp_path, waits(), Gpu("GPU-a"))
        await site.sample(0)
        asked = await site.arrive()
        for used in (23, 60, 10):
            await site.sample(used)
            assert site.shares == []
            assert f"other programs hold {used} GiB on device 0" in site.waiting_for()
        await site.sample(left)
        await soon(asked)
        assert site.shares == [share]

    tell(story, tmp_path)


def test_S_is_gpu_free_looks_at_all_gpus_of_a_model(tmp_path: Path) -> None:
    """The original's check of several asked for one that does not exist. The fullest picks the share."""

    async def story(rig: Rig) -> None:
        site = Site(rig, tmp_path, waits(tensor_parallel_size=2), Gpu("GPU-a"), Gpu("GPU-b"))
        await site.sample(0, 0)
        asked = await site.arrive()
        for used in ((0, 23), (23, 0)):
            await site.sample(*used)
            assert site.shares == []
        await site.sample(0, 8)
        await soon(asked)
        assert site.shares == ["0.7"]
        assert rig.launcher.orders[0].env["CUDA_VISIBLE_DEVICES"] == "0,1"

    tell(story, tmp_path)


def test_the_daemon_notices_when_a_stranger_leaves(tmp_path: Path) -> None:
    """Though nothing is loaded and no request is open: an operator's word is enough to have it look."""
    gpu = FakeGpu(make_device(tmp_path / "gpu0", 80 * GiB))
    gpu.hold(23 * GiB)
    model = {"engine": "sim", "when_free": True}
    config = {"devices": [{"memory": "80GiB", "file": str(gpu.path)}], "models": {"m": model}}
    with daemon(tmp_path / "site", config) as site:
        assert site.admin.post("/admin/models/m/load", json={}).status_code == 202
        assert "other programs hold 23 GiB on device 0" in site.decision("m", "wait")["why"]
        gpu.hold(0)
        site.wait_for("m", "running")
        assert site.decision("m", "free")["numbers"]["share"] == 0.8
        assert f"--memory\0{64 * GiB}\0" in Path(f"/proc/{site.view('m')['pid']}/cmdline").read_text()
