"""A real vLLM behind vllmd, on a booted systemd 252, from the installed package; what is served says conftest.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.clients import Clients
from tests.e2e.site import Site

pytestmark = [pytest.mark.machine, pytest.mark.vllm, pytest.mark.timeout(1200)]  # the first one starts both engines

Chat = Callable[[], dict[str, Any]]  # a streamed chat, and what came of it
CHAT_WITH_OPENAI = """
import json
from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:33258/v1", api_key="none", timeout=240, max_retries=0)
stream = client.chat.completions.create(model="lab/tiny", stream=True, max_tokens=12, temperature=0,
    messages=[{"role": "user", "content": "Hello"}], stream_options={"include_usage": True})
chunks = list(stream)
print(json.dumps({"model": chunks[0].model, "chunks": len(chunks), "usage": chunks[-1].usage.completion_tokens,
    "text": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)}))
"""


@pytest.fixture
def loaded(loaded_site: Site) -> Site:
    return loaded_site


@pytest.fixture(scope="module")
def openai_chat(loaded_site: Site) -> Iterator[Chat]:
    """A chat streamed through vllmd with the official client, which vLLM's own environment has."""
    clients = Clients(loaded_site.machine)
    yield lambda: clients.ask(CHAT_WITH_OPENAI)
    clients.end()


def test_the_official_client_streams_a_chat(openai_chat: Chat) -> None:
    """The SDK that everybody uses needs nothing but the base URL."""
    answer = openai_chat()
    assert answer["model"] == "lab/tiny"
    assert answer["usage"] == 12
    assert int(str(answer["chunks"])) > 4


def test_curl_gets_a_completion_under_the_name_it_asked_for(loaded: Site) -> None:
    """Any client will do, and a short name that fits one model only is enough."""
    status, body = loaded.post("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 4})
    assert status == 200
    assert body["model"] == "tiny"
    assert body["usage"]["completion_tokens"] == 4


def test_its_processes_are_the_engine_users_and_nobody_elses(loaded: Site) -> None:
    """Three processes of vLLM, all in the scope, none of them root."""
    scope = loaded.scope("lab/tiny")
    assert loaded.users(scope) == {"vllmd-engine"}
    assert len(loaded.machine.cgroup_pids(scope)) >= 3


def test_only_the_daemon_may_reach_the_engine(loaded: Site) -> None:
    """Its development routes would let anybody do anything."""
    loaded.machine.run("useradd --groups vllmd admin || true")
    socket = loaded.view("lab/tiny")["socket"]
    refused = loaded.machine.run(f"curl -s --unix-socket {socket} http://x/health", user="admin", check=False)
    assert refused.returncode == 7
    for path in ("/sleep?level=1", "/wake_up", "/collective_rpc"):
        assert loaded.post(path, {})[0] == 404


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_by_the_real_protocol(loaded: Site, openai_chat: Chat, level: int) -> None:
    """It answers the same after a sleep, and a request is enough to wake it."""
    before, pid = openai_chat(), loaded.engine_pid("lab/tiny")
    loaded.machine.run(f"vllmctl sleep lab/tiny --level {level}", timeout=120)
    assert loaded.state("lab/tiny") == f"sleeping_l{level}"
    after = openai_chat()
    assert after["text"] == before["text"]
    assert loaded.state("lab/tiny") == "running"
    assert loaded.engine_pid("lab/tiny") == pid


def test_a_restart_of_the_daemon_keeps_it(loaded: Site, openai_chat: Chat) -> None:
    """Half a minute of loading is not repeated for an upgrade."""
    pid = loaded.engine_pid("lab/tiny")
    loaded.machine.run("systemctl restart vllmd.service")
    openai_chat()
    assert loaded.engine_pid("lab/tiny") == pid


def test_a_model_that_does_not_exist_is_refused_with_vllms_own_words(loaded: Site) -> None:
    """What vLLM said last is what the user needs."""
    status, body = loaded.post("/v1/chat/completions", {"model": "lab/wrong", "messages": []}, timeout=200)
    assert status == 503
    assert "\N{HORIZONTAL ELLIPSIS}/model" in body["error"]["message"]


def test_sigkill_of_the_api_server_leaves_nothing(loaded: Site) -> None:
    """vLLM's engine core and workers outlive their parent (vllm #55510): with us they are gone at once."""
    scope, pid = loaded.scope("lab/tiny"), loaded.engine_pid("lab/tiny")
    pids = loaded.machine.cgroup_pids(scope)
    assert len(pids) >= 3
    loaded.machine.run(["kill", "-9", str(pid)])
    loaded.machine.wait_until(f"! ps -p {','.join(map(str, pids))}")
