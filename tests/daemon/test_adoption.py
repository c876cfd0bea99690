"""What a new daemon makes of the engines that an old one left, by their notes and by their own word."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import pytest

from tests.daemon.rig import FakeEngine, Rig, soon, tell
from vllmd.config.types import ModelConfig
from vllmd.core import events
from vllmd.core.types import Placement, State
from vllmd.daemon import adoption, boot_clock, engine_manager, startup
from vllmd.daemon.adoption import Found, adopt_all, examine
from vllmd.daemon.boot_clock import date_of, moments, seconds_since
from vllmd.daemon.engine_process import fingerprint
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.engines.base import Listen
from vllmd.launcher.client import ExitReport, LauncherClient, LauncherInfo, Running
from vllmd.launcher.protocol import PROTOCOL

REFUSES = "refuses"


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in vain is not waited for long."""
    monkeypatch.setattr(adoption, "RESOLVE_LIMIT", 1.0)
    monkeypatch.setattr(adoption, "RESOLVE_POLL", 0.02)
    monkeypatch.setattr(adoption, "UNMANAGED_LIMIT", 0.1)
    monkeypatch.setattr(engine_manager, "KILL_LIMIT", 0.1)


def notes(model: ModelConfig, socket: Path, **more: str) -> dict[str, str]:
    """What the engine manager leaves beside a cgroup."""
    return {
        "model": model.name,
        "listen": json.dumps(asdict(Listen(uds=str(socket)))),
        "devices": "[0]",
        "fingerprint": fingerprint(model),
        "state": "ready",
        "level": "0",
        "idle_since": f"{time.time() - 100:.0f}",
        **more,
    }


async def found(rig: Rig, folder: Path, noted: Mapping[str, str], asleep: bool | str, *, ending: bool = False) -> Found:
    """What is found of an engine with these notes that says that it sleeps, that it does not, or nothing."""
    engine = FakeEngine(rig.gpu, str(folder / "e.sock"), asleep=asleep is True)
    if asleep != REFUSES:
        await engine.open()
    noted = {**notes(rig.model, folder / "e.sock"), **noted}
    running = Running("m-000001", 1, "vllmd-model-m-000001.scope", metadata=noted, ending=ending, uid=os.geteuid())
    try:
        return await soon(examine(running, {"m": rig.model}, EngineResolver()))  # type: ignore[no-any-return]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("noted", "asleep", "state", "level"),
    [
        ({"state": "starting"}, REFUSES, State.STARTING, 0),
        ({"state": "ready"}, False, State.READY, 0),
        ({"state": "sleeping", "level": "1"}, True, State.SLEEPING, 1),
        ({"state": "sleeping", "level": "2"}, True, State.SLEEPING, 2),
        ({"state": "falling_asleep", "level": "1"}, True, State.SLEEPING, 1),
        ({"state": "waking", "level": "1"}, False, State.READY, 0),
    ],
)
def test_notes_and_engine_agree(
    tmp_path: Path, noted: dict[str, str], asleep: bool | str, state: State, level: int
) -> None:
    """It goes on in the state that it is in."""

    async def story(rig: Rig) -> None:
        what = await found(rig, tmp_path, noted, asleep)
        assert (what.state, what.level, what.why) == (state, level, "")
        assert what.process.placement == Placement((0,))
        if state is not State.STARTING:
            assert 99 < what.idle < 110  # its idle clock runs on

    tell(story, tmp_path)


@pytest.mark.parametrize(
    ("noted", "asleep", "why"),
    [
        ({"state": "ready"}, True, "expected it awake, it said True"),
        ({"state": "ready"}, REFUSES, "expected it awake, it said"),
        ({"state": "sleeping", "level": "1"}, False, "expected it asleep, it said False"),
        ({"state": "falling_asleep", "level": "1"}, False, "expected it asleep"),
        ({"state": "waking", "level": "2"}, False, "it was left waking, at level 2"),
        ({"state": "dancing"}, False, "it was left dancing"),
        ({"model": "other"}, False, "no longer configured"),
        ({"fingerprint": "0"}, False, "settings have changed"),
        ({"level": "x"}, False, "its notes are unreadable (ValueError"),
        ({"listen": "{"}, False, "its notes are unreadable"),
        ({"listen": '{"pipe": 1}'}, False, "its notes are unreadable"),
        ({"devices": "3"}, False, "its notes are unreadable"),
    ],
)
def test_what_does_not_fit_together_has_to_go(tmp_path: Path, noted: dict[str, str], asleep: bool, why: str) -> None:
    """A full stop is always right."""

    async def story(rig: Rig) -> None:
        what = await found(rig, tmp_path, noted, asleep)
        assert what.state is None
        assert why in what.why

    tell(story, tmp_path)


def test_an_engine_on_its_way_out_is_not_waited_for(tmp_path: Path) -> None:
    """Its main process has ended already."""

    async def story(rig: Rig) -> None:
        what = await found(rig, tmp_path, {}, REFUSES, ending=True)
        assert (what.state, what.why) == (None, "it is ending already")

    tell(story, tmp_path)


def test_an_engine_that_has_died_meanwhile_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end was reported after it was listed: everybody else waits for the adoption, and not for the dead."""
    monkeypatch.setattr(adoption, "RESOLVE_LIMIT", 3600.0)

    async def story(rig: Rig) -> None:
        noted = notes(rig.model, tmp_path / "e.sock")
        running = Running("m-000001", 1, "vllmd-model-m-000001.scope", metadata=noted, uid=os.geteuid())
        rig.engine_manager.on_exit(ExitReport("m-000001", 1))
        await soon(adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
        assert rig.engine_manager.processes == {}

    tell(story, tmp_path)


def test_idle_clocks_survive_nonsense(tmp_path: Path) -> None:
    """A clock in the future, or no clock: idle since now."""

    async def story(rig: Rig) -> None:
        for noted in ({"idle_since": "x"}, {"idle_since": f"{time.time() + 1000}"}, {"idle_since_monotonic": "x"}):
            assert (await found(rig, tmp_path, {"idle_since": "x", **noted}, False)).idle == 0

    tell(story, tmp_path)


def test_a_clock_that_was_set_changes_no_models_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one daemon notes for the next counts seconds since boot: nobody sets that, and no engine outlives it."""
    left, now = moments(idle_since=100.0, started=5000.0), time.time()
    for jump in (-86400.0, 3 * 86400.0):
        monkeypatch.setattr(boot_clock.time, "time", lambda jump=jump: now + jump)
        assert seconds_since(left, "idle_since") == pytest.approx(100, abs=5)
        assert seconds_since(left, "started") == pytest.approx(5000, abs=5)


def test_moments_that_an_older_version_noted_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """It noted Unix time; what the newer one notes beside them counts."""
    monkeypatch.setattr(boot_clock.time, "time", lambda: 2000.0)
    assert seconds_since({"started": "1500.0"}, "started") == 500
    assert seconds_since({"started": "1500.0", **moments(started=3.0)}, "started") == pytest.approx(3, abs=1)


async def _left(rig: Rig, **more: str) -> Running:
    """An engine that an earlier daemon left running."""
    await rig.ready()
    rig.engine_manager.processes.clear()
    noted = {**rig.launcher.notes[rig.instance], **more}
    return Running(rig.instance, 1, f"vllmd-model-{rig.instance}.scope", metadata=noted, uid=os.geteuid())


def test_adopted_engines_are_told_to_the_core(tmp_path: Path) -> None:
    """And answer its commands."""

    async def story(rig: Rig) -> None:
        running = await _left(rig)
        await soon(adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
        adopted = await rig.event()
        assert isinstance(adopted, events.EngineAdopted)
        assert (adopted.replica, adopted.state) == ("m", State.READY)
        rig.launcher.exit(rig.instance, 1)
        assert isinstance(await rig.event(), events.EngineExited)

    tell(story, tmp_path)


def test_how_long_it_has_been_so_is_adopted_with_it(tmp_path: Path) -> None:
    """As was noted: ps and why speak of the engine, not of the daemon."""

    async def story(rig: Rig) -> None:
        running = await _left(rig, **moments(since=500.0, started=900.0))
        await soon(adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
        adopted = await rig.event()
        assert isinstance(adopted, events.EngineAdopted)
        assert 499 < adopted.since < 560  # moments are noted to a hundredth of a second
        assert 899 < time.monotonic() - rig.engine_manager.processes["m"].started < 960

    tell(story, tmp_path)


def test_an_engine_was_started_when_it_was_also_where_the_clock_was_set_since(tmp_path: Path) -> None:
    """The date was noted at the start; versions that noted none are counted back from now."""

    async def story(rig: Rig) -> None:
        then = time.time() - 50000.0
        running = await _left(rig, **moments(started=900.0), started=f"{then:.1f}")
        older = {name: noted for name, noted in running.metadata.items() if name != "started"}
        for metadata, date in ((running.metadata, then), (older, time.time() - 900)):
            left = replace(running, metadata=metadata)
            await soon(adopt_all(rig.engine_manager, [left], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
            assert rig.engine_manager.processes.pop("m").started_at == pytest.approx(date, abs=60)
            assert isinstance(await rig.event(), events.EngineAdopted)

    tell(story, tmp_path)


def test_what_is_noted_at_a_start_and_at_a_change_of_state_has_its_date(tmp_path: Path) -> None:
    """For the next daemon, which cannot count back where the clock was set between."""

    async def story(rig: Rig) -> None:
        began = time.time()
        await rig.ready()
        noted = rig.launcher.notes[rig.instance]
        for what in ("started", "since"):
            at, date = date_of(noted, what) or (0.0, 0.0)
            assert began - 1 < date < time.time() + 1
            assert abs(time.monotonic() - at) < 60
        assert date_of({}, "started") is None
        assert date_of({**noted, "started": "x"}, "started") is None

    tell(story, tmp_path)


def test_an_adopted_start_goes_on(tmp_path: Path) -> None:
    """It becomes ready under the new daemon."""

    async def story(rig: Rig) -> None:
        running = await _left(rig, state="starting")
        await soon(adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
        adopted = await rig.event()
        assert isinstance(adopted, events.EngineAdopted)
        assert adopted.state is State.STARTING
        assert isinstance(await rig.event(), events.EngineReady)

    tell(story, tmp_path)


def test_a_second_engine_of_a_model_is_ended(tmp_path: Path) -> None:
    """One of them is kept."""

    async def story(rig: Rig) -> None:
        running = await _left(
            rig,
        )
        twice = [running, replace(running)]
        await soon(adopt_all(rig.engine_manager, twice, {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
        assert rig.launcher.signals == ["SIGTERM"]
        assert not rig.launcher.engines

    tell(story, tmp_path)


def test_nobody_waits_long_for_an_engine_that_does_not_end(tmp_path: Path) -> None:
    """The others are served meanwhile; it is killed in the background."""

    async def story(rig: Rig) -> None:
        running = await _left(rig, fingerprint="another")
        rig.launcher.deaf = {"SIGTERM"}
        rig.configure(stop_timeout=0.5)
        running = replace(running, metadata={**running.metadata})
        await soon(adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
        assert rig.launcher.signals == ["SIGTERM"]
        await rig.nothing_more()
        assert rig.launcher.signals == ["SIGTERM", "SIGKILL"]

    tell(story, tmp_path)


def test_engines_of_an_older_version_are_adopted_under_the_names_of_this_one(tmp_path: Path) -> None:
    """Up to 0.1.0 the first of several replicas was noted by the model's name, the others with digests of their own."""
    base = ModelConfig("m", engine="sim", stop_timeout=0.1)
    before = {"m": fingerprint(base), "m@2": fingerprint(replace(base, name="m@2"))}
    now = {name: replace(base, name=name, replica_of="m") for name in ("m@1", "m@2")}

    async def story(rig: Rig) -> None:
        for noted, name in (("m", "m@1"), ("m@2", "m@2")):
            running = await _left(rig, model=noted, fingerprint=before[noted])
            await soon(adopt_all(rig.engine_manager, [running], now, EngineResolver(), rig.posted.put_nowait))
            adopted = await rig.event()
            assert isinstance(adopted, events.EngineAdopted)
            assert (adopted.replica, adopted.state) == (name, State.READY)
            rig.launcher.exit(rig.instance, 1)
            assert isinstance(await rig.event(), events.EngineExited)

    tell(story, tmp_path)


def test_an_engine_of_a_model_that_lost_its_replicas_is_the_models(tmp_path: Path) -> None:
    """The configuration may have changed while no daemon ran."""

    async def story(rig: Rig) -> None:
        running = await _left(rig, model="m@1")
        await soon(adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait))
        adopted = await rig.event()
        assert isinstance(adopted, events.EngineAdopted)
        assert adopted.replica == "m"

    tell(story, tmp_path)


def test_a_setting_that_came_later_changes_no_fingerprint_unless_it_is_set() -> None:
    """An upgrade keeps the engines that run; the figure is what 0.1.0 noted for this model."""
    assert fingerprint(ModelConfig("m")) == "bb0bdfb09501ed57"
    assert fingerprint(ModelConfig("m", user="own")) != fingerprint(ModelConfig("m"))


def test_an_engine_that_never_answers_is_given_up_in_time(tmp_path: Path) -> None:
    """Stopped by a signal, it lets one connect; nobody is served until it is known what becomes of it."""

    async def story(rig: Rig) -> None:
        engine = FakeEngine(rig.gpu, str(tmp_path / "e.sock"))
        engine.answers["/is_sleeping"] = None
        await engine.open()
        running = Running("m-000001", 1, "u", metadata=notes(rig.model, tmp_path / "e.sock"), uid=os.geteuid())
        what = await soon(examine(running, {"m": rig.model}, EngineResolver()))
        assert (what.state, what.why) == (None, "expected it awake, it said nothing")
        engine.close()

    tell(story, tmp_path)


def test_a_new_daemon_waits_for_a_new_launcher() -> None:
    """In an upgrade it may meet the old one for a moment, which could not tell whose its engines are."""
    told = [LauncherInfo("old", ""), LauncherInfo("old", ""), LauncherInfo("new", "", protocol=PROTOCOL)]

    class Launcher:
        connected = False

        async def open(self) -> None:
            self.connected = True

        async def info(self) -> LauncherInfo:
            return told.pop(0)

    launcher = cast(LauncherClient, Launcher())
    assert asyncio.run(asyncio.wait_for(startup.connect(launcher, ""), 10)) == "new"
