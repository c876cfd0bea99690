"""L's ModelManager: the offline engine in a process of its own, with a fake vLLM, and once with the real one.

L is the Python library: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.site import HERE, exists, script, wait_until
from tests.conftest import RealVllm
from tests.vllm_on_cpu import ENV, FORKING
from vllmd import errors
from vllmd.client import ModelManager, VLLMEngineArgs


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module called vllm that has no model."""
    monkeypatch.syspath_prepend(str(HERE / "fake"))
    import vllm

    yield vllm
    for name in [name for name in sys.modules if name == "vllm"]:
        monkeypatch.delitem(sys.modules, name)


def pids(manager: ModelManager) -> list[int]:
    """The engine's process and that of its core."""
    return [int(pid) for pid in manager.llm.generate("x")[0].outputs[0].text.split()]


def test_L_with_loads_generates_and_releases(fake: Any) -> None:
    """What comes back are vLLM's own objects; afterwards neither process is left, however it takes SIGTERM."""
    with ModelManager(engine_args=fake.EngineArgs(model="m", max_model_len=8)) as model:
        model.load_model()
        output = model.llm.generate(["hello"], fake.SamplingParams(max_tokens=1))[0]
        assert isinstance(output, fake.RequestOutput)
        assert output.prompt == ["hello"]
        assert "'max_model_len': 8" in model.llm.chat([])[0].outputs[0].text
        running = pids(model)
        assert all(map(exists, running))
    assert not any(map(exists, running))


def test_L_load_model_is_idempotent(fake: Any) -> None:
    """Two calls, one engine; after stop() a third one loads it anew."""
    manager = ModelManager(VLLMEngineArgs(model="m"))
    manager.load_model()
    first = manager.pid
    manager.load_model()
    assert manager.pid == first
    manager.stop()
    manager.stop()
    assert not manager.loaded
    with pytest.raises(errors.Conflict, match="load_model"):
        manager.llm.generate("x")
    manager.load_model()
    assert manager.pid != first
    manager.stop()


def test_L_tokenizer(fake: Any) -> None:
    """A copy on this side."""
    with ModelManager({"model": "m"}) as model:
        assert model.tokenizer.encode("ab") == [97, 98]


def test_L_model_timer_releases(fake: Any) -> None:
    """After its time, after the call that runs then; a new countdown replaces the old one."""
    with ModelManager({"model": "m"}) as model:
        assert model.remaining_time is None
        running = pids(model)
        model.reset_shutdown_timer(0.2)
        model.reset_shutdown_timer(600)
        time.sleep(0.3)  # the first one would have ended it
        assert model.loaded and 0 < (model.remaining_time or 0) < 600
        model.reset_shutdown_timer(0.2)
        assert model.llm.generate("x", "slow")
        wait_until(lambda: not any(map(exists, running)))
        assert model.remaining_time is None


def test_L_model_verbose(fake: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Progress and the engine's log, or neither."""
    for verbose in (True, False):
        with ModelManager({"model": "m"}, verbose=verbose):
            pass
        printed = capfd.readouterr().out
        assert ("loaded after" in printed, "released" in printed) == (verbose, verbose)


def test_a_model_that_cannot_be_loaded(fake: Any) -> None:
    """The error has vLLM's reason and its last words, and no process is left."""
    manager = ModelManager({"model": "broken"})
    with pytest.raises(errors.EngineFailed, match=r"(?s)cannot load broken.*no such file"):
        manager.load_model()
    assert not manager.loaded
    with pytest.raises(errors.EngineFailed, match="SIGSEGV"):
        ModelManager({"model": "dies"}).load_model()


def test_L_model_manager_without_vllm() -> None:
    """What to install, and how to name another Python that has it."""
    with pytest.raises(errors.EngineFailed, match=r"No module named 'vllm'; .*pip install vllm, .*python="):
        ModelManager({"model": "m"}).load_model()


def test_an_engine_that_dies_or_raises(fake: Any) -> None:
    """Its errors come back as they are, those that cannot travel as text; its death is told as such."""
    with ModelManager({"model": "m"}) as model:
        with pytest.raises(errors.EngineFailed, match="Unpicklable: out of luck"):
            model.llm.generate("x", "raise")
        with pytest.raises(errors.EngineFailed, match="lambda"):
            model.llm.lambda_result()
        with pytest.raises(AttributeError, match="no_such"):
            model.llm.no_such()
        assert model.llm.generate("x")
        with pytest.raises(errors.EngineFailed, match="SIGKILL"):
            model.llm.generate(pids(model)[0], "kill")
        model.load_model()
        assert model.llm.generate("x")


@pytest.mark.parametrize("killed", ["the engine", "its keeper"])
def test_L_an_engine_that_is_killed_takes_its_core_along(fake: Any, killed: str) -> None:
    """The core is nobody's child then, and would hold the GPU for ever; in the middle of a call, too."""
    with ModelManager({"model": "m"}) as model:
        engine, core = pids(model)
        victim = engine if killed == "the engine" else model.pid
        with pytest.raises(errors.EngineFailed, match="SIGKILL"):
            model.llm.generate(victim, "kill")
        wait_until(lambda: not exists(engine) and not exists(core), limit=0.0 if killed == "the engine" else 20.0)


def test_L_an_engine_that_hangs_is_ended(fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the middle of a call that another thread waits for: it has some time to end in order, no more."""
    monkeypatch.setattr("vllmd.client.offline.END_LIMIT", 0.2)
    model = ModelManager({"model": "m"})
    model.load_model()
    running = pids(model)
    hangs, told = tmp_path / "hangs", threading.Event()

    def call() -> None:
        with pytest.raises(errors.EngineFailed):
            model.llm.generate(str(hangs), "hang")
        told.set()

    threading.Thread(target=call).start()
    wait_until(hangs.exists)
    model.stop()
    assert not any(map(exists, running))
    assert told.wait(120)


def test_an_argument_that_cannot_travel_harms_nobody(fake: Any) -> None:
    """It is the caller's mistake, and must not cost him a model that took minutes to load."""
    with ModelManager({"model": "m"}) as model:
        running = pids(model)
        with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
            model.llm.generate(lambda: "x")
        assert pids(model) == running


def test_an_interrupted_call_is_never_answered_to_the_next(fake: Any) -> None:
    """Ctrl-C in the middle of a call leaves an answer behind that nobody may take for his own."""
    code = """
import os, signal
from vllmd import errors
from vllmd.client import ModelManager, offline
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, or CI, may have it ignored
offline.END_LIMIT = 600.0  # whoever interrupted a call does not wait for its end
model = ModelManager({"model": "m"})
model.load_model()
try:
    model.llm.generate(os.getpid(), "interrupt")
except KeyboardInterrupt:
    pass
try:
    print(model.llm.generate("second")[0].prompt)
except errors.EngineFailed:
    model.load_model()
    print(model.llm.generate("third")[0].prompt)
"""
    assert script(code, {"PYTHONPATH": path()}).communicate(timeout=120)[0] == "third\n"


def path() -> str:
    return f"{HERE / 'fake'}:{HERE.parents[1]}"


def test_L_a_killed_program_leaves_no_engine(fake: Any) -> None:
    """However it ends, the GPU is free: in the middle of a call, too."""
    code = """
from vllmd.client import ModelManager
model = ModelManager({"model": "m"})
model.load_model()
print(model.llm.generate("x")[0].outputs[0].text)
while True:
    model.llm.generate("x", "slow")
"""
    program = script(code, {"PYTHONPATH": path()})
    assert program.stdout
    running = [int(pid) for pid in program.stdout.readline().split()]
    program.kill()
    program.wait()
    wait_until(lambda: not any(map(exists, running)))


def test_words_of_a_command_line_are_refused(fake: Any) -> None:
    """They mean nothing to vllm.LLM, and must not be dropped silently."""
    with pytest.raises(TypeError, match="extra_args"):
        ModelManager(VLLMEngineArgs(model="m", extra_args=["--x"]))


REAL = """
import json
from vllm import EngineArgs, SamplingParams
from vllmd.client import ModelManager
args = EngineArgs(model={model!r}, max_num_seqs=2, max_model_len=256, max_num_batched_tokens=8192, enforce_eager=True)
with ModelManager(engine_args=args) as model:
    model.load_model()
    pid = model.pid
    output = model.llm.generate(["Hello"], SamplingParams(max_tokens=3, temperature=0))[0]
    from vllmd.client.offline_child import descendants
    running = [pid, *descendants(pid)]
    size = len(model.tokenizer)
print(json.dumps([type(output).__module__, len(output.outputs[0].token_ids), size, running]))
"""


@pytest.mark.vllm
def test_L_the_real_vllm(real_vllm: RealVllm, tmp_path: Path) -> None:
    """RequestOutput of vLLM's own, its tokenizer, and not one of its processes afterwards."""
    env = {**ENV, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [real_vllm.command.with_name("python"), "-c", REAL.format(model=str(real_vllm.model))],
        env={**env, "PYTHONPATH": f"{FORKING}:{HERE.parents[1]}"},
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr
    import json

    module, tokens, size, running = json.loads(done.stdout.splitlines()[-1])
    assert (module, tokens, size) == ("vllm.outputs", 3, 4096)
    assert len(running) >= 2
    assert not any(map(exists, running))
