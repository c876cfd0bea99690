"""Two people, two programs, one model: through the installed vllmd, on a booted systemd 252 with its own httpx.

L is the Python library: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator

import pytest

from tests.machine.container import Machine

pytestmark = pytest.mark.machine

CONFIG = "server: {idle_exit: never}\ndevices: [{memory: 24GiB}]\nmodels: {}\n"
# In vLLM's place, where PATH finds it: ten tokens a second, so that a stream lasts.
VLLM = '#!/bin/sh\nexec python3 -m vllmd.simengine "$@" --tokens-per-second 10\n'
FIRST = """
from vllmd.client import ServerManager
with ServerManager({"model": "lab/shared", "max_model_len": 1024}, auto_terminate="directly") as serve:
    print(serve.server_name, serve._client.chat_completion(serve.server_name, [{"role": "user", "content": "hi"}])
        ["choices"][0]["message"]["content"])
"""
SECOND = """
import sys, time
from vllmd.client import ServerManager
def left(): return int(serve._line()["pid"] is not None)
serve = ServerManager({"model": "lab/shared", "max_model_len": 1024})
assert serve.start(), serve.failure
words = " ".join(map(str, range(60)))
stream = serve._client.chat_completion_stream(serve.server_name, [{"role": "user", "content": words}])
text = next(stream)
print("streaming", serve._line()["pid"], flush=True)
text += "".join(stream)
print("whole" if text == words else text, serve._line()["pid"], flush=True)
began = time.monotonic()
def at(second):
    time.sleep(began + second - time.monotonic())
    return left()
serve.reset_shutdown_timer(5)
print(at(4), at(7), flush=True)
assert serve.start(), serve.failure
began = time.monotonic()
serve.reset_shutdown_timer(5)
at(3)
serve.reset_shutdown_timer(5)
print(at(7), flush=True)
serve.stop()
"""


@pytest.fixture(scope="module")
def shared(installed_machine: Machine) -> Iterator[Machine]:
    machine = installed_machine
    machine.write("/usr/local/bin/vllm", VLLM, mode="755")
    machine.write("/etc/vllmd/vllmd.yaml", CONFIG)
    machine.run("systemctl restart vllmd.socket vllmd-admin.socket; systemctl stop vllmd.service", check=False)
    for name in ("ada", "bob", "eve"):
        machine.add_user(name)
    machine.run("usermod -aG vllmd-admin ada && usermod -aG vllmd-admin bob")
    yield machine
    machine.run("systemctl stop vllmd.service vllmd.slice", check=False)


def as_user(name: str, code: str) -> str:
    return f"runuser -u {name} -- python3 -u -c {shlex.quote(textwrap.dedent(code))}"


def test_L_two_users_share_one_model(shared: Machine) -> None:
    """The first one's exit leaves the second's stream alone; then the model goes by the second's timer."""
    second = shared.popen(as_user("bob", SECOND))
    assert second.stdout is not None
    word, pid = second.stdout.readline().split()
    assert word == "streaming"
    assert shared.out(as_user("ada", FIRST)) == "lab/shared hi"
    assert second.stdout.readline().split() == ["whole", pid]
    assert shared.out(f"ps -o user= -p {pid}") == "vllmd-engine"
    assert second.stdout.readline().split() == ["1", "0"]  # alive at 4 s, gone at 7 s
    assert second.stdout.readline().split() == ["1"]  # reset at 3 s: alive at 7 s
    assert second.wait(120) == 0
    shared.wait_until("! pgrep -u vllmd-engine", timeout=5)


def test_who_may_not_is_told_how(shared: Machine) -> None:
    """A third user gets no daemon of his own beside the machine's, but the name of the group."""
    code = "from vllmd.client import ServerManager\ns = ServerManager({'model': 'm'})\nprint(s.start(), s.failure)"
    answer = shared.out(as_user("eve", code))
    assert answer.startswith("False")
    assert "have yourself added to its group (vllmd-admin)" in answer


def test_a_member_of_the_group_cannot_run_code_as_the_engines_user(shared: Machine) -> None:
    """Others' prompts pass through that user's processes."""
    code = """
        from vllmd.client import ServerManager
        s = ServerManager({"model": "m", "middleware": ["evil.Thing"], "trust_remote_code": True})
        print(s.start(), s.failure)
    """
    answer = shared.out(as_user("ada", code))
    assert answer.startswith("False")
    assert "trust_remote_code" in answer
