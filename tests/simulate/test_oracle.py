"""The oracle of the benchmark: what it finds is the least there is."""

from __future__ import annotations

import pytest

from tests.bench.oracle import Oracle, Small, small_cases
from tests.bench.scenarios import Row
from tests.bench.schedule import least, waited

WAKE, SLEEP = 1.0, 0.5


def found(answers: list[tuple[float, int, float]], models: int = 2, places: int = 1) -> float:
    """The least total wait where ``answers`` begin at these times, of these models, and take so long."""
    rows = tuple(Row(at, f"m{model}", 1, 1) for at, model, _ in answers)
    return Oracle(Small(8, models, places, rows), WAKE, SLEEP, [seconds for _, _, seconds in answers]).best()


def test_by_hand() -> None:
    """One load; a second model after the first is idle; nobody waits where both fit."""
    assert found([(0.0, 0, 5.0)]) == pytest.approx(WAKE)
    assert found([(0.0, 0, 5.0), (2.0, 1, 1.0)]) == pytest.approx(WAKE + (6.0 - 2.0) + SLEEP + WAKE)
    assert found([(0.0, 0, 5.0), (2.0, 1, 1.0)], places=2) == pytest.approx(WAKE + WAKE)


def test_it_knows_whether_to_drain() -> None:
    """m0 is never idle for long: m1 waits for its end, or has it drained, whichever costs all of them less."""
    stream = [(2.0 * n, 0, 3.0) for n in range(8)]
    alone = found(stream)
    drained_at_once = found([*stream[:1], (0.5, 1, 1.0), *stream[1:]])
    assert drained_at_once < alone + (17.0 - 0.5) + SLEEP + WAKE + 1e-9  # no worse than waiting until the end


@pytest.mark.parametrize("seed", [11, 12])
def test_nobody_beats_it(seed: int) -> None:
    """The production scheduler under each of the rules, in the simulator: never a second less."""
    for case in small_cases(seed, 4, requests=9):
        best = least(case)
        for policy in ("adaptive", "lru", "llama-swap", "ollama"):
            assert waited(case, policy) >= best - 1e-6, (policy, case)
