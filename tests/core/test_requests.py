"""Requests: joined starts, limits, fairness, refusals."""

from __future__ import annotations

from tests.core.helpers import GPU, PAIR, model
from tests.core.world import World
from vllmd.core.commands import Admit, Reject, SleepEngine, StartEngine
from vllmd.core.events import EngineAdopted, PinSet, RequestGone, SleepAsked
from vllmd.core.types import Placement, Settings, State
from vllmd.sizes import GiB


def test_second_request_joins_the_running_start() -> None:
    """One start serves every caller of the same model."""
    w = World([model("m")], [GPU])
    assert w.ask("r1", "m") == [StartEngine("m", Placement((0,)), 50 * GiB)]
    assert w.ask("r2", "m") == []
    assert w.answer("m") == [Admit("r1", "m"), Admit("r2", "m")]


def test_a_ready_model_serves_at_once() -> None:
    """Nothing is decided for a request whose model is on."""
    w = World([model("m")], [GPU])
    w.load("m")
    assert w.ask("r", "m") == [Admit("r", "m")]


def test_a_client_that_leaves_the_queue_causes_no_load() -> None:
    """The swap that only he needed is called off, and the victim goes on serving."""
    w = World([model("busy"), model("other")], [GPU])
    w.load("busy")
    w.ask("r1", "busy")
    w.ask("r2", "other")
    w.pass_time(400.0)
    assert w.state("busy") is State.DRAINING
    assert w.do(RequestGone("r2")) == []
    assert w.state("busy") is State.READY
    assert w.ask("r3", "busy") == [Admit("r3", "busy")]


def test_a_request_that_races_its_models_idle_sleep_is_answered() -> None:
    """While the model falls asleep the request waits, and wakes it."""
    w = World([model("m")], [GPU])
    w.load("m")
    w.do(SleepAsked("m", 1))
    assert w.ask("r", "m") == []
    assert [type(c).__name__ for c in w.answer("m")] == ["WakeEngine"]
    assert w.answer("m") == [Admit("r", "m")]


def test_concurrency_is_limited_and_the_next_moves_up() -> None:
    """A model with two places has the third request wait for one of them."""
    w = World([model("m", concurrency=2)], [GPU])
    w.load("m")
    for request in ("r1", "r2"):
        assert w.ask(request, "m") == [Admit(request, "m")]
    assert w.ask("r3", "m") == []
    assert w.finish("r1") == [Admit("r3", "m")]


def test_keys_take_turns() -> None:
    """One caller's flood delays only himself."""
    w = World([model("m", concurrency=1)], [GPU])
    w.ask("first", "m", "flood")
    for n in range(3):
        w.ask(f"flood{n}", "m", "flood")
    w.ask("single", "m", "polite")
    w.answer("m")
    order = []
    for _ in range(4):
        admitted = w.finish(next(iter(w.running)))
        order += [c.request for c in admitted if isinstance(c, Admit)]
    assert order == ["single", "flood0", "flood1", "flood2"]


def test_a_full_queue_says_when_to_come_back() -> None:
    """429 with Retry-After, before anything is promised."""
    w = World([model("m", queue_limit=1)], [GPU])
    w.ask("r1", "m")
    (refusal,) = w.ask("r2", "m")
    assert isinstance(refusal, Reject)
    assert refusal.error == "TooManyRequests"
    assert refusal.retry_after
    assert refusal.retry_after >= 1


def test_a_limit_of_0_lets_nobody_wait_but_the_one_that_loads_the_model() -> None:
    """ "Never wait" is about others: a model that is not loaded would else never be."""
    for w in (
        World([model("m", queue_limit=0, concurrency=1)], [GPU]),
        World([model("m", concurrency=1)], [GPU], Settings(queue_limit=0)),
    ):
        assert any(isinstance(command, StartEngine) for command in w.ask("r1", "m"))
        (refusal,) = w.ask("r2", "m")
        assert isinstance(refusal, Reject) and refusal.error == "TooManyRequests"
        w.answer("m")
        (refusal,) = w.ask("r3", "m")
        assert isinstance(refusal, Reject)
        assert "no request may wait" in refusal.message


def test_the_servers_queue_is_limited_over_all_models() -> None:
    """Many models cannot make the server hold what one could not."""
    w = World([model("a", 10), model("b", 10)], [GPU], Settings(queue_limit=1))
    w.ask("r1", "a")
    (refusal,) = w.ask("r2", "b")
    assert isinstance(refusal, Reject)
    assert "on this server" in refusal.message


def test_nobody_waits_longer_than_the_queue_timeout() -> None:
    """503 at the time limit, and the start that nobody waits for any more goes on to serve the next one."""
    w = World([model("m", queue_timeout=30.0)], [GPU])
    w.ask("r", "m")
    (refusal,) = w.pass_time(31.0)
    assert isinstance(refusal, Reject)
    assert (refusal.error, refusal.message) == ("Unavailable", "'m' could not be served within 30 s")
    assert w.answer("m") == []


def test_an_unknown_model_is_refused() -> None:
    """Names are resolved before; a model removed meanwhile is still possible."""
    (refusal,) = World([], []).ask("r", "ghost")
    assert isinstance(refusal, Reject)
    assert refusal.error == "UnknownModel"


def test_a_model_larger_than_the_machine_is_refused_with_the_arithmetic() -> None:
    """The operator can check the sum."""
    (refusal,) = World([model("huge", 100, device_count=2)], PAIR).ask("r", "huge")
    assert isinstance(refusal, Reject)
    assert refusal.error == "ModelTooLarge"
    assert "needs 100 GiB on each of 2 devices; devices 0, 1 have 80 GiB each" in refusal.message


def test_more_devices_than_there_are_is_refused() -> None:
    """tensor_parallel_size 4 on two devices never works."""
    (refusal,) = World([model("wide", 10, device_count=4)], PAIR).ask("r", "wide")
    assert isinstance(refusal, Reject)
    assert "needs 4 devices, and there are 2" in refusal.message


def test_without_devices_there_are_no_limits() -> None:
    """A machine without a GPU library still serves: the ledger has nothing to say."""
    w = World([model("a"), model("b"), model("c")], [])
    assert w.ask("r1", "a") == [StartEngine("a", Placement(()), 50 * GiB)]
    assert w.ask("r2", "b") == [StartEngine("b", Placement(()), 50 * GiB)]
    w.settle()


def test_on_busy_reject_does_not_wait_for_working_models() -> None:
    """Idle ones make room; working ones are a reason to say no."""
    w = World([model("busy"), model("shy", on_busy="reject")], [GPU])
    w.load("busy")
    w.ask("r1", "busy")
    (refusal,) = w.ask("r2", "shy")
    assert isinstance(refusal, Reject)
    assert refusal.error == "Unavailable"
    w.finish("r1")
    w.now += 60
    assert not any(isinstance(c, Reject) for c in w.ask("r3", "shy"))


def test_on_busy_evict_does_not_weigh() -> None:
    """It takes its room at once, drained but without rent."""
    w = World([model("idle"), model("pushy", on_busy="evict")], [GPU])
    w.load("idle")
    assert w.ask("r", "pushy") == [SleepEngine("idle", 1)]


def test_a_pinned_set_that_fills_the_device_is_named() -> None:
    """Waiting for a pinned model to leave would be waiting for nothing."""
    w = World([model("king", pinned=True), model("other")], [GPU])
    w.load("king")
    (refusal,) = w.ask("r", "other")
    assert isinstance(refusal, Reject)
    assert "pinned models ('king')" in refusal.message
    w.do(PinSet("king", False))
    w.ask("r2", "other")
    w.settle()


def test_a_request_in_an_adopted_engine_needs_no_start() -> None:
    """After a daemon's restart its engines serve on."""
    w = World([model("m")], [GPU])
    w.do(EngineAdopted("m", Placement((0,)), State.READY, idle=5.0))
    assert w.ask("r", "m") == [Admit("r", "m")]


def test_a_client_that_left_in_the_moment_of_admission_is_an_end_like_another() -> None:
    """The daemon may say gone of a request that was just let in."""
    w = World([model("m", concurrency=1)], [GPU])
    w.load("m")
    w.ask("r1", "m")
    w.ask("r2", "m")
    assert w.scheduler.handle(RequestGone("r1"), 1.0) == [Admit("r2", "m")]
    assert w.scheduler.handle(RequestGone("never seen"), 1.0) == []


def test_nobody_waits_for_a_sleeper_that_fits_on_no_device() -> None:
    """It was found asleep, and by its figures it can neither wake there nor start elsewhere: who asks is told so."""
    w = World([model("m", 100)], [GPU])
    w.do(EngineAdopted("m", Placement((0,)), State.SLEEPING, 1))
    (refused,) = [command for command in w.ask("r", "m") if isinstance(command, Reject)]
    assert refused.error == "ModelTooLarge"
