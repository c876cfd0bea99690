"""A model that has failed is in error for the next daemon, too, with the cause, until somebody clears that."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_reload import BASE, Living, lives, read
from vllmd.config.types import Config, ModelConfig
from vllmd.core import events
from vllmd.daemon.dates import Dates
from vllmd.daemon.engine_process import fingerprint
from vllmd.daemon.failures import Failure, remembered

WHY = "no such file: /models/m"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Where the daemons keep what they learnt."""
    return tmp_path / "cache/learnt.json"


def failing(config: Config, folder: Path, kept: Path) -> None:
    """A daemon's life in which the start of the model fails."""

    async def fail(living: Living) -> None:
        living.back.post(events.LoadAsked("m"))
        living.back.post(events.EngineStartFailed("m", WHY))
        await living.back.keep_learnt()

    lives(config, folder, fail, learnt=kept)


def seen(config: Config, folder: Path, kept: Path, *posted: events.Event) -> dict[str, Any]:
    """What the next daemon shows of the model after these events; it keeps that again."""
    lines: list[dict[str, Any]] = []

    async def look(living: Living) -> None:
        for event in posted:
            living.back.post(event)
        lines.append(living.front.status.line("m"))
        await living.back.keep_learnt()

    lives(config, folder, look, learnt=kept)
    return lines[0]


def test_the_next_daemon_knows_what_has_failed_and_the_one_after_it_too(tmp_path: Path, kept: Path) -> None:
    """The daemon exits when nobody is there; in the morning another one is asked why nothing works."""
    config = read(tmp_path, BASE)
    failing(config, tmp_path, kept)
    for _ in range(2):
        line = seen(config, tmp_path, kept)
        assert (line["state"], line["failure"]) == ("error", WHY)
        assert line["since"] is not None


def test_a_failure_is_of_when_it_was_whatever_became_of_the_clock_since(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody set it between the failure and its being written down."""

    async def fail(living: Living) -> None:
        was, ahead = time.time(), [0.0]
        living.front.learnt.dates = Dates(lambda: was + ahead[0])
        living.back.post(events.LoadAsked("m"))
        living.front.changes.engine_event(events.EngineStartFailed("m", WHY), living.back.dispatcher)
        ahead[0] = -86400.0
        monkeypatch.setattr(time, "time", lambda: was + ahead[0])
        await living.back.keep_learnt()
        assert living.front.learnt.failures["m"].at == pytest.approx(was, abs=60)

    lives(read(tmp_path, BASE), tmp_path, fail, learnt=kept)


@pytest.mark.parametrize("cleared", [(events.StopAsked("m"),), (events.LoadAsked("m"), events.EngineReady("m"))])
def test_an_operator_and_a_good_start_clear_it(tmp_path: Path, kept: Path, cleared: tuple[events.Event, ...]) -> None:
    """For all daemons that come."""
    config = read(tmp_path, BASE)
    failing(config, tmp_path, kept)
    assert seen(config, tmp_path, kept, *cleared)["failure"] == ""
    assert seen(config, tmp_path, kept)["state"] == "stopped"


def test_a_model_whose_settings_have_changed_has_not_failed(tmp_path: Path, kept: Path) -> None:
    """Whoever mended them restarted the daemon for it."""
    failing(read(tmp_path, BASE), tmp_path, kept)
    mended = {**BASE, "models": {"m": {**BASE["models"]["m"], "options": {"load_time": "2s"}}}}
    assert seen(read(tmp_path, mended), tmp_path, kept)["state"] == "stopped"


def test_a_failure_of_the_future_is_of_now() -> None:
    """The clock has been set back since."""
    model = ModelConfig("m")
    kept = {"m": Failure(WHY, 5000.0, fingerprint(model)), "gone": Failure(WHY, 1.0, "")}
    assert remembered(kept, {"m": model}, now=1000.0) == [events.FailureRemembered("m", WHY, 0.0)]
