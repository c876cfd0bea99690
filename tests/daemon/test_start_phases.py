"""Where the time of a start goes, as its log tells it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.api.test_wire import replica
from tests.daemon.rig import Rig, soon, tell
from vllmd.admin.counters import Counters
from vllmd.api.answers import Decision
from vllmd.config.types import ModelConfig
from vllmd.core import events
from vllmd.core.types import State
from vllmd.daemon.changes import Changes
from vllmd.daemon.last_starts import MOST_ENGINES, Start, Starts, in_words
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.serializers import NO_SETTINGS, line
from vllmd.engines import engine_of
from vllmd.engines.base import Progress
from vllmd.engines.start_phases import StartPhases, fields

CORE = "(EngineCore pid=8) INFO 11-20 19:00:00 [core.py:1] "


def test_a_phase_that_comes_back_has_one_sum() -> None:
    """vLLM imports in three processes, and profiles before and after it compiles."""
    phases = StartPhases(0.0)
    for phase, at in (("imports", 1.0), ("configuring", 9.0), ("imports", 10.0), ("weights", 17.0), ("weights", 18.0)):
        phases.enter(Progress(phase), at)
    assert phases.spent(20.0) == {"process": 1.0, "imports": 15.0, "configuring": 1.0, "weights": 3.0}
    assert phases.end(21.0) == {"process": 1.0, "imports": 15.0, "configuring": 1.0, "weights": 4.0}


def test_a_start_that_was_taken_over_tells_nothing() -> None:
    """Its log comes in one go then: every phase before that moment would have taken no time."""
    phases = StartPhases(0.0)
    phases.whole = False
    phases.enter(Progress("weights"), 5.0)
    assert phases.end(6.0) == {}


def test_words_and_journal_fields() -> None:
    """Fields of the journal are capitals, digits and underscores."""
    spent = {"process": 0.01, "warm-up": 2.26, "first request": 0.1}
    assert in_words(spent) == "warm-up 2.3 s, first request 0.1 s"
    assert in_words({"imports": 1.0, "weights": 2.0}, "x") == "imports 1.0 s, weights 2.0 s (x)"
    assert fields({}, "x") == {"VLLMD_LOADER": "x"}
    assert fields(spent) == {
        "VLLMD_START_PROCESS": "0.010",
        "VLLMD_START_WARM_UP": "2.260",
        "VLLMD_START_FIRST_REQUEST": "0.100",
    }


def test_the_last_starts_of_so_many_engines_are_kept() -> None:
    """Models come and go for years; the file of what was learnt must not grow with them."""
    starts = Starts()
    for number in range(MOST_ENGINES + 1):
        starts.note(str(number), Start(1.0))
    starts.note("1", Start(2.0))
    assert len(starts) == MOST_ENGINES
    assert "0" not in starts
    assert list(starts)[-1] == "1"


def test_they_outlive_the_daemon(tmp_path: Path) -> None:
    """It ends when it is idle, and the next one is asked how the last start went."""
    learnt = Learnt(tmp_path / "learnt.json")
    learnt.starts.note("m", Start(3.5, {"imports": 2.0}, "print 0.32"))
    learnt.save()
    retry = Learnt(tmp_path / "learnt.json")
    retry.load()
    assert retry.starts == {"m": Start(3.5, {"imports": 2.0}, "print 0.32")}


async def _told_while_compiling(rig: Rig) -> str:
    """Start, let the engine compile until it has been looked at, and let it end well; what was told meanwhile."""
    rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
    await rig.start()
    await soon(rig.launcher.started.wait())
    (process,) = rig.engine_manager.processes.values()
    rig.engine_manager.on_log(rig.instance, [f"{CORE}Starting to load model x", f"{CORE}Starting torch.compile"])
    told = process.phase_text
    rig.engine.answers.clear()
    assert isinstance(await rig.event(), events.EngineReady)
    return told


def test_compiling_is_told_as_for_the_first_time_only_the_first_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits five minutes is told that the next one will not; other settings compile anew."""

    async def story(rig: Rig) -> None:
        again = "compile, first time only"
        for options, told in (({}, again), ({}, "compile"), ({"quiet": True}, again)):
            rig.configure(options=options)
            assert await _told_while_compiling(rig) == told
            starts = rig.engine_manager.starts
            assert list(starts["m"].phases) == ["process", "imports", "weights", "compile"]
            rig.launcher.exit(rig.instance, 0)
            assert isinstance(await rig.event(), events.EngineExited)
            rig.launcher.started.clear()

    caplog.set_level("INFO")
    tell(story, tmp_path)
    record = next(record for record in caplog.records if "ready after" in record.getMessage())
    assert set(record.journal) >= {"MODEL", "VLLMD_START_IMPORTS", "VLLMD_START_COMPILE"}  # type: ignore[attr-defined]


def test_an_event_tells_where_the_time_went() -> None:
    """In words and in numbers."""
    said: list[Decision] = []

    async def play() -> None:
        current: Any = SimpleNamespace(model_of=lambda engine: engine)
        scheduler = SimpleNamespace(replicas_of=lambda name, now: [])
        dispatcher: Any = SimpleNamespace(scheduler=scheduler, now=lambda: 0.0, post=lambda event: None)
        learnt = Learnt(None)
        learnt.starts.note("m", Start(23.5, {"imports": 19.04, "weights": 2.0}))
        changes = Changes(current, Counters(), learnt, lambda engine: None)
        following = asyncio.ensure_future(anext(changes.watch()))
        await asyncio.sleep(0)
        changes.engine_event(events.EngineReady("m"), dispatcher)
        said.append(await soon(following))

    asyncio.run(play())
    assert said[0].why == "start done in 23.5 s: imports 19.0 s, weights 2.0 s"
    assert said[0].numbers == {"imports": 19.04, "weights": 2.0}


def test_a_line_shows_the_start_under_way_before_the_last_one() -> None:
    """While it starts, nobody asks how it went yesterday."""
    view, settings = replica("m", State.STARTING), NO_SETTINGS
    process: Any = SimpleNamespace(phases=StartPhases(), phase=Progress("x"), phase_text="x", running=None,
                                   instance="i", listen=SimpleNamespace(uds="", host="h", port=1), started=0.0,
                                   started_at=0.0, loader="")  # fmt: skip
    assert list(line(view, settings, process, last_start=Start(9.0, {"weights": 1.0})).start_phases) == ["process"]
    last = line(view, settings, None, last_start=Start(9.0, {"weights": 1.0}, "0f /e/vllm/0.33.0", "x"))
    assert (last.start_phases, last.loader, last.version) == ({"weights": 1.0}, "x", "0.33.0")
    assert Start(9.0, {}, "0f").version == Start(9.0).version == ""


LINES = [
    ("vllm", f"{CORE}Using max model len 512", "imports"),
    ("vllm", f"{CORE}Initializing a V1 LLM engine (v0.32.0) with config: model='x'", "workers"),
    ("vllm", f"{CORE}Warming up model for the compilation...", "compile"),
    ("vllm", f"{CORE}[backbone] Compiling model again due to a load failure from /x, reason: y", "compile"),
    ("vllm", f"{CORE}[backbone] Directly load AOT compilation from path /x", "profiling"),
    ("sglang", "[2026-11-28 17:00:00] server_args=ServerArgs(model_path='x')", "configuring"),
    ("sglang", "[2026-11-28 17:00:00] Load weight begin. avail mem=78.58 GB", "weights"),
    ("sglang", "[2026-11-28 17:00:00] Load weight end. elapsed=3.1 s, type=X, dtype=torch.bfloat16", "profiling"),
    ("sglang", "[2026-11-28 17:00:00] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 1", "profiling"),
    ("sglang", "[2026-11-28 17:00:00] Try DeepGEMM JIT Compiling for <x> N=1", "compile"),
    ("sglang", "[2026-11-28 17:00:00] Capture decode CUDA graph begin. This can take up to minutes.", "graphs"),
    ("sglang", "[2026-11-28 17:00:00] Capture decode CUDA graph end. elapsed=9 s", "profiling"),
    ("sglang", "[2026-11-28 17:00:00] max_total_num_tokens=1, chunked_prefill_size=2", "warm-up"),
    ("sglang", "[2026-11-28 17:00:00] The server is fired up and ready to roll!", "serving"),
    ("transformers", "Loading Qwen/Qwen3-0.6B@main", "weights"),
    ("transformers", "Loading weights:  50%|#####     | 1/2 [00:00<00:00, 9.0it/s]", "weights"),
    ("transformers", "INFO:     Uvicorn running on http://127.0.0.1:8001 (Press CTRL+C to quit)", "serving"),
    ("llama.cpp", "0.02.754.083 I cmn          init: llama threadpool init, n_threads = 2", "context"),
    ("llama.cpp", "0.02.9 W common_init_from_params: warming up the model with an empty run", "warm-up"),
]


@pytest.mark.parametrize(("kind", "text", "phase"), LINES, ids=[f"{kind}-{phase}" for kind, _, phase in LINES])
def test_each_kinds_log_is_read(kind: str, text: str, phase: str) -> None:
    """Lines of vLLM 0.32, SGLang 0.5.23, transformers 5 and llama.cpp."""
    found = engine_of(ModelConfig("m", engine=kind, model="x")).progress(text)
    assert found is not None
    assert (found.phase, found.once) == (phase, phase == "compile")
