"""Plans: the recorded traffic with something else, by a process of its own, one at a time, within bounds."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllmd.config.loader import load
from vllmd.core.types import Device
from vllmd.daemon import plans
from vllmd.daemon.plans import Plans
from vllmd.errors import BadRequest, Conflict, NotFound, TookTooLong, UnknownModel
from vllmd.records.trace import Arrival
from vllmd.sizes import GiB

CONFIG = """\
defaults: {engine: sim, gpu_memory: 50GiB}
models: {a: {}, b: {}, huge: {gpu_memory: 100GiB}}
"""
# Two models that do not fit together, asked for in turns.
TRAFFIC = [Arrival(1000 * at, "ab"[at // 60 % 2], "", 100, 20) for at in range(0, 1200, 30)]


def planner(tmp_path: Path, traffic: list[Arrival] = TRAFFIC, gate: asyncio.Event | None = None) -> Plans:
    path = tmp_path / "vllmd.yaml"
    path.write_text(CONFIG)
    memory = SimpleNamespace(inventory=(Device(0, "0", 80 * GiB),))
    back = SimpleNamespace(memory=memory, activity=lambda: SimpleNamespace(host_memory=64 * GiB))

    async def wait() -> Any:
        return back

    async def arrivals(since: float, most: int) -> tuple[deque[Arrival], int]:
        if gate:
            await gate.wait()
        return deque(traffic, most), len(traffic)

    return Plans(SimpleNamespace(config=load(path)), SimpleNamespace(wait=wait), arrivals, lambda: tmp_path)  # type: ignore[arg-type]


def run(of: Plans, devices: str | None = None, policy: str | None = None, **models: object) -> Any:
    return asyncio.run(of.run(None, devices, policy, None, models))


def test_one_more_device_ends_the_swaps(tmp_path: Path) -> None:
    told = run(planner(tmp_path), "80GiB,80GiB")
    before, after = told.runs
    assert (before.name, after.name, before.devices, after.devices) == (
        "as it is",
        "with the change",
        (80 * GiB,),
        (80 * GiB, 80 * GiB),
    )
    assert told.requests == told.recorded == before.served == after.served == len(TRAFFIC)
    assert (before.swaps > 10, after.swaps) == (True, 2)
    assert after.wait["mean"] < before.wait["mean"]
    assert set(after.models) == {"a", "b"} and len(after.samples[0]["promised"]) == 2


def test_a_models_settings_and_the_policy_are_what_is_changed(tmp_path: Path) -> None:
    """The model that could never be is left out, and said so."""
    traffic = [*TRAFFIC, Arrival(5000, "huge", "", 1, 1), Arrival(6000, "gone", "", 1, 1)]
    told = run(planner(tmp_path, traffic), policy="lru", b={"gpu_memory": "20GiB"})
    assert [(each.policy, each.swaps > 10) for each in told.runs] == [("adaptive", True), ("lru", False)]
    assert "huge needs 100 GiB" in told.left_out["huge"]
    assert told.left_out["gone"] == "it is not configured any more"


@pytest.mark.parametrize(
    ("asked", "models", "error", "words"),
    [
        ({"devices": "80"}, {}, BadRequest, "write 80GiB"),
        ({"policy": "best"}, {}, BadRequest, "there are adaptive"),
        ({}, {"c": {}}, UnknownModel, "'c' is not configured"),
        ({}, {"a": {"gpu_memroy": "1GiB"}}, BadRequest, "gpu_memory"),
        ({}, {"a": {"command": "rm"}}, BadRequest, "command"),
    ],
)
def test_what_makes_no_sense_is_said(
    tmp_path: Path, asked: dict[str, str], models: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as told:
        run(planner(tmp_path), **asked, **models)
    assert words in str(told.value)


def test_without_traffic_there_is_nothing_to_plan_with(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        run(planner(tmp_path, []))


def test_one_runs_at_a_time(tmp_path: Path) -> None:
    """A second is refused, not queued: whoever asks may come back."""

    async def both() -> None:
        gate = asyncio.Event()
        of = planner(tmp_path, [], gate)
        first = asyncio.ensure_future(of.run(None, None, None, None, {}))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(Conflict):
            await of.run(None, None, None, None, {})
        gate.set()
        with pytest.raises(NotFound):
            await first

    asyncio.run(both())


def test_one_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "LIMIT", 0.01)
    made: list[Any] = []
    create = asyncio.create_subprocess_exec

    async def noted(*command: Any, **how: Any) -> Any:
        made.append(await create(*command, **how))
        return made[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", noted)
    with pytest.raises(TookTooLong):
        run(planner(tmp_path))
    with pytest.raises(ProcessLookupError):
        os.kill(made[0].pid, 0)
