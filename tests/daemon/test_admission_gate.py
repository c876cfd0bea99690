"""A request is told to the core exactly twice, whatever happens in between.

S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable

import pytest

from vllmd.admin.counters import Counters
from vllmd.config.types import ModelConfig, ReplicaConfig
from vllmd.core import commands, events
from vllmd.daemon.admission_gate import AdmissionGate, Permit
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.quotas import Quotas
from vllmd.engines.base import Listen
from vllmd.errors import EngineFailed, Unavailable, UpstreamFailed
from vllmd.proxy.tokens import Tokens
from vllmd.proxy.upstream import OutOfFiles, Unreached

SOCKET = Listen(uds="/run/x/engine.sock")


def closed_gate() -> AdmissionGate:
    """The gate of a daemon that has not opened yet."""
    gate = AdmissionGate(EngineResolver(), Quotas([]), Counters())
    gate.configure({"m": ModelConfig("m")}, {"m": ModelConfig("m")})
    return gate


class Rig:
    """An admission gate whose core is this test."""

    def __init__(self) -> None:
        self.posted: list[events.Event] = []
        self.engine: Listen | None = SOCKET
        self.waited: list[str] = []
        self.at_once = ""  # the replica to which the core admits without an event
        self.ended_at_once: list[str] = []
        self.gate = closed_gate()
        self.gate.open(self)

    # -- what is behind the gate

    def post(self, event: events.Event) -> None:
        self.posted.append(event)

    def admit_at_once(self, request: str, model: str) -> str | None:
        return self.at_once or None

    def finish_at_once(self, request: str) -> bool:
        self.ended_at_once += [request] if self.at_once else []
        return bool(self.at_once)

    def ask(self, event: events.Asking, answered: Callable[[commands.Answer], None]) -> None:
        self.posted.append(event)

    def address_of(self, replica: str) -> Listen | None:
        return self.engine

    def phase_of(self, model: str) -> str:
        return "weights"

    def unreached(self, replica: str) -> None: ...

    def retried(self, replica: str) -> None: ...

    # -- what a test does

    async def arrive(self) -> asyncio.Task[Permit]:
        task = asyncio.ensure_future(self.gate.acquire("m", "key", waits=lambda: self.waited.append("m")))
        await asyncio.sleep(0)
        return task

    def replicate(self, retries: int) -> None:
        """``m`` has two replicas from now on."""
        rules = ReplicaConfig(retries=retries)
        engines = {name: ModelConfig(name, replica_of="m") for name in ("m@1", "m@2")}
        self.gate.configure({"m": ModelConfig("m", replicas=rules)}, engines)

    def kinds(self) -> list[str]:
        return [type(event).__name__ for event in self.posted]


def script(test: Callable[[Rig], Awaitable[None]]) -> Callable[[], None]:
    """Run the test in an event loop of its own."""

    def run() -> None:
        async def main() -> None:
            await asyncio.wait_for(test(Rig()), 5)

        asyncio.run(main())

    run.__doc__, run.__name__ = test.__doc__, test.__name__
    return run


@script
async def test_admitted_and_done(rig: Rig) -> None:
    """The plain course: it arrives, is admitted, is done; being done twice counts once."""
    task = await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m"))
    permit = await task
    assert permit.upstream == SOCKET
    permit.release(Tokens(7, 0))
    permit.release(Tokens(7, 0))
    assert rig.posted == [events.RequestArrived("1", "m", "key"), events.RequestFinished("1")]
    assert rig.gate.requests == 0


@script
async def test_the_short_way_is_without_events(rig: Rig) -> None:
    """Where the core has nothing else to do; of a failure, or at an engine that is gone, it hears as ever."""
    rig.at_once = "m"
    permit = await (await rig.arrive())
    assert (permit.upstream, permit.replica, rig.waited, rig.gate.requests) == (SOCKET, "m", [], 1)
    permit.release(Tokens(7, 0))
    permit.release(Tokens(7, 0))
    assert (rig.posted, rig.ended_at_once, rig.gate.requests) == ([], ["1"], 0)
    (await (await rig.arrive())).release(failed="it broke off")
    assert (rig.posted, rig.ended_at_once) == ([events.RequestFinished("2", "it broke off")], ["1"])
    rig.engine = None
    with pytest.raises(UpstreamFailed, match="is gone"):
        await (await rig.arrive())
    assert (rig.ended_at_once, rig.gate.requests) == (["1", "3"], 0)


@script
async def test_who_would_wait_is_told_so_and_nothing_has_changed(rig: Rig) -> None:
    """Neither the core nor the gate knows of it; where the core admits it at once it is admitted, and counted."""
    assert rig.gate.try_acquire("m", "key") is None
    assert (rig.posted, rig.gate.requests, rig.waited) == ([], 0, [])
    rig.at_once = "m"
    permit = rig.gate.try_acquire("m", "key")
    assert permit is not None
    assert (permit.upstream, permit.key, rig.gate.requests) == (SOCKET, "key", 1)
    permit.release()
    assert (rig.posted, rig.ended_at_once, rig.gate.requests) == ([], ["1"], 0)
    rig.engine = None
    with pytest.raises(UpstreamFailed, match="is gone"):
        rig.gate.try_acquire("m", "key")
    assert rig.gate.requests == 0


@script
async def test_an_adapter_is_to_be_waited_for(rig: Rig) -> None:
    """The engine may have to load it, even where the core admits the request at once."""
    rig.at_once = "m"
    assert rig.gate.try_acquire("m", "key", offer="lora") is None
    permit = await rig.gate.acquire("m", "key", offer="lora")
    assert (permit.called, rig.posted, rig.gate.requests) == ("lora", [], 1)


@script
async def test_a_permit_that_is_done_holds_its_request_no_longer(rig: Rig) -> None:
    """Whom to tell of a cut leads to the request's body: 64 MiB must not wait for the cycle collector."""

    class Asker:
        def cut(self, reason: str) -> None:
            pass

    task = await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m"))
    permit = await task
    asker = Asker()
    permit.on_cut(asker.cut)
    gone = weakref.ref(asker)
    permit.release()
    del asker
    assert gone() is None
    permit.on_cut(late := Asker().cut)
    gone = weakref.ref(late.__self__)
    del late
    assert gone() is None


@script
async def test_a_client_that_leaves_while_waiting_is_gone(rig: Rig) -> None:
    """Nobody must load a model for a client that left."""
    task = await rig.arrive()
    task.cancel()
    await asyncio.wait({task})
    assert rig.kinds() == ["RequestArrived", "RequestGone"]


@script
async def test_a_client_that_leaves_as_it_is_admitted_is_finished(rig: Rig) -> None:
    """The core has counted it as running: it must hear that it is not."""
    task = await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m"))
    task.cancel()
    await asyncio.wait({task})
    assert rig.kinds() == ["RequestArrived", "RequestFinished"]


@script
async def test_admission_after_the_client_left_in_the_same_moment(rig: Rig) -> None:
    """The cancellation is on its way when the core admits: still exactly one ending."""
    task = await rig.arrive()
    task.cancel()
    rig.gate.admit(commands.Admit("1", "m"))
    await asyncio.wait({task})
    assert rig.kinds() == ["RequestArrived", "RequestFinished"]


@script
async def test_a_rejection_is_the_named_error(rig: Rig) -> None:
    """The core speaks of errors by name; the client sees the status and the reason."""
    task = await rig.arrive()
    rig.gate.reject(commands.Reject("1", "EngineFailed", "it broke", retry_after=3))
    with pytest.raises(EngineFailed, match="it broke") as error:
        await task
    assert error.value.retry_after == 3
    assert rig.kinds() == ["RequestArrived"]


@script
async def test_rejection_after_the_client_left_in_the_same_moment(rig: Rig) -> None:
    """A rejected request owes the core nothing, also when its client has just gone."""
    task = await rig.arrive()
    task.cancel()
    rig.gate.reject(commands.Reject("1", "EngineFailed", "it broke"))
    await asyncio.wait({task})
    assert rig.kinds() == ["RequestArrived"]
    assert rig.gate.requests == 0


@script
async def test_admitted_to_an_engine_that_is_gone(rig: Rig) -> None:
    """Between decision and deed the engine may have died: the client hears it, the core its ending."""
    task = await rig.arrive()
    rig.engine = None
    rig.gate.admit(commands.Admit("1", "m"))
    with pytest.raises(UpstreamFailed):
        await task
    assert rig.kinds() == ["RequestArrived", "RequestFinished"]


@script
async def test_a_cut_reaches_the_relay_whenever_it_asks(rig: Rig) -> None:
    """The drain limit may pass before the relay has said how it wants to be told."""
    task = await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m"))
    rig.gate.cut(commands.CutRequest("1", "too long"))
    permit, heard = await task, []
    permit.on_cut(heard.append)
    assert heard == ["too long"]
    permit.release()
    rig.gate.cut(commands.CutRequest("1", "again"))
    assert heard == ["too long"]


@script
async def test_shutdown_refuses_those_who_wait_and_lets_the_others_end(rig: Rig) -> None:
    """A restart must not lose a running stream, nor keep a waiter hanging."""
    running, waiting = await rig.arrive(), await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m"))
    permit = await running
    rig.gate.reject_waiting("shutting down")
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting
    assert rig.gate.requests == 1
    permit.release()
    assert rig.gate.requests == 0
    assert rig.kinds() == ["RequestArrived", "RequestArrived", "RequestGone", "RequestFinished"]


@script
async def test_a_request_that_a_replica_failed_goes_on_to_another(rig: Rig) -> None:
    """As a request of its own to the core, which hears who failed it and whom to avoid."""
    rig.replicate(retries=2)
    task = await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m@2"))
    permit = await task
    assert permit.target is not None
    assert permit.target.model == "m@2"
    permit.release(failed="it broke off")
    retry = asyncio.ensure_future(permit.retry(UpstreamFailed("it broke off")))
    await asyncio.sleep(0)
    assert rig.posted[1:] == [
        events.RequestFinished("1", "it broke off"),
        events.RequestArrived("2", "m", "key", frozenset({"m@2"})),
    ]
    rig.gate.admit(commands.Admit("2", "m"))
    second = await retry
    second.answered(True)
    second.release(Tokens(5, 0))
    assert rig.posted[3:] == [events.RequestAnswered("2", True), events.RequestFinished("2")]
    assert rig.gate.requests == 0


@script
async def test_S_max_retry_attempts_are_bounded(rig: Rig) -> None:
    """After so many it is told by what the last one failed."""
    rig.replicate(retries=2)
    coming = await rig.arrive()
    for number in range(1, 4):
        rig.gate.admit(commands.Admit(f"{number}", "m"))
        permit = await coming
        permit.release(failed="no")
        coming = asyncio.ensure_future(permit.retry(UpstreamFailed(f"failure {number}")))
        await asyncio.sleep(0)
    with pytest.raises(UpstreamFailed, match="failure 3"):
        await coming
    assert rig.kinds().count("RequestArrived") == 3


@script
async def test_where_we_have_no_file_descriptor_no_other_replica_is_tried(rig: Rig) -> None:
    """There is no way to that one, either; and each try would count as one."""
    rig.replicate(retries=2)
    coming = await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m"))
    permit = await coming
    permit.release()
    with pytest.raises(OutOfFiles):
        await permit.retry(OutOfFiles("Too many open files"))
    assert rig.kinds() == ["RequestArrived", "RequestFinished"]


@script
async def test_a_model_with_one_engine_has_nowhere_else(rig: Rig) -> None:
    """Only one that found nobody listening waits for the engine's successor."""
    task = await rig.arrive()
    rig.gate.admit(commands.Admit("1", "m"))
    permit = await task
    assert permit.target is None
    permit.release(failed="no")
    with pytest.raises(UpstreamFailed, match="it broke off"):
        await permit.retry(UpstreamFailed("it broke off"))
    retry = asyncio.ensure_future(permit.retry(Unreached("nobody listens")))
    while len(rig.posted) < 3:  # noqa: ASYNC110 - after a pause
        await asyncio.sleep(0.01)
    assert rig.posted[2] == events.RequestArrived("2", "m", "key", frozenset({"m"}))
    retry.cancel()
    await asyncio.wait({retry})
    assert rig.kinds()[-1] == "RequestGone"


@script
async def test_who_comes_before_we_have_opened_is_counted_and_let_in_then(rig: Rig) -> None:
    """A shutdown that comes meanwhile waits for them as for everybody."""
    rig.gate = closed_gate()
    task = await rig.arrive()
    assert (rig.gate.requests, rig.posted, rig.waited) == (1, [], ["m"])
    rig.gate.open(rig)
    while not rig.posted:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert rig.gate.requests == 1
    rig.gate.admit(commands.Admit("1", "m"))
    (await task).release()
    assert rig.gate.requests == 0


@script
async def test_who_comes_before_we_have_opened_is_told_when_we_shut_down(rig: Rig) -> None:
    """Nobody is left without an answer."""
    rig.gate = closed_gate()
    waiting, leaving = await rig.arrive(), await rig.arrive()
    leaving.cancel()
    await asyncio.wait({leaving})
    assert rig.gate.requests == 1
    rig.gate.reject_waiting("shutting down")
    with pytest.raises(Unavailable, match="shutting down"):
        await waiting
    assert (rig.gate.requests, rig.posted) == (0, [])


@pytest.mark.parametrize(
    ("limit", "wish", "told"), [(None, 9e9, [9e9]), (60.0, float("inf"), [60.0]), (60.0, 0.0, [0.0]), (0.0, 5.0, [])]
)
def test_keep_alive_within_the_configurations_limit(limit: float | None, wish: float, told: list[float]) -> None:
    """What is longer is cut to it; of a model that a reload has taken away nothing is said."""

    async def play() -> None:
        rig = Rig()
        rig.gate.configure({"m": ModelConfig("m")}, {"m": ModelConfig("m")}, limit)
        rig.gate.keep_alive("m", "key", wish)
        rig.gate.keep_alive("gone", "key", wish)
        assert rig.posted == [events.KeptAlive("m", "key", seconds) for seconds in told]

    asyncio.run(play())
