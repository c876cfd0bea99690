"""Who asks something of the core is told what becomes of it: two at once cannot both act on what was true before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.core.helpers import GPU, PAIR, model, replicas
from tests.core.world import World
from vllmd.core.commands import AddReplica, Answer, Command, RejectReason, SleepEngine, StartEngine, StopEngine
from vllmd.core.events import (
    DevicesChanged,
    LeaseTaken,
    LoadAsked,
    ModelsChanged,
    PoolAsked,
    ProbeAsked,
    ReplicaRefused,
    SleepAsked,
    StopAsked,
)
from vllmd.core.types import Device, Settings
from vllmd.sizes import GiB


def answers(commands: list[Command]) -> list[Answer]:
    """What those who asked are told."""
    return [command for command in commands if isinstance(command, Answer)]


def chosen(w: World, *models: str) -> str:
    """The model of a pool that a request is to go to."""
    (answer,) = answers(w.do(PoolAsked(models, "p")))
    return answer.chosen


# -- pools


def test_two_requests_for_a_pool_at_once_go_to_two_models() -> None:
    """The body of the first is still being read when the second is told: it counts all the same."""
    w = World([model("a", 20), model("b", 20)], [GPU])
    w.load("a")
    w.load("b")
    assert [chosen(w, "a", "b"), chosen(w, "a", "b"), chosen(w, "a", "b")] == ["a", "b", "a"]


def test_a_request_that_has_come_counts_once() -> None:
    """What was promised of it is over when it arrives."""
    w = World([model("a", 20), model("b", 20)], [GPU])
    w.load("a")
    w.load("b")
    assert chosen(w, "a", "b") == "a"
    w.ask("r1", "a")
    assert [chosen(w, "a", "b"), chosen(w, "a", "b")] == ["b", "a"]


def test_a_request_that_never_comes_does_not_count_for_ever() -> None:
    """Its client has left, or its key may not use the model."""
    w = World([model("a", 20), model("b", 20)], [GPU])
    w.load("a")
    w.load("b")
    assert chosen(w, "a", "b") == "a"
    w.now += 6.0
    assert chosen(w, "a", "b") == "a"


def test_of_a_pool_that_is_not_loaded_one_model_is() -> None:
    """Two at once start one engine; a sleeper comes before a cold one."""
    w = World([model("a", 20), model("b", 20), model("c", 20)], [GPU])
    assert [chosen(w, "a", "b"), chosen(w, "a", "b")] == ["a", "a"]
    w.load("c")
    w.do(SleepAsked("c", 1))
    w.answer("c")
    assert chosen(w, "a", "b", "c") == "c"
    assert chosen(w, "nobody", "b") == "b"
    assert chosen(w, "nobody") == ""


# -- a configuration that is only to be taken while something is not used


def test_a_model_that_is_used_is_not_changed_by_whoever_asked_before_it_was() -> None:
    """Two programs bring the same model along; the request of one comes before the other's settings do."""
    w = World([model("m", 20)], [GPU])
    w.load("m")
    changed = ModelsChanged((model("m", 30),), frozenset({"m"}), unless_used=frozenset({"m"}), ask="c")
    w.ask("r", "m")
    w.script.append("")
    told = w.scheduler.handle(changed, w.now)
    assert told == [Answer("c", refused="m is in use (1 requests, 0 leases)")]
    assert w.state("m").value == "running"
    w.finish("r")
    w.do(LeaseTaken("l", "m"))
    assert answers(w.scheduler.handle(changed, w.now))[0].refused == "m is in use (0 requests, 1 leases)"


def test_the_answer_comes_before_what_follows_from_it() -> None:
    """The daemon must know the new settings before it starts an engine by them."""
    w = World([model("m", 20)], [GPU])
    w.load("m")
    commands = w.do(
        ModelsChanged(
            (model("m", 30), model("n", 10)),
            frozenset({"m"}),
            DevicesChanged((GPU, Device(1, "1", 80 * GiB))),
            Settings("lru"),
            frozenset({"m"}),
            "c",
        )
    )
    assert commands[0] == Answer("c")
    assert isinstance(commands[1], StopEngine)
    assert [device.index for device in w.seen.devices] == [0, 1]


def test_a_replica_that_is_loaded_again_is_not_taken_away() -> None:
    """It was stopped and is to be dropped, but somebody has it loaded before."""
    (spec,) = replicas(2, 20)
    w = World([spec], PAIR)
    drop = ModelsChanged((model("m", 20),), unless_used=frozenset({"m@2"}), ask="d")
    w.do(LoadAsked("m@2"))
    assert answers(w.scheduler.handle(drop, w.now)) == [Answer("d", refused="m@2 is starting")]
    w.answer("m@2")
    w.probed("m@2")
    w.do(StopAsked("m@2"))
    w.answer("m@2")
    assert answers(w.do(drop)) == [Answer("d")]


# -- loads


def test_whoever_wants_one_more_on_a_device_is_told_which_it_is() -> None:
    """Three at once; one engine comes of it, and all three hear of that one."""
    w = World([model("m", 20)], PAIR)
    w.load("m")
    (there,) = w.view("m").devices
    other = 1 - there
    assert w.do(LoadAsked("m", there, "a")) == [Answer("a", "m")]
    assert w.do(LoadAsked("m", other, "b")) == [AddReplica("m", other)]
    assert w.do(LoadAsked("m", other, "c")) == []
    (spec,) = replicas(2, 20)
    several = replace(spec, replicas=(spec.replicas[0], replace(spec.replicas[1], devices=(other,))))
    commands = w.do(ModelsChanged((several,)))
    assert answers(commands) == [Answer("b", "m@2"), Answer("c", "m@2")]
    assert [c.replica for c in commands if isinstance(c, StartEngine)] == ["m@2"]


def test_whoever_wants_one_more_hears_why_there_is_none_even_when_the_model_is_gone() -> None:
    """Nobody waits for ever for an answer."""
    w = World([model("m", 20), model("n", 20)], PAIR)
    w.load("m")
    (there,) = w.view("m").devices
    w.do(LoadAsked("m", 1 - there, "a"))
    w.do(ModelsChanged((model("n", 20),)))
    w.answer("m")
    told = w.do(ReplicaRefused("m", 1 - there, "m is no longer configured"))
    assert told == [Answer("a", refused="m is no longer configured")]


@pytest.mark.parametrize(
    ("device", "why"),
    [(7, "there is no GPU 7; there are 0, 1"), (1, "m may use the GPUs 0 only")],
)
def test_a_device_that_cannot_be_is_refused(device: int, why: str) -> None:
    """With what would be right."""
    w = World([model("m", 20, devices=(0,))], PAIR)
    assert w.do(LoadAsked("m", device, "a")) == [Answer("a", refused=why, error=RejectReason.BAD_REQUEST)]
    wide = World([model("wide", 20, device_count=2)], PAIR)
    (told,) = answers(wide.do(LoadAsked("wide", 0, "a")))
    assert told.refused == "wide takes 2 GPUs and cannot be put on one"


def test_a_load_that_can_never_be_is_refused_with_the_arithmetic() -> None:
    """What failed earlier is no answer: only whether it fits now."""
    w = World([model("huge", 200), model("m", 20)], [GPU])
    (told,) = answers(w.do(LoadAsked("huge", ask="a")))
    assert (told.error, "needs 200 GiB" in told.refused) == (RejectReason.MODEL_TOO_LARGE, True)
    assert answers(w.do(LoadAsked("m", ask="b"))) == [Answer("b", "m")]


# -- probes


def test_a_probe_of_one_that_has_left_is_refused() -> None:
    """It was seen to serve; when it is asked it falls asleep, and must not be disturbed."""
    w = World([model("m", 20)], [GPU])
    w.load("m")
    (sleep,) = w.do(SleepAsked("m", 1))
    assert isinstance(sleep, SleepEngine)
    (told,) = answers(w.do(ProbeAsked("p", "m", "a")))
    assert told.refused == "m is falling_asleep, and a probe loads nothing"
    assert answers(w.do(ProbeAsked("q", "gone", "b")))[0].refused == "gone is gone, and a probe loads nothing"


def test_what_is_not_loaded_cannot_be_put_to_sleep() -> None:
    """Whoever asked for that is told so at that moment; a stop is never refused."""
    w = World([model("a")], [GPU])
    (refused,) = answers(w.do(SleepAsked("a", 1, "q1")))
    assert refused.refused == "a cannot be put to sleep: it is not loaded (stopped)"
    (stopped,) = answers(w.do(SleepAsked("a", 3, "q2")))
    assert not stopped.refused
    w.load("a")
    told = w.do(SleepAsked("a", 1, "q3"))
    assert answers(told) == [Answer("q3")]
    assert told[-1] == SleepEngine("a", 1)
