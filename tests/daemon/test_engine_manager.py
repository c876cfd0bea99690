"""Each command of the core ends in exactly one event, whatever the launcher and the engine do meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon.rig import ASLEEP, AWAKE, OK, FakeEngine, Rig, soon, tell
from vllmd.core import commands, events
from vllmd.core.types import Source
from vllmd.daemon import engine_manager, launch_planner, memory, sleeps
from vllmd.daemon.calls import nobody_listens
from vllmd.daemon.ports import PortPool
from vllmd.engines.base import Call, Listen
from vllmd.engines.environments import Environment
from vllmd.errors import Unavailable
from vllmd.gpu import Sample
from vllmd.launcher.client import LauncherFailed
from vllmd.sizes import GiB

SLEEP, STOP = commands.SleepEngine("m", 1), commands.StopEngine("m", "because")
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in vain is not waited for long."""
    monkeypatch.setattr(memory, "RETURN_LIMIT", 0.2)
    monkeypatch.setattr(memory, "RETURN_POLL", 0.02)
    monkeypatch.setattr(engine_manager, "KILL_LIMIT", 0.1)


# ---- starts -------------------------------------------------------------------------------------


def test_an_engine_is_asked_when_somebody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once at first; while the kernel refuses a connection no request is made for it, and then until it is ready."""
    tried: list[bool] = []
    asked: list[int] = []  # how often it had been tried

    def refused(listen: Listen) -> bool:
        tried.append(len(tried) < 3)
        return tried[-1]

    async def answers(listen: Listen, probe: Call) -> bool:
        asked.append(len(tried))
        return len(asked) == 4

    monkeypatch.setattr(engine_manager, "READY_POLL", 0.0)
    monkeypatch.setattr(engine_manager, "nobody_listens", refused)
    monkeypatch.setattr(engine_manager, "answers", answers)

    async def story(rig: Rig) -> None:
        await rig.ready()
        assert asked == [0, 4, 4, 4]

    tell(story, tmp_path)


def test_whether_somebody_listens_is_the_kernels_word(tmp_path: Path) -> None:
    """vLLM binds its socket long before it listens."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        places = [Listen(uds=path), Listen(port=port.getsockname()[1])]
        assert nobody_listens(places[0])
        unix.bind(path)
        assert [nobody_listens(place) for place in places] == [True, True]
        unix.listen()
        port.listen()
        assert [nobody_listens(place) for place in places] == [False, False]
    assert [nobody_listens(Listen(host="::1", port=1)), nobody_listens(Listen(uds="/" + 200 * "x"))] == [False, False]


def test_a_start_orders_waits_and_measures(tmp_path: Path) -> None:
    """The order has all that a later daemon must know; the event has what the device says it holds."""

    async def story(rig: Rig) -> None:
        await rig.start()
        ready = await rig.event()
        assert isinstance(ready, events.EngineReady)
        assert ready.footprint
        assert (ready.footprint.awake, ready.footprint.source) == (AWAKE, Source.MEASURED)
        (order,) = rig.launcher.orders
        assert order.argv[order.argv.index("--device-file") + 1] == str(rig.gpu.path)
        assert order.argv[order.argv.index("--memory") + 1] == str(AWAKE)
        assert json.loads(order.metadata["listen"])["uds"] == order.listen_uds
        assert (order.metadata["model"], order.metadata["devices"]) == ("m", "[0]")
        assert rig.launcher.notes[order.instance]["state"] == "ready"
        await rig.nothing_more()

    tell(story, tmp_path)


def test_an_engine_is_told_where_what_it_compiles_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its version, in the home that it sees; a variable of the model's own is left alone."""
    found = Environment("vllm", "0.33.0", tmp_path)
    monkeypatch.setattr(launch_planner.environments, "chosen", lambda model: found)

    async def story(rig: Rig) -> None:
        rig.configure(env={"HOME": "/h", "TRITON_CACHE_DIR": "/mine"})
        await rig.start()
        await rig.event()
        (order,) = rig.launcher.orders
        assert order.env["VLLM_CACHE_ROOT"] == "/h/.cache/vllmd/vllm/0.33.0/vllm"
        assert order.env["TRITON_CACHE_DIR"] == "/mine"

    tell(story, tmp_path)


@pytest.mark.parametrize("permanent", [True, False])
def test_what_the_launcher_refuses_is_a_failed_start(tmp_path: Path, permanent: bool) -> None:
    """Its words are the reason; whether trying again could help is its word as well."""

    async def story(rig: Rig) -> None:
        rig.launcher.refusal = LauncherFailed("there is no /no/such/engine", permanent=permanent)
        await rig.start()
        assert await rig.event() == events.EngineStartFailed("m", "there is no /no/such/engine", permanent=permanent)
        assert not rig.engine_manager.processes

    tell(story, tmp_path)


def test_settings_that_cannot_work_ask_nothing_of_the_launcher(tmp_path: Path) -> None:
    """And give back the port that was set aside, else the pool of two would be empty by the third."""

    async def story(rig: Rig) -> None:
        rig.configure(engine="nonesuch")
        for _ in range(3):
            await rig.start()
            failed = await rig.event()
            assert isinstance(failed, events.EngineStartFailed)
            assert failed.permanent
            assert "unknown engine 'nonesuch'" in failed.reason
        assert not rig.launcher.orders

    tell(story, tmp_path)


def test_a_model_that_nobody_configured_fails_instead_of_starting_for_ever(tmp_path: Path) -> None:
    """A defect of ours must not leave the core waiting for an answer."""

    async def story(rig: Rig) -> None:
        rig.engine_manager.configure({}, {})
        await rig.start()
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert "internal error" in failed.reason

    tell(story, tmp_path)


def test_an_exit_during_the_start_is_told_with_the_last_words(tmp_path: Path) -> None:
    """Nobody should have to look for the log."""

    async def story(rig: Rig) -> None:
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
        await rig.start()
        await soon(engine_asked(rig))
        rig.launcher.exit(rig.instance, 3, "loading", "ValueError: no such dtype")
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert "exited with status 3" in failed.reason
        assert "ValueError: no such dtype" in failed.reason
        assert not failed.memory
        assert not rig.engine_manager.processes
        await rig.nothing_more()

    tell(story, tmp_path)


@pytest.mark.parametrize("lost", [2, 4])
def test_a_port_that_another_process_takes_meanwhile_costs_no_request(lost: int, tmp_path: Path) -> None:
    """The kernel gives the ports of outgoing connections while engines look for theirs; but not for ever."""

    async def story(rig: Rig) -> None:
        rig.configure(engine="tei", command="/bin/true")
        await rig.start()
        ports = []
        for _ in range(min(lost, 1 + engine_manager.MOST_PORTS_LOST)):
            await soon(rig.launcher.started.wait())
            rig.launcher.started.clear()
            ports.append(rig.engine_manager.processes["m"].listen.port)
            rig.launcher.exit(rig.instance, 3, "[Errno 98] error while attempting to bind: address already in use")
        assert ports[0] != ports[1]
        if lost > engine_manager.MOST_PORTS_LOST:
            failed = await rig.event()
            assert isinstance(failed, events.EngineStartFailed) and "another process has its port" in failed.reason
            assert not rig.engine_manager.processes
        else:
            await soon(rig.launcher.started.wait())
            rig.engine_manager.stop(STOP)
            assert await rig.event() == events.EngineStopped("m", {})
        await rig.nothing_more()

    tell(story, tmp_path)


def test_what_an_engine_says_on_its_way_out_is_told_without_its_secrets(tmp_path: Path) -> None:
    """Clients are told why it did not start, and engines write their settings into their logs."""

    async def story(rig: Rig) -> None:
        rig.configure(hf_token="hf_verysecret", env={"OPENAI_API_KEY": "sk-1234567"}, options={"load_time": "0.5s"})
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
        await rig.start()
        await soon(engine_asked(rig))
        rig.launcher.exit(rig.instance, 1, "args: {'token': 'hf_verysecret'}", "ValueError: bad key sk-1234567 in 0.5s")
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert "hf_verysecret" not in failed.reason
        assert "ValueError: bad key (hidden) in 0.5s" in failed.reason
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_start_that_lacked_memory_looks_at_the_devices_before_it_says_so(tmp_path: Path) -> None:
    """The core makes room by what is really there, not by what it believed."""

    async def story(rig: Rig) -> None:
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
        await rig.start()
        await soon(engine_asked(rig))
        rig.launcher.exit(rig.instance, 1, OOM)
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert (failed.memory, rig.looked) == (True, 1)

    tell(story, tmp_path)


def test_a_start_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    """With the phase that it hung in."""

    async def story(rig: Rig) -> None:
        rig.configure(start_timeout=0.1)
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
        await rig.start()
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert "not ready after start_timeout (0.1 s)" in failed.reason
        assert rig.launcher.signals == ["SIGKILL"]
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_download_does_not_count_as_start_time(tmp_path: Path) -> None:
    """A first start fetches gigabytes: that takes what it takes."""

    async def story(rig: Rig) -> None:
        rig.configure(start_timeout=0.2)
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
        await rig.start()
        await soon(rig.launcher.started.wait())
        rig.engine_manager.on_log(rig.instance, ["Downloading shards: 10%"])  # at once: it has 0.2 s for anything else
        await soon(engine_asked(rig))
        await asyncio.sleep(0.5)  # more than twice what it may take
        assert rig.posted.empty()
        rig.engine.answers.clear()
        assert isinstance(await rig.event(), events.EngineReady)

    tell(story, tmp_path)


def test_the_core_is_told_how_far_a_start_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each phase that its log shows, not for each line."""
    monkeypatch.setattr(engine_manager, "share_begun", lambda kind, phase: {"download": 0.0, "weights": 0.3}.get(phase))

    async def story(rig: Rig) -> None:
        rig.prepare = lambda engine: engine.answers.update({"/health": (503, b"")})
        await rig.start()
        await soon(engine_asked(rig))
        for line in (
            "Downloading shards: 10%",
            "Downloading shards: 20%",
            "Loading safetensors",
            "Application startup",
        ):
            rig.engine_manager.on_log(rig.instance, [line])
        assert await rig.event() == events.StartProgressed("m", 0.0)
        assert await rig.event() == events.StartProgressed("m", 0.3)
        rig.engine.answers.clear()
        assert isinstance(await rig.event(), events.EngineReady)

    tell(story, tmp_path)


def test_a_probe_that_breaks_leaves_no_engine_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect counts as a failed start, and a failed start leaves nothing."""

    async def story(rig: Rig) -> None:
        def broken(*_: object) -> None:
            raise RuntimeError("oops")

        monkeypatch.setattr(engine_manager, "answers", broken)
        await rig.start()
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert "oops" in failed.reason
        assert (rig.launcher.signals, rig.engine_manager.processes) == (["SIGKILL"], {})
        await rig.nothing_more()

    tell(story, tmp_path)


# ---- sleep and wake -----------------------------------------------------------------------------


def test_a_sleep_tells_what_came_free(tmp_path: Path) -> None:
    """As the device says, after it has come free."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        rig.engine_manager.sleep(SLEEP)
        assert await rig.event() == events.EngineAsleep("m", 1, {0: AWAKE - ASLEEP})
        assert [path for path in engine.asked if "sleep" in path] == ["/sleep?level=1&mode=wait"]
        assert (
            rig.launcher.notes[rig.instance] | {"state": "sleeping", "level": "1"} == rig.launcher.notes[rig.instance]
        )
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_sleep_that_fails_says_what_the_engine_said(tmp_path: Path) -> None:
    """Its state is unknown then; the core stops it."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/sleep"] = (500, b"CUDA error")
        rig.engine_manager.sleep(SLEEP)
        failed = await rig.event()
        assert isinstance(failed, events.EngineSleepFailed)
        assert "answered 500 instead of 200" in failed.reason
        assert "CUDA error" in failed.reason

    tell(story, tmp_path)


def test_a_sleep_that_frees_nothing_has_failed(tmp_path: Path) -> None:
    """200 is not enough: it was put to sleep for its memory."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/sleep"] = OK
        rig.engine_manager.sleep(SLEEP)
        failed = await rig.event()
        assert isinstance(failed, events.EngineSleepFailed)
        assert "still holds 51200 MiB on device 0" in failed.reason

    tell(story, tmp_path)


def test_a_device_that_cannot_be_read_right_after_a_sleep_is_read_again(tmp_path: Path) -> None:
    """A busy driver is no proof that everything came free."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/sleep"] = OK
        sample, busy = rig.memory.devices.sample, iter([False, True])

        def shaky() -> Sample:
            if next(busy, False):
                raise RuntimeError("the driver is busy")
            return sample()

        rig.memory.devices.sample = shaky  # type: ignore[method-assign]
        rig.engine_manager.sleep(SLEEP)
        failed = await rig.event()
        assert isinstance(failed, events.EngineSleepFailed)
        assert "still holds 51200 MiB on device 0" in failed.reason

    tell(story, tmp_path)


def test_an_engine_that_dies_later_is_told_with_its_error(tmp_path: Path) -> None:
    """Its status says nothing: vLLM exits with 0 when its core has died. Where no error is told, none is invented."""

    async def story(rig: Rig) -> None:
        fatal = (
            "(EngineCore pid=4) ERROR 11-28 21:36:15 [core.py:1301] torch.AcceleratorError: CUDA error: illegal access"
        )
        dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)"
        served = 'INFO:  - "POST /v1/embeddings HTTP/1.1" 500 Internal Server Error'
        for lines, told in (((fatal, dead), ": torch.AcceleratorError: CUDA error: illegal access"), ((served,), "")):
            await rig.ready()
            rig.launcher.exit(rig.instance, 0, *lines)
            exited = await rig.event()
            assert isinstance(exited, events.EngineExited)
            assert exited.reason.startswith(f"the engine exited with status 0{told}; its last log lines:\n")

    tell(story, tmp_path)


def test_an_engine_that_dies_of_a_sleep_call_has_exited(tmp_path: Path) -> None:
    """One event, and it says that it is gone, not that a call failed."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/sleep"] = None
        rig.engine_manager.sleep(SLEEP)
        await soon(asked(engine, "/sleep"))
        rig.launcher.exit(rig.instance, -11)
        exited = await rig.event()
        assert isinstance(exited, events.EngineExited)
        assert "killed by SIGSEGV" in exited.reason
        await rig.nothing_more()

    tell(story, tmp_path)


def test_an_engine_that_dies_after_its_last_call_has_exited(tmp_path: Path) -> None:
    """Between its answer and ours nobody else would tell: the core would believe in an engine that is gone."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/sleep"] = OK  # it frees nothing, so that its memory is waited for
        rig.engine_manager.sleep(SLEEP)
        await soon(asked(engine, "/sleep"))
        rig.launcher.exit(rig.instance, 1)
        assert isinstance(await rig.event(), events.EngineExited)
        assert not rig.engine_manager.processes
        await rig.nothing_more()

    tell(story, tmp_path)


def test_an_engine_that_dies_of_its_warm_up_has_exited(tmp_path: Path) -> None:
    """It was ready, and is not any more when the core would hear of it."""

    async def story(rig: Rig) -> None:
        rig.configure(warm_up=True)
        rig.prepare = lambda engine: engine.answers.update({"/v1/completions": None})
        await rig.start()
        await soon(engine_asked(rig))
        await soon(asked(rig.engine, "/v1/completions"))
        rig.launcher.exit(rig.instance, 1)
        assert isinstance(await rig.event(), events.EngineExited)
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_wake_from_level_2_goes_step_by_step(tmp_path: Path) -> None:
    """Weights, their contents, the cache; the prefix cache is emptied, and may refuse."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.asked.clear()
        engine.answers["/reset_prefix_cache"] = (500, b"")
        rig.engine_manager.wake(commands.WakeEngine("m", 2))
        assert await rig.event() == events.EngineAwake("m")
        assert engine.asked == [
            "/wake_up?tags=weights",
            "/collective_rpc",
            "/wake_up?tags=kv_cache",
            "/reset_prefix_cache",
        ]

    tell(story, tmp_path)


def test_a_step_of_a_wake_that_fails_ends_it(tmp_path: Path) -> None:
    """An engine without its weights must not be given its cache and then requests."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.asked.clear()
        engine.answers["/collective_rpc"] = (500, b"no such file")
        rig.engine_manager.wake(commands.WakeEngine("m", 2))
        assert isinstance(await rig.event(), events.EngineWakeFailed)
        assert engine.asked[-1] == "/collective_rpc"
        assert rig.launcher.notes[rig.instance]["state"] == "waking"  # for the next daemon

    tell(story, tmp_path)


# ---- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("says", "survived"), [("one two", True), ("one !!!", False)])
def test_freezing_is_proved_in_the_middle_of_an_answer(tmp_path: Path, says: str, survived: bool) -> None:
    """The same question twice: the second answer comes only after the wake, and must be the same."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        answers = iter(["one two", says])

        async def completion() -> bytes:
            text = next(answers)
            if engine.asked.count("/v1/completions") == 1:
                await asyncio.sleep(0.1)  # the length of an answer, so that it has a middle
            else:
                await engine.woken.wait()  # frozen
            return json.dumps({"choices": [{"text": text}]}).encode()

        engine.completion = completion
        rig.engine_manager.prove_freeze(commands.ProveFreeze("m"))
        assert await rig.event() == events.FreezeProved("m", survived)
        calls = [path for path in engine.asked if path in ("/v1/completions", "/sleep?level=1&mode=keep", "/wake_up")]
        assert calls == ["/v1/completions", "/v1/completions", "/sleep?level=1&mode=keep", "/wake_up"]

    tell(story, tmp_path)


def test_an_answer_that_was_over_before_the_sleep_proves_nothing(tmp_path: Path) -> None:
    """Then nothing was frozen."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/v1/completions"] = (200, b'{"choices": [{"text": "one"}]}')
        rig.engine_manager.prove_freeze(commands.ProveFreeze("m"))
        assert await rig.event() == events.FreezeProved("m", survived=False)

    tell(story, tmp_path)


# ---- stops --------------------------------------------------------------------------------------


def test_a_stop_asks_first(tmp_path: Path) -> None:
    """SIGTERM is enough for an engine that is well."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        rig.engine_manager.stop(STOP)
        assert await rig.event() == events.EngineStopped("m", {})
        assert (rig.launcher.signals, rig.engine_manager.processes) == (["SIGTERM"], {})
        await rig.nothing_more()

    tell(story, tmp_path)


def test_who_does_not_listen_is_killed(tmp_path: Path) -> None:
    """After stop_timeout, with its whole cgroup."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        rig.launcher.deaf = {"SIGTERM"}
        rig.engine_manager.stop(STOP)
        assert await rig.event() == events.EngineStopped("m", {})
        assert rig.launcher.signals == ["SIGTERM", "SIGKILL"]

    tell(story, tmp_path)


def test_a_forced_stop_does_not_ask(tmp_path: Path) -> None:
    """``kill`` means at once."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        rig.engine_manager.stop(commands.StopEngine("m", "now", kill=True))
        assert await rig.event() == events.EngineStopped("m", {})
        assert rig.launcher.signals == ["SIGKILL"]

    tell(story, tmp_path)


def test_what_cannot_be_killed_keeps_its_memory_in_the_books(tmp_path: Path) -> None:
    """A process stuck in the driver: its device is reported as not given back, so that it is avoided."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        rig.launcher.deaf = {"SIGTERM", "SIGKILL"}
        rig.engine_manager.stop(STOP)
        assert await rig.event() == events.EngineStopped("m", {0: AWAKE})

    tell(story, tmp_path)


def test_memory_that_nobody_owns_after_a_stop_is_missing(tmp_path: Path) -> None:
    """The processes are gone and the driver did not take it back."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        rig.launcher.dying = lambda: rig.gpu.lose(20 * GiB)
        rig.engine_manager.stop(STOP)
        assert await rig.event() == events.EngineStopped("m", {0: 20 * GiB})

    tell(story, tmp_path)


def test_a_stop_overtakes_a_start(tmp_path: Path) -> None:
    """Even while the launcher is still at it: one event for both, and no engine that nobody knows of."""

    async def story(rig: Rig) -> None:
        rig.launcher.held_up = asyncio.Event()
        await rig.start()
        await soon(rig.launcher.ordered.wait())
        rig.engine_manager.stop(STOP)
        rig.launcher.held_up.set()
        assert await rig.event() == events.EngineStopped("m", {})
        assert (rig.launcher.signals, rig.launcher.engines) == (["SIGTERM"], {})
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_stop_overtakes_a_start_that_the_launcher_refuses(tmp_path: Path) -> None:
    """Then there is nothing to stop."""

    async def story(rig: Rig) -> None:
        rig.launcher.held_up, rig.launcher.refusal = asyncio.Event(), LauncherFailed("no")
        await rig.start()
        await soon(rig.launcher.ordered.wait())
        rig.engine_manager.stop(STOP)
        rig.launcher.held_up.set()
        assert await rig.event() == events.EngineStopped("m", {})
        assert not rig.launcher.signals
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_stop_overtakes_a_sleep_that_hangs(tmp_path: Path) -> None:
    """The hanging call is broken off, and never answered."""

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        engine.answers["/sleep"] = None
        rig.engine_manager.sleep(SLEEP)
        await soon(asked(engine, "/sleep"))
        rig.engine_manager.stop(STOP)
        assert await rig.event() == events.EngineStopped("m", {})
        await soon(engine.left.wait())
        await rig.nothing_more()

    tell(story, tmp_path)


def test_stopping_what_is_not_there_is_done(tmp_path: Path) -> None:
    """It died a moment before."""

    async def story(rig: Rig) -> None:
        rig.engine_manager.stop(STOP)
        assert await rig.event() == events.EngineStopped("m")

    tell(story, tmp_path)


# ---- the rest -----------------------------------------------------------------------------------


def test_a_death_that_nobody_asked_for_is_told_with_its_reason(tmp_path: Path) -> None:
    """Status or signal, and the last lines."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        rig.launcher.exit(rig.instance, -9, "EngineCore died")
        exited = await rig.event()
        assert isinstance(exited, events.EngineExited)
        assert "killed by SIGKILL" in exited.reason
        assert "EngineCore died" in exited.reason
        rig.engine_manager.on_exit(engine_manager.ExitReport(rig.instance, 0))  # told twice, counted once
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_stray_is_ended_without_a_word_to_the_core(tmp_path: Path) -> None:
    """The core never knew of it."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        process = rig.engine_manager.processes.pop("m")
        await soon(rig.engine_manager.end_unmanaged(process))
        assert (rig.launcher.signals, rig.launcher.engines) == (["SIGTERM"], {})
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_sleep_that_hangs_is_given_up_when_it_has_taken_far_longer_than_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others wait for its device: five minutes are right only for one of which nothing is known."""
    monkeypatch.setattr(sleeps, "SHORTEST_LIMIT", 0.1)

    async def story(rig: Rig) -> None:
        engine = await rig.ready()
        rig.usual["sleep1"] = 0.005
        engine.answers["/sleep"] = None
        rig.engine_manager.sleep(SLEEP)
        failed = await rig.event()
        assert isinstance(failed, events.EngineSleepFailed)
        assert "0.1 s" in failed.reason

    tell(story, tmp_path)


def test_an_end_between_list_and_adoption_is_not_lost(tmp_path: Path) -> None:
    """The launcher tells it once; an engine that is taken in afterwards would be thought alive for ever."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        process = rig.engine_manager.processes.pop("m")
        rig.launcher.exit(rig.instance, 3)
        assert rig.posted.empty()
        rig.engine_manager.adopt(process)
        rig.engine_manager.catch_up(process)
        gone = await rig.event()
        assert isinstance(gone, events.EngineExited)
        assert "status 3" in gone.reason

    tell(story, tmp_path)


def test_a_launcher_that_is_away_harms_no_engine_that_is_ready(tmp_path: Path) -> None:
    """What it is asked then is for people: nothing of it is a reason to end an engine."""

    async def story(rig: Rig) -> None:
        async def away(*_: object) -> None:
            raise LauncherFailed("the launcher was not there in 30 s")

        rig.launcher.follow = rig.launcher.unfollow = rig.launcher.annotate = away  # type: ignore[assignment]
        await rig.ready()
        assert rig.launcher.signals == []

    tell(story, tmp_path)


def test_what_cannot_be_killed_now_is_killed_when_there_is_a_launcher(tmp_path: Path) -> None:
    """The core is told that its memory is not back, and nobody else knows of it any more."""

    async def story(rig: Rig) -> None:
        async def away(*_: object) -> None:
            raise LauncherFailed("the launcher was not there in 30 s")

        await rig.ready()
        rig.launcher.kill = away  # type: ignore[method-assign,assignment]
        rig.engine_manager.stop(commands.StopEngine("m", "no use", kill=True))
        stopped = await rig.event()
        assert isinstance(stopped, events.EngineStopped)
        assert stopped.missing
        assert rig.launcher.abandoned == [rig.instance]

    tell(story, tmp_path)


def test_ports_go_around() -> None:
    """Each is given once until it comes back; none left is an error that says which were tried."""
    low = two_free_ports()
    pool = PortPool(low, low + 1)
    first, second = pool.reserve(), pool.reserve()
    assert {first, second} == {low, low + 1}
    with pytest.raises(Unavailable, match=f"{low}-{low + 1} are in use"):
        pool.reserve()
    pool.release(first)
    pool.release(first)
    assert pool.reserve() == first


def two_free_ports() -> int:
    """The lower of two neighbours that nobody has, nor had a moment ago."""
    for low in range(33390, 34290, 2):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", low))
            other.bind(("127.0.0.1", low + 1))
            return low
    raise AssertionError("all ports are in use")


async def asked(engine: FakeEngine, path: str) -> None:
    """Until the engine was asked for the path."""
    while not any(asked.startswith(path) for asked in engine.asked):
        engine.was_asked.clear()
        await engine.was_asked.wait()


async def engine_asked(rig: Rig) -> None:
    """Until the launcher has started the engine and it was asked something."""
    await rig.launcher.started.wait()
    await rig.engine.was_asked.wait()


def test_an_engine_that_is_renamed_answers_by_its_new_name(tmp_path: Path) -> None:
    """Its model got replicas while it started: the start goes on, and a later daemon finds it by the new name."""

    async def story(rig: Rig) -> None:
        rig.launcher.held_up = asyncio.Event()
        await rig.start()
        await soon(rig.launcher.ordered.wait())
        rig.engine_manager.configure({"m@1": replace(rig.model, name="m@1", replica_of="m")}, {})
        rig.engine_manager.rename(commands.RenameReplica("m", "m@1"))
        rig.launcher.held_up.set()
        ready = await rig.event()
        assert isinstance(ready, events.EngineReady)
        assert ready.replica == "m@1"
        rig.engine_manager.rename(commands.RenameReplica("m@1", "m@blue"))
        await rig.nothing_more()
        assert rig.launcher.notes[rig.instance]["model"] == "m@blue"
        rig.launcher.exit(rig.instance, 1)
        gone = await rig.event()
        assert isinstance(gone, events.EngineExited)
        assert gone.replica == "m@blue"

    tell(story, tmp_path)
