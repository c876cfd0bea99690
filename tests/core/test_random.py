"""Random worlds: whatever happens, in whatever order, the core keeps its promises."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.core.world import World, brief
from vllmd.core.commands import SleepEngine, StartEngine, WakeEngine
from vllmd.core.events import (
    DeviceDrained,
    DevicesChanged,
    DevicesTroubled,
    EngineAdopted,
    EngineAsleep,
    EngineExited,
    EngineSleepFailed,
    EngineStartFailed,
    EngineStopped,
    EngineWakeFailed,
    FreezeProved,
    KeptAlive,
    LeaseReleased,
    LeaseTaken,
    LoadAsked,
    MemorySampled,
    ModelDisabled,
    ModelEnabled,
    ModelsChanged,
    PinSet,
    ReplicaProbed,
    RequestAnswered,
    RequestArrived,
    RequestFinished,
    RequestGone,
    ServerSilent,
    SleepAsked,
    StartProgressed,
    StopAsked,
    TimePassed,
)
from vllmd.core.policy import NOBODY
from vllmd.core.policy_input import PolicyInputBuilder
from vllmd.core.types import (
    CPU,
    Device,
    Footprint,
    IdleRules,
    ModelSpec,
    Placement,
    ReplicaRules,
    ReplicaSpec,
    Settings,
    State,
    WhenFree,
)
from vllmd.sizes import GiB

NAMES = ("a", "b", "c", "d", "e")
models = st.sampled_from(NAMES)
sizes = st.sampled_from([0, 5, 20, 35, 60, 79, 100])
rules = st.sampled_from([None, None, WhenFree(), WhenFree(60 * GiB, {0.8: 0.5, 0.3: 0.25}), WhenFree(20 * GiB, {})])
ages = st.sampled_from([None, 0.0, 3.0, 40.0])


@st.composite
def machines(draw: st.DrawFn) -> tuple[Device, ...]:
    """Devices of any indices, which may be others than those that had these before; or the CPU in place of them."""
    if draw(st.sampled_from([False, False, False, True])):
        return (Device(0, CPU, 200 * GiB, GiB, runtime=CPU, read=True),)
    indices = draw(st.sets(st.sampled_from([0, 1, 2])))
    return tuple([gpu(index, draw(st.booleans()), draw(st.sampled_from([80, 80, 24]))) for index in sorted(indices)])


def gpu(index: int, read: bool = False, memory: int = 80) -> Device:
    """One of ``memory`` GiB; two of the same size and index are the same one."""
    return Device(index, f"{memory}-{index}", memory * GiB, GiB, read=read)


@st.composite
def engines(draw: st.DrawFn, name: str) -> ReplicaSpec:
    """Any engine that a configuration could describe."""
    size = draw(sizes) * GiB
    return ReplicaSpec(
        name,
        Footprint(size, size, min(size, GiB), draw(st.sampled_from([0, 10, 40])) * GiB),
        weights=size // 2,
        device_count=draw(st.sampled_from([1, 1, 1, 2, 0, 3])),
        devices=draw(st.sampled_from([(), (), (), (1,), (0, 1)])),
        sleep_levels=draw(st.sampled_from([frozenset({1, 2}), frozenset({1}), frozenset({2}), frozenset()])),
        idle=IdleRules(draw(ages), draw(st.sampled_from([1, 2])), draw(ages), draw(ages)),
        pinned=draw(st.sampled_from([False, False, False, True])),
        preload=draw(st.booleans()),
        concurrency=draw(st.sampled_from([None, 1, 2])),
        drain_limit=draw(st.sampled_from([None, 10.0])),
        preempt=draw(st.booleans()),
        keeps_host=draw(st.booleans()),
        when_free=draw(rules),
    )


@st.composite
def specs(draw: st.DrawFn, name: str, several: int = 0) -> ModelSpec:
    """Any model, with one engine or with ``several`` replicas."""
    rules = ReplicaRules(
        least=draw(st.sampled_from([1, 2, 4])),
        busy=draw(st.sampled_from([1, 2])),
        busy_for=draw(st.sampled_from([0.0, 5.0])),
        calm_for=draw(st.sampled_from([0.0, 20.0])),
        probe=draw(st.sampled_from([True, True, False])),
        retries=draw(st.sampled_from([0, 1, 3])),
    )
    names = [f"{name}@{index + 1}" for index in range(several)] or [name]
    return ModelSpec(
        name,
        tuple(draw(engines(each)) for each in names),
        rules if several else None,
        priority=draw(st.sampled_from([1.0, 5.0])),
        on_busy=draw(st.sampled_from(["wait", "wait", "reject", "evict"])),
        queue_limit=draw(st.sampled_from([2, 512])),
        queue_timeout=draw(st.sampled_from([None, 600.0, 30.0])),
    )


@st.composite
def some_models(draw: st.DrawFn) -> tuple[ModelSpec, ...]:
    """Models of which the first may have several replicas."""
    return tuple(draw(specs(name, draw(st.sampled_from([0, 0, 1, 2, 4])) if name == "a" else 0)) for name in NAMES)


class CoreUnderAnything(RuleBasedStateMachine):
    """``World`` checks every promise after every event; the rules below only think of things that can happen."""

    world: World
    count = 0

    @initialize(
        devices=st.integers(0, 3),
        host=st.sampled_from([0, 50, 200]),
        policy=st.sampled_from(["adaptive", "adaptive", "lru"]),
        models=some_models(),
        found=st.lists(
            st.tuples(st.sampled_from(range(8)), st.integers(0, 2)), max_size=3, unique_by=lambda one: one[0]
        ),
        starting=st.booleans(),
    )
    def begin(
        self,
        devices: int,
        host: int,
        policy: str,
        models: tuple[ModelSpec, ...],
        found: list[tuple[int, int]],
        starting: bool,
    ) -> None:
        gpus = [gpu(index) for index in range(devices)]
        self.gpus = tuple(gpus)
        self.specs = models
        self.world = World(models, gpus, Settings(policy, host * GiB, 20))
        self.world.script.append(f"s = Scheduler([{', '.join(map(brief, models))}], {gpus!r}, {self.world.settings!r})")
        known = list(self.world.specs)
        for place, level in found:
            if place < len(known):
                self.find(known[place], level, starting and place == found[0][0])

    def find(self, name: str, level: int, starting: bool) -> None:
        """An engine of an earlier daemon, if its model can be there at all."""
        spec = self.world.specs[name]
        count = spec.device_count if self.world.devices else 0
        allowed = [index for index in spec.devices or self.world.devices if index in self.world.devices]
        if len(allowed) < count:
            return
        self.world.disturbed = True  # whatever it holds, it was there before the ledger
        state = State.STARTING if starting else State.SLEEPING if level else State.READY
        self.world.do(EngineAdopted(name, Placement(tuple(allowed[:count])), state, 0 if starting else level))

    @rule(model=models, key=st.sampled_from("xyz"))
    def arrive(self, model: str, key: str) -> None:
        self.count += 1
        self.world.ask(f"r{self.count}", model, key)

    @rule(key=st.sampled_from("xyz"), avoid=st.frozensets(st.sampled_from(["a@1", "a@2", "a@3"])))
    def arrive_again(self, key: str, avoid: frozenset[str]) -> None:
        """A request that some replicas have failed already."""
        self.count += 1
        self.world.do(RequestArrived(f"r{self.count}", "a", key, avoid))

    @precondition(lambda self: self.world.running)
    @rule(data=st.data(), failed=st.booleans(), streamed=st.booleans(), unsent=st.sampled_from([False, False, True]))
    def hear(self, data: st.DataObject, failed: bool, streamed: bool, unsent: bool) -> None:
        """The first byte of an answer, or that there will be none."""
        request = data.draw(st.sampled_from(sorted(self.world.running)))
        if request in self.world.probes:
            self.world.do(ReplicaProbed(request, None if failed else 0.3, "no answer", unsent=failed and unsent))
        elif not failed:
            self.world.do(RequestAnswered(request, streamed))
        elif request not in self.world.frozen:
            self.world.do(RequestFinished(request, failed="the connection broke off"))

    @precondition(lambda self: any(r not in self.world.frozen for r in self.world.running))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        awake = sorted(r for r in self.world.running if r not in self.world.frozen)
        self.world.finish(data.draw(st.sampled_from(awake)))

    @precondition(lambda self: self.world.queued)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.world.do(RequestGone(data.draw(st.sampled_from(sorted(self.world.queued)))))

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        self.world.answer(data.draw(st.sampled_from(sorted(self.world.pending))))

    @precondition(lambda self: self.world.pending)
    @rule(data=st.data(), lack=st.booleans(), needed=st.sampled_from([None, 30 * GiB, 500 * GiB]))
    def fail(self, data: st.DataObject, lack: bool, needed: int | None) -> None:
        model = data.draw(st.sampled_from(sorted(self.world.pending)))
        command = self.world.pending[model]
        if isinstance(command, StartEngine):
            self.world.do(EngineStartFailed(model, "no", memory=lack, needed=needed))
        elif isinstance(command, WakeEngine):
            self.world.do(EngineWakeFailed(model, "no"))
        elif isinstance(command, SleepEngine):
            self.world.do(EngineSleepFailed(model, "no"))
        elif type(command).__name__ == "ProveFreeze":
            self.world.do(FreezeProved(model, survived=False))
        else:
            self.world.do(EngineStopped(model, missing=dict.fromkeys(self.world.placed[model], 7 * GiB)))

    @precondition(lambda self: any(isinstance(c, SleepEngine) for c in self.world.pending.values()))
    @rule(freed=st.sampled_from([0, 3, 200]))
    def sleep_measured(self, freed: int) -> None:
        model = next(m for m, c in self.world.pending.items() if isinstance(c, SleepEngine))
        level = self.world.pending[model].level  # type: ignore[union-attr]
        self.world.do(EngineAsleep(model, level, dict.fromkeys(self.world.placed[model], freed * GiB)))

    @precondition(lambda self: self.world.engines)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        self.world.do(EngineExited(data.draw(st.sampled_from(sorted(self.world.engines))), "crashed"))

    @rule(data=st.data())
    def fall_silent(self, data: st.DataObject) -> None:
        self.world.do(ServerSilent(data.draw(st.sampled_from(sorted(self.world.specs))), "no answer"))

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.25, 1.0, 7.0, 45.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.world.pass_time(self.world.now + seconds)

    @rule(data=st.data(), share=st.sampled_from([0.0, 0.3, 1.0]))
    def progress(self, data: st.DataObject, share: float) -> None:
        """A log says how far a start is; it may be late, and then it says nothing."""
        self.world.do(StartProgressed(data.draw(st.sampled_from(sorted({*NAMES, *self.world.specs}))), share))

    @rule()
    def ring(self) -> None:
        self.world.do(TimePassed())

    @rule(data=st.data(), what=st.integers(0, 4))
    def operate(self, data: st.DataObject, what: int) -> None:
        """Something is asked of a model, or of one of its replicas."""
        model = data.draw(st.sampled_from(sorted({*NAMES, *self.world.specs})))
        asks = (LoadAsked(model), SleepAsked(model, 1), SleepAsked(model, 2), StopAsked(model), StopAsked(model, True))
        self.world.do(asks[what])

    @rule(data=st.data(), disabled=st.booleans())
    def disable(self, data: st.DataObject, disabled: bool) -> None:
        """A model, or one of its replicas, is taken out of use or given back."""
        model = data.draw(st.sampled_from(sorted({*NAMES, *self.world.specs})))
        self.world.do(ModelDisabled(model, "maintenance") if disabled else ModelEnabled(model))

    @rule(model=models, pinned=st.booleans())
    def pin(self, model: str, pinned: bool) -> None:
        self.world.do(PinSet(model, pinned))

    @rule(lease=st.sampled_from(["l1", "l2"]), model=models, seconds=st.sampled_from([None, 0.0, 5.0, 50.0]))
    def lease(self, lease: str, model: str, seconds: float | None) -> None:
        self.world.do(LeaseTaken(lease, model, None if seconds is None else self.world.now + seconds))

    @rule(
        client=st.sampled_from(["ada", "bob"]), model=models, seconds=st.sampled_from([0.0, 5.0, 500.0, float("inf")])
    )
    def keep_alive(self, client: str, model: str, seconds: float) -> None:
        self.world.do(KeptAlive(model, client, seconds))

    @rule(lease=st.sampled_from(["l1", "l2"]), stop=st.booleans())
    def release(self, lease: str, stop: bool) -> None:
        self.world.do(LeaseReleased(lease, stop))

    @rule(
        external=st.sampled_from([-5, 0, 4, 8, 10, 30, 70, 500]),
        beside=st.sampled_from([0, 0, 8, 70]),
        broken=st.sampled_from([(), (), (), (0,), (1,)]),
        model=models,
        share=st.sampled_from([-1, 0, 0, 15, 90]),
    )
    def sample(self, external: int, beside: int, broken: tuple[int, ...], model: str, share: int) -> None:
        self.world.disturbed = self.world.disturbed or external > 0 or beside > 0 or share > 0
        held = {0: external * GiB, 1: beside * GiB, 9: GiB}
        failed = dict.fromkeys(broken, "no answer")
        self.world.do(MemorySampled(held, {(model, 0): share * GiB, ("ghost", 0): 1}, failed))

    @rule(
        devices=machines(),
        unknown=st.sampled_from(["", "", "", "the driver is gone"]),
        asking=st.booleans(),
        as_before=st.booleans(),
    )
    def devices_change(self, devices: tuple[Device, ...], unknown: str, asking: bool, as_before: bool) -> None:
        """Devices come, go and come back, are others, or nobody knows which there are."""
        if as_before:
            devices = tuple(device for index, device in self.world.devices.items() if index in self.world.there)
        self.world.do(DevicesChanged(devices, unknown, bool(unknown) and asking))

    @rule(index=st.sampled_from([0, 1, 2, 9]), lost=st.booleans(), other=st.sampled_from([None, None, 0, 1]))
    def devices_trouble(self, index: int, lost: bool, other: int | None) -> None:
        """A driver speaks ill of devices, of one that is not there as well."""
        ill = {} if other in (None, index) else {other: "ECC errors"}
        here = {index: "off the bus"} if lost else {}
        self.world.do(DevicesTroubled({**ill, **({} if lost else {index: "ECC errors"})}, here))

    @rule()
    def devices_recover(self) -> None:
        self.world.do(DevicesTroubled())

    @rule(index=st.sampled_from([0, 1, 2, 9]), drained=st.sampled_from([True, False]))
    def drain(self, index: int, drained: bool) -> None:
        self.world.do(DeviceDrained(index, drained))

    @rule()
    def look(self) -> None:
        """What is kept of the policy's view is what a fresh look would see."""
        planner, core = self.world.scheduler.planner, self.world.scheduler.core
        fresh = PolicyInputBuilder(core.engines, core.swaps, core.fit, dict.fromkeys(core.replicas.values()), {})
        kept, new = planner.look(), fresh.look(core.waiting, planner.deep)
        assert sorted(kept.residents) == sorted(new.residents)
        for index in kept.tenants.keys() | new.tenants.keys():
            now, plain = kept.tenants.get(index, NOBODY), new.tenants.get(index, NOBODY)
            assert (sorted(now.all), now.idle, now.pressed) == (sorted(plain.all), plain.idle, plain.pressed)
            assert now.takes == pytest.approx(plain.takes)
        assert kept.supplies == new.supplies
        assert {w for w in new.waiting if core.replicas[w.model] not in core.swaps} == set(kept.waiting)

    @rule(data=st.data(), several=st.sampled_from([0, 1, 2, 3, 4]))
    def reload(self, data: st.DataObject, several: int) -> None:
        """A model is another one, also one that gets replicas or loses them; it may have to restart."""
        name = data.draw(models)
        fresh = data.draw(specs(name, several if name == "a" else 0))
        restart = frozenset(r.id for r in fresh.replicas) if data.draw(st.booleans()) else frozenset()
        self.world.disturbed = True
        self.specs = tuple(fresh if spec.name == name else spec for spec in self.specs)
        self.world.do(ModelsChanged(self.specs, restart))

    def teardown(self) -> None:
        """In the end engines behave and strangers leave: then everybody who still waits is served or told why not."""
        if not hasattr(self, "world"):
            return
        w = self.world
        w.do(DevicesTroubled())
        for index in (0, 1, 2, 9):
            w.do(DeviceDrained(index, False))
        w.do(DevicesChanged(self.gpus))
        w.do(MemorySampled(dict.fromkeys(w.devices, 0), {}))
        for lease in ("l1", "l2"):
            w.do(LeaseReleased(lease))
        for name in NAMES:
            w.do(PinSet(name, False))
        w.settle()


CoreUnderAnything.TestCase.settings = settings(
    max_examples=int(os.environ.get("VLLMD_RANDOM_WORLDS", "150")),
    # In `make check` the same worlds each time, so that what fails there fails by the change at hand; `make fuzz` looks
    # for others.
    derandomize="VLLMD_RANDOM_WORLDS" not in os.environ,
    phases=(Phase.generate,) if "VLLMD_RANDOM_WORLDS" in os.environ else tuple(Phase),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# Half a minute on an idle core; ten with what `make fuzz` asks for.
TestCoreUnderAnything = pytest.mark.timeout(3600)(CoreUnderAnything.TestCase)
