"""L's ServerManager, row by row, at a real vllmd: the machine's, or a private one.

L is the Python library: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.client.site import Stub, Vllmd, exists, running, script, wait_until
from vllmd import errors
from vllmd.api.answers import ModelLine
from vllmd.client import ServerManager, VLLMEngineArgs
from vllmd.client import holding as holding_module
from vllmd.client.holding import Holding
from vllmd.client.port_forwarder import PortForwarder
from vllmd.client.servers import _progress_key, _progress_text

HELLO = [{"role": "user", "content": "Hello to all of you"}]


def args(name: str, share: float = 0.1, **more: Any) -> VLLMEngineArgs:
    """A model of which ten fit beside one another."""
    return VLLMEngineArgs(model=f"/home/models/Qwen/{name}/", **{"gpu_memory_utilization": share, **more})


def ask(manager: ServerManager) -> str:
    """What a user of the official client gets."""
    answer = manager.make_client().chat.completions.create(model=manager.server_name, messages=HELLO)  # type: ignore[arg-type]
    return str(answer.choices[0].message.content)


def served_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# -- with the machine's vllmd -------------------------------------------------------------------------------------


def test_L_with_is_ready_on_enter(here: Vllmd) -> None:
    """A request inside works at once, by the name that the path gives."""
    with ServerManager(args("ready"), auto_terminate="directly") as serve:
        assert serve.server_name == "Qwen/ready"
        assert ask(serve) == "Hello to all of you"
        assert [m.id for m in serve.make_client().models.list() if m.id == serve.server_name] == ["Qwen/ready"]
        assert here.state("Qwen/ready") == "running"
    assert here.state("Qwen/ready") == "stopped"


def test_L_start_is_true_when_it_serves(here: Vllmd) -> None:
    """True means that an immediate request is answered; a second call changes nothing."""
    serve = ServerManager(args("started"))
    assert serve.start() is True
    pid = here.line("Qwen/started").pid
    assert ask(serve)
    assert serve.start() is True
    assert here.line("Qwen/started").pid == pid
    serve.stop()


def test_L_start_is_false_for_a_bad_model(here: Vllmd) -> None:
    """The reason is vLLM's own, and neither process nor lease is left."""
    serve = ServerManager(args("broken"))
    assert serve.start() is False
    assert "no such model" in serve.failure
    line = here.line("Qwen/broken")
    assert (line.pid, line.leases) == (None, ())
    with pytest.raises(errors.EngineFailed, match="no such model"), serve:
        pass


def test_L_a_start_that_takes_too_long_leaves_nothing(here: Vllmd) -> None:
    """L's own left the process of a timed-out start alive."""
    serve = ServerManager(args("slow"), server_startup_timeout=0.5)
    assert serve.start() is False
    assert "0.5 s" in serve.failure
    wait_until(lambda: here.line("Qwen/slow").pid is None)


def test_L_stop_is_immediate_and_harmless_when_repeated(here: Vllmd) -> None:
    """On return the process is gone."""
    serve = ServerManager(args("stopped"))
    serve.start()
    pid = here.line("Qwen/stopped").pid
    serve.stop()
    assert not exists(pid)
    serve.stop()
    assert not serve.running
    with pytest.raises(errors.Conflict, match="was not started"):
        serve.make_client()


def test_L_reset_shutdown_timer(here: Vllmd) -> None:
    """After 5 s it goes: alive at 4 s, gone at 7 s; one that was reset at 3 s is alive at 7 s."""
    one, other = ServerManager(args("timer-one")), ServerManager(args("timer-other"))
    assert one.start() and other.start()
    began = time.monotonic()
    one.reset_shutdown_timer(5)
    other.reset_shutdown_timer(5)
    sleep_until(began + 3)
    other.reset_shutdown_timer(5)
    sleep_until(began + 4)
    assert one.running and 0 < (one.remaining_time or 0) <= 1.1
    sleep_until(began + 7)
    assert not one.running
    assert other.running
    wait_until(lambda: not other.running, limit=3)
    one.stop()
    other.stop()


def sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def test_L_a_timer_drains_first(here: Vllmd) -> None:
    """A stream that runs when the time is up comes to its end."""
    serve = ServerManager(args("drained"), settings={"options": {"tokens_per_second": 10}, "engine": "sim"})
    serve.start()
    words = " ".join(map(str, range(15)))
    with here.client() as client:
        stream = client.chat_completion_stream("Qwen/drained", [{"role": "user", "content": words}])
        first = next(stream)
        serve.reset_shutdown_timer(0.2)
        assert first + "".join(stream) == words
    wait_until(lambda: here.state("Qwen/drained") == "stopped")
    serve.stop()


def test_L_auto_terminate_delay(here: Vllmd) -> None:
    """The countdown starts at exit, not at enter; a block may last longer than it; re-entry cancels it."""
    serve = ServerManager(args("delay"), auto_terminate="delay", resource_timeout=0.8)
    with serve:
        time.sleep(1.2)  # longer than the countdown
        assert serve.running
        serve.resource_timeout = 600.0
    assert serve.running and 0 < (serve.remaining_time or 0) <= 600
    pid = here.line("Qwen/delay").pid
    with serve:
        assert serve.remaining_time is None
        serve.resource_timeout = 0.8
        time.sleep(1.2)
        assert here.line("Qwen/delay").pid == pid
    wait_until(lambda: not serve.running)
    serve.stop()


def test_L_auto_terminate_never_lasts_as_long_as_the_program(here: Vllmd, stub: Stub) -> None:
    """It outlives the block, and goes with the process."""
    code = """
from vllmd.client import ServerManager
with ServerManager({"model": "Qwen/never"}, auto_terminate="never", resource_timeout=0.1) as serve:
    pass
print("left the block")
input()
"""
    program = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout and program.stdout.readline() == "left the block\n"
    time.sleep(0.5)
    assert here.state("Qwen/never") == "running"
    program.communicate("\n", timeout=20)
    wait_until(lambda: here.state("Qwen/never") == "stopped")


def test_L_a_mode_that_is_none(here: Vllmd) -> None:
    """The error has the right ones."""
    with pytest.raises(ValueError, match="delay, never, directly"):
        ServerManager(args("m"), auto_terminate="later")


def test_L_many_users_share_one_model(here: Vllmd) -> None:
    """Nobody's exit kills another's work: the first leaves, the second's stream goes on; the last takes it along."""
    code = """
from vllmd.client import ServerManager
with ServerManager({"model": "Qwen/shared"}, auto_terminate="directly") as serve:
    print(serve.make_client().chat.completions.create(model="Qwen/shared",
        messages=[{"role": "user", "content": "hi"}]).choices[0].message.content)
"""
    with ServerManager(args("shared"), auto_terminate="directly"), here.client() as client:
        pid = here.line("Qwen/shared").pid
        stream = client.chat_completion_stream("Qwen/shared", HELLO)
        pieces = [next(stream)]
        first = script(code, {})
        assert first.communicate(timeout=120)[0] == "hi\n"
        assert here.line("Qwen/shared").pid == pid
        assert "".join([*pieces, *stream]) == "Hello to all of you"
    assert not exists(pid)


def test_L_two_models_of_two_users_take_turns_on_one_gpu(here: Vllmd) -> None:
    """Nobody runs out of memory: who finds no room waits until it is given up, and is told by whom."""
    code = """
from vllmd.client import ServerManager
args = {"model": "Qwen/large-two", "gpu_memory_utilization": 0.6}
with ServerManager(args, auto_terminate="directly", verbose=True) as serve:
    print(serve.make_client().chat.completions.create(model="Qwen/large-two",
        messages=[{"role": "user", "content": "my turn"}]).choices[0].message.content)
"""
    with ServerManager(args("large-one", share=0.6), auto_terminate="directly") as first:
        second = script(code, {})
        assert second.stdout
        assert second.stdout.readline() == "Qwen/large-two: waits for room beside Qwen/large-one (leased)\n"
        assert ask(first)
        assert here.state("Qwen/large-two") == "stopped"
    assert "my turn" in second.communicate(timeout=120)[0]
    assert here.state("Qwen/large-one") == "stopped"


def test_L_a_killed_user_does_not_keep_the_model(here: Vllmd) -> None:
    """A lease that is no longer renewed runs out; one that is, does not."""
    code = """
import vllmd.client.holding as holding
holding.KEEP, holding.RENEW = 3.0, 0.2
from vllmd.client import ServerManager
serve = ServerManager({"model": "Qwen/orphan"})
print(serve.start())
input()
"""
    program = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout and program.stdout.readline() == "True\n"
    time.sleep(3.5)  # longer than a lease that is not renewed
    assert here.state("Qwen/orphan") == "running"
    program.kill()
    program.wait()
    wait_until(lambda: here.state("Qwen/orphan") == "stopped")


def test_a_daemon_started_anew_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has forgotten the model; the holder's next renewal makes it known and held again."""
    monkeypatch.setattr(holding_module, "RENEW", 0.01)
    done: list[str] = []

    class Daemon:
        def lease_model(self, model: str, lease: str, seconds: float) -> None:
            done.append("lease")
            if done.count("lease") == 2:
                raise errors.Unavailable("vllmd is shutting down")
            if done.count("lease") == 3:
                raise errors.UnknownModel("who?")

        def release_model(self, model: str, lease: str, *, stop: bool) -> None:
            done.append("release")

    holding = Holding(Daemon(), "m", lambda: done.append("introduce"))  # type: ignore[arg-type]
    holding.keep()
    wait_until(lambda: len(done) >= 5)
    holding.give_back()
    assert done[:5] == ["lease", "lease", "lease", "introduce", "lease"]
    assert done[-1] == "release"


def test_L_a_daemon_that_dies_in_the_block_costs_no_second_error(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block's own error, or its result, is what its writer must see; the lease runs out by itself."""

    def block(daemon: Vllmd) -> None:
        with ServerManager(args("left"), resource_timeout=1):
            os.kill(daemon.pid, signal.SIGKILL)
            wait_until(lambda: not exists(daemon.pid))
            raise ValueError("of the block")

    with running(tmp_path, {"devices": []}, {"PATH": stub.path}) as daemon:
        monkeypatch.setenv("VLLMD_ADMIN_SOCKET", daemon.socket)
        with pytest.raises(ValueError, match="of the block"):
            block(daemon)


def test_L_other_arguments_are_said_not_ignored(here: Vllmd) -> None:
    """L silently kept the first object's; here whoever shares a model learns what is not as he asked."""
    with ServerManager(args("asked", max_model_len=1024), auto_terminate="directly"):
        second = ServerManager(args("asked", max_model_len=2048))
        with pytest.warns(UserWarning, match="in use already with other settings.*max_model_len"):
            assert second.start()
        second.stop()
    with ServerManager(args("asked", max_model_len=2048), auto_terminate="directly"):  # nobody holds it now
        pass


def test_L_a_configured_model_is_used_as_configured(here: Vllmd) -> None:
    """The administrator's settings stand."""
    serve = ServerManager({"model": "org/tiny"})
    with pytest.warns(UserWarning, match="is configured with other settings"):
        assert serve.start()
    assert ask(serve)
    serve.stop()


def test_L_engine_args_reach_vllm(here: Vllmd, stub: Stub) -> None:
    """As the document has them; the port is answered by the program that asked for it."""
    port = served_port()
    engine_args = VLLMEngineArgs(
        model="/home/models/Qwen/Qwen2.5-0.5B-Instruct/",
        port=port,
        tensor_parallel_size=1,
        max_model_len=8192,
        gpu_memory_utilization=0.2,
        enforce_eager=True,
        enable_auto_tool_choice=True,
        tool_call_parser="hermes",
        max_num_seqs=2,
        max_num_batched_tokens=8192,
    )
    with ServerManager(engine_args, auto_terminate="directly") as serve:
        assert str(serve.make_client().base_url) == f"http://127.0.0.1:{port}/v1/"
        assert ask(serve)
    argv = next(argv for argv in stub.calls() if argv[1].endswith("Qwen2.5-0.5B-Instruct"))
    assert argv[:2] == ["serve", "/home/models/Qwen/Qwen2.5-0.5B-Instruct"]
    for words in (
        "--served-model-name Qwen/Qwen2.5-0.5B-Instruct",
        "--max-model-len 8192",
        "--gpu-memory-utilization 0.2",
        "--enforce-eager",
        "--enable-auto-tool-choice",
        "--tool-call-parser hermes",
        "--max-num-seqs 2",
        "--max-num-batched-tokens 8192",
    ):
        assert f" {words} " in f" {' '.join(argv)} "
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass


def test_L_a_port_that_is_taken(here: Vllmd, stub: Stub) -> None:
    """It is said before the model is loaded, which may take minutes."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        serve = ServerManager(args("port", port=other.getsockname()[1]))
        assert serve.start() is False
    assert serve.failure.endswith("cannot be had: Address already in use; choose another, or none")
    assert here.state("Qwen/port") == "stopped"
    assert [argv for argv in stub.calls() if argv[1].endswith("Qwen/port")] == []


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_L_a_port_that_nobody_used_is_closed_without_a_word() -> None:
    """Its thread ends whether or not there are connections to end."""
    PortForwarder(served_port(), ("127.0.0.1", 9)).close()


@pytest.mark.parametrize("verbose", [True, False])
def test_L_verbose(here: Vllmd, capsys: pytest.CaptureFixture[str], verbose: bool) -> None:
    """Progress on standard output, or not a word."""
    with ServerManager(args("verbose"), auto_terminate="directly", verbose=verbose):
        pass
    printed = capsys.readouterr().out
    assert ("ready after" in printed, "given up" in printed) == (verbose, verbose)
    assert verbose or printed == ""


def test_L_progress_is_not_a_clock() -> None:
    """A start of minutes is a line for each phase, not for each second."""
    line = ModelLine("m", "starting", phase="weights", detail="1/2", waiting_for="its start (2 of about 37 s)")
    assert _progress_text(line) == "starting: weights: 1/2: its start (2 of about 37 s)"
    assert _progress_key(line) == _progress_key(replace(line, waiting_for="its start (3 of about 37 s)"))
    assert _progress_key(line) != _progress_key(replace(line, detail="2/2"))
    assert _progress_text(replace(line, phase="starting", detail="")) == "starting: its start (2 of about 37 s)"


def test_L_multimodal_and_tools_pass_through(here: Vllmd, stub: Stub) -> None:
    """The engine gets what the client wrote, but for the model's name, and the tool call comes back."""
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.jpg"}}
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "介绍图片"}, image]}]
    tools: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with ServerManager(args("echo"), auto_terminate="directly") as serve:
        answer = serve.make_client().chat.completions.create(
            model="Qwen/echo", messages=messages, tools=tools, max_tokens=300
        )
        got = json.loads(record_of(here).read_bytes())
    assert (got["messages"], got["tools"], got["max_tokens"]) == (messages, tools, 300)
    call = (answer.choices[0].message.tool_calls or [])[0]
    assert json.loads(call.function.arguments) == {"city": "Oslo"}  # type: ignore[union-attr]


def record_of(here: Vllmd) -> Path:
    return Path(here.line("Qwen/echo").socket).with_name("body.json")


def test_L_make_client_without_the_official_client(here: Vllmd, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how to get it."""
    monkeypatch.setitem(sys.modules, "openai", None)
    serve = ServerManager(args("plain"))
    serve.start()
    with pytest.raises(ImportError, match="pip install openai"):
        serve.make_client()
    serve.stop()


def test_a_daemon_that_we_may_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second vllmd would fight the first for the GPUs, so none is started."""

    def refuse(self: object, path: str) -> None:
        raise PermissionError

    monkeypatch.setattr("socket.socket.connect", refuse)
    serve = ServerManager(args("m"))
    assert serve.start() is False
    assert "have yourself added to its group" in serve.failure


# -- with a private one -------------------------------------------------------------------------------------------


def test_L_without_a_daemon_a_private_one_serves(nowhere: Stub) -> None:
    """It is ours: when the last manager is done nothing of it is left."""
    first, second = ServerManager(args("one")), ServerManager(args("two"))
    assert first.start() and second.start(), first.failure + second.failure
    assert first._private is second._private and first._private
    pid = first._private.pid
    assert ask(first) == ask(second) == "Hello to all of you"
    first.stop()
    assert exists(pid) and ask(second)
    second.stop()
    assert not exists(pid)


def test_L_a_bad_model_leaves_no_private_daemon(nowhere: Stub) -> None:
    """False means that no process is left, not even ours."""
    serve = ServerManager(args("broken"))
    assert serve.start() is False
    assert "no such model" in serve.failure
    assert [line for line in children() if "vllmd-private" in line] == []


def children() -> list[str]:
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
    return found.stdout.splitlines()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_L_a_private_daemon_dies_with_its_program(nowhere: Stub, signum: int) -> None:
    """However the program ends, no engine holds the GPU afterwards."""
    code = """
from vllmd.client import ServerManager
serve = ServerManager({"model": "Qwen/mine"})
assert serve.start(), serve.failure
print(serve._private.pid, serve._line()["pid"], serve._private._folder)
input()
"""
    program = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout
    *pids, folder = program.stdout.readline().split()
    daemon, engine = map(int, pids)
    assert exists(daemon) and exists(engine)
    program.send_signal(signum)
    program.wait(120)
    wait_until(lambda: not exists(daemon) and not exists(engine))
    assert not Path(folder).exists()


def test_L_a_program_that_ends_takes_its_private_daemon_along(nowhere: Stub) -> None:
    """Without stop(), without with: at exit."""
    code = """
from vllmd.client import ServerManager
serve = ServerManager({"model": "Qwen/mine"})
assert serve.start(), serve.failure
print(serve._private.pid, serve._line()["pid"])
"""
    out, _ = script(code, {}).communicate(timeout=120)
    assert [exists(int(pid)) for pid in out.split()] == [False, False]
