"""An engine that lives and is of no use is found and ended; one that is only busy is left alone."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon.rig import Rig, tell
from vllmd.core import events
from vllmd.daemon import health
from vllmd.proxy import upstream

BROKEN = (500, b'{"error": {"message": "CUDA error: an illegal memory access was encountered"}}')


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for is not waited for long; a regular look comes only where a test wants one."""
    for name, seconds in {"LOOK_AGAIN": 0.02, "PATIENCE": 0.2, "REFUSED": 0.05, "WRONG": 0.05, "SILENT": 0.3}.items():
        monkeypatch.setattr(health, name, seconds)


async def crash(rig: Rig) -> str:
    """Why it was ended, as the core hears it."""
    gone = await rig.event()
    assert isinstance(gone, events.EngineExited)
    assert rig.launcher.signals == ["SIGKILL"]
    return gone.reason


def test_nobody_listens_any_more(tmp_path: Path) -> None:
    """Its socket is gone, and the request that found it so brings the look."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.close()
        rig.engine_manager.note_answer("m", 0, failed=True)
        assert "was killed" in await crash(rig)

    tell(story, tmp_path)


def test_where_we_cannot_ask_it_is_not_at_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of file descriptors, of which clients' connections may have taken all: no engine is killed for that."""
    looked = list[float]()

    async def full(*_: object) -> socket.socket:
        looked.append(1.0)
        raise OSError(errno.EMFILE, "Too many open files")

    async def story(rig: Rig) -> None:
        await rig.ready()
        with monkeypatch.context() as out_of_files:
            out_of_files.setattr(upstream, "connected", full)
            for _ in range(5):
                seen = len(looked)
                rig.engine_manager.note_answer("m", 0, failed=True)
                while len(looked) == seen:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await asyncio.sleep(health.REFUSED)
        assert rig.launcher.signals == []

    tell(story, tmp_path)


def test_it_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal: nothing fails, for nothing is answered. It is found without any request."""
    monkeypatch.setattr(health, "LOOK", 0.05)

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/health"] = None
        assert "was killed" in await crash(rig)

    tell(story, tmp_path)


def test_its_core_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's server lives on without it and says 503."""
    monkeypatch.setattr(health, "LOOK", 0.05)

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/health"] = (503, b"")
        assert "answered 503" in await crash(rig)

    tell(story, tmp_path)


def test_it_answers_everything_with_an_error(tmp_path: Path) -> None:
    """Its health looks well; a question of ours gets the same answer as the clients'."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/v1/chat/completions"] = BROKEN
        for _ in range(3):
            rig.engine_manager.note_answer("m", 500, failed=False)
        assert "illegal memory access" in await crash(rig)

    tell(story, tmp_path)


def test_errors_that_the_clients_make_harm_nobody(tmp_path: Path) -> None:
    """One that answers our question well goes on, however many requests end in 500."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        for _ in range(20):
            rig.engine_manager.note_answer("m", 500, failed=False)
        engine.was_asked.clear()
        while "/v1/chat/completions" not in engine.asked:
            await engine.was_asked.wait()
            engine.was_asked.clear()
        process = rig.engine_manager.processes["m"]
        while process.health.errors:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert rig.launcher.signals == []

    tell(story, tmp_path)


def test_one_of_several_replicas_is_judged_by_the_core_alone(tmp_path: Path) -> None:
    """A request that names it (below /upstream) fails: nothing is noted, and nothing looked at, beside that."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        process = rig.engine_manager.processes["m"]
        process.model = replace(process.model, replica_of="several")
        rig.engine_manager.note_answer("m", 0, failed=True)
        assert not process.health.doubt.is_set()

    tell(story, tmp_path)


def test_one_that_is_busy_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not answer looks, but its requests."""
    monkeypatch.setattr(health, "SILENT", 0.0)

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/health"] = None
        for _ in range(3):
            engine.was_asked.clear()
            rig.engine_manager.note_answer("m", 0, failed=True)
            await engine.was_asked.wait()
            rig.engine_manager.note_answer("m", 200, failed=False)
            await engine.left.wait()
            engine.left.clear()
        assert rig.launcher.signals == []

    tell(story, tmp_path)
