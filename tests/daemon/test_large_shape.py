"""Ten thousand configured models have to fit into a small daemon: what one more of them costs, counted and not timed.

``tests/bench/large.md`` has what a whole daemon takes. Here stands what would undo that at once: a second copy of
something of each model, or an object for what nobody has used yet.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllmd.config.loader import load
from vllmd.config.types import Config
from vllmd.core import events
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Device
from vllmd.daemon.current import RuntimeEnvironment
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.expectations import Expectations, expect, settings_of
from vllmd.sizes import GiB

MODELS = 500
DEVICES = (Device(0, "0", 80 * GiB),)
KINDS = {"remote": 'options: {url: "http://127.0.0.1:9"}', "vllm": "model: org/model-NUMBER"}


def configured(folder: Path, kind: str, number: int) -> Config:
    """So many models, each on a line of its own, as they are in the benchmark."""
    own = KINDS[kind]
    lines = [
        f"  model-{n}: {{engine: {kind}, {own.replace('NUMBER', f'{n}')}, max_model_len: 1024}}" for n in range(number)
    ]
    file = folder / "vllmd.yaml"
    file.write_text("\n".join(["devices: [{memory: 80GiB}]", "models:", *lines]))
    return load(file, {})


@dataclass
class Whole:
    """What a daemon has of its models."""

    config: Config
    resolver: EngineResolver
    expected: Expectations
    scheduler: Scheduler


def whole(folder: Path, kind: str, number: int) -> Whole:
    """Read so many models, and make of them what a start makes."""
    config, resolver = configured(folder, kind, number), EngineResolver(quiet=True)
    runtime = RuntimeEnvironment(environment={"HOME": str(folder)}, home=folder)
    came = list[Expectations]()

    async def look() -> None:
        came.append(await expect(config, runtime, DEVICES, resolver))

    asyncio.run(look())
    (expected,) = came
    return Whole(config, resolver, expected, Scheduler(expected.specs, DEVICES, settings_of(config, DEVICES)))


@pytest.mark.parametrize(("kind", "most"), [("remote", 2100), ("vllm", 2100)])
def test_one_more_model_costs_little(tmp_path: Path, kind: str, most: int, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes of a model that nobody has used: its settings, its engine and its place in the scheduler."""
    caplog.set_level(logging.CRITICAL, "vllmd")  # pytest would keep what is said of each
    whole(tmp_path, kind, 10)  # what is imported, and made once
    gc.collect()
    tracemalloc.start()
    try:
        kept = whole(tmp_path, kind, MODELS)
        gc.collect()
        traces = tracemalloc.take_snapshot().traces
    finally:
        tracemalloc.stop()
    # What is larger is no model's: the process's table of interned strings, where it happens to grow just now.
    each = sum(trace.size for trace in traces if trace.size < 100_000) / MODELS
    assert len(kept.scheduler.core.models) == MODELS
    assert each < most, f"{each:.0f} bytes"


def test_the_views_of_many_models_are_drawn_in_turns(tmp_path: Path) -> None:
    """A stream goes on between; the snapshot of one moment that follows is the same as without that."""
    ahead, at_once = whole(tmp_path, "remote", 500).scheduler, whole(tmp_path, "remote", 500).scheduler
    assert list(ahead.draw_ahead(100)) == [None] * 5
    assert list(ahead.draw_ahead(100)) == []
    assert ahead.snapshot(1.0).models == at_once.snapshot(1.0).models


def test_nothing_is_reviewed_of_models_that_nobody_wants(tmp_path: Path) -> None:
    """A start, and a reload that adds, changes and takes away, cost nothing beyond noting what each model is now."""
    before, after = whole(tmp_path, "remote", 300).expected.specs, whole(tmp_path, "vllm", 200).expected.specs
    scheduler = Scheduler(before, DEVICES)
    core = scheduler.core
    for specs in (before, after, before):
        scheduler.handlers[events.ModelsChanged](events.ModelsChanged(specs))  # without what follows from the event
        assert not core.for_review
        assert list(core.models) == [spec.name for spec in specs] == list(core.replicas)
        assert scheduler.specs == {spec.name: spec for spec in specs}
    # One of them is wanted after all: it is as any other model.
    assert scheduler.handle(events.RequestArrived("r", "model-299"), 9.0)
