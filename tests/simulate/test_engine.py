"""The simulated engine shares its speed among a batch, and loses no token."""

from __future__ import annotations

import math

from vllmd.core.types import Footprint, ReplicaSpec
from vllmd.simulate.engine import Engine, Job
from vllmd.simulate.physics import Physics

SPEC = ReplicaSpec("m", Footprint(1, 1), weights=10**9)
ONE_SECOND = Physics(bandwidth=math.inf, step=1.0, step_per_request=0.0, prefill=math.inf, batch=2)
CROWDED = Physics(bandwidth=math.inf, step=0.0, step_per_request=1.0, prefill=math.inf)


def job(number: int, output: int, prompt: int = 0) -> Job:
    return Job(number, f"r{number}", "m", prompt, output, 0.0)


def awake(physics: Physics) -> Engine:
    engine = Engine(SPEC, physics)
    engine.resume(0.0)
    return engine


def test_a_batch_advances_together() -> None:
    """Two requests of 3 and 5 tokens at one token per second end after 3 and 5 seconds."""
    engine = awake(ONE_SECOND)
    engine.admit(job(1, 5), 0.0)
    engine.admit(job(2, 3), 0.0)
    assert engine.next_end() == 3.0
    assert engine.end(3.0).number == 2
    assert engine.next_end() == 5.0


def test_more_requests_are_slower() -> None:
    """Alone one token takes 1 s, beside another one 2 s: 2 tokens alone, then 2 at half the speed."""
    engine = awake(CROWDED)
    engine.admit(job(1, 4), 0.0)
    engine.admit(job(2, 10), 2.0)
    assert engine.next_end() == 6.0


def test_a_full_batch_lets_others_wait() -> None:
    """The third one begins when the first has ended: its wait counts until then."""
    engine = awake(ONE_SECOND)
    jobs = [job(1, 2), job(2, 4), job(3, 1)]
    for each in jobs:
        engine.admit(each, 0.0)
    assert jobs[2].began == -1.0
    engine.end(2.0)
    assert jobs[2].began == 2.0
    assert engine.next_end() == 3.0


def test_a_frozen_request_goes_on_where_it_was_after_reading_its_state_anew() -> None:
    """4 of 10 tokens are done when it is frozen; waking it costs the reading of 6 + 4 tokens, one second each."""
    engine = awake(Physics(bandwidth=math.inf, step=1.0, step_per_request=0.0, prefill=1.0))
    engine.admit(job(1, 10, prompt=6), 0.0)
    assert engine.next_end() == 16.0
    engine.freeze(10.0)
    assert engine.next_end() == math.inf
    engine.resume(100.0)
    assert engine.next_end() == 100.0 + 6.0 + 10.0


def test_a_request_that_is_cut_makes_room() -> None:
    """Whoever waits in line takes its place."""
    engine = awake(ONE_SECOND)
    jobs = [job(1, 9), job(2, 9), job(3, 1)]
    for each in jobs:
        engine.admit(each, 0.0)
    engine.drop(jobs[0], 1.0)
    assert engine.end(engine.next_end()) is jobs[2]


def test_noise_is_the_same_for_everybody() -> None:
    """Policies are compared under the same luck: it depends on the model, the kind and the count alone."""
    physics = Physics(seed=7)
    times = [physics.transfer(SPEC, "start", number) for number in range(50)]
    assert times == [physics.transfer(SPEC, "start", number) for number in range(50)]
    assert len(set(times)) == 50
    assert 30 < sum(times) / 50 < 45
    assert Physics(seed=8).transfer(SPEC, "start", 0) != times[0]
