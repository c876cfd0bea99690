"""What coding agents send by habit is served as meant: Codex, Claude Code, aider and others."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterator
from datetime import datetime

import pytest

from tests.admin.site import Site, running

CONFIG = """\
devices: []
server: {{idle_exit: never}}
defaults: {{engine: sim, tensor_parallel_size: 1, local_devices: 0}}
models:
  coder: {{display_name: The Coder, aliases: [gpt-5-codex, claude-sonnet-4-5]}}
"""
SOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("agents")
    with running(folder, CONFIG.format(folder=folder)) as site:
        yield site


def test_codex_s_websocket_is_refused_so_that_it_posts(site: Site) -> None:
    """By 426, after which Codex goes on over HTTP; the connection goes on as well. A plain GET is no such question."""
    with contextlib.closing(site.connect()) as connection:
        connection.request("GET", "/v1/responses", headers=SOCKET)
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("upgrade")) == (426, "HTTP/1.1")
        assert "POST" in json.loads(answer.read())["error"]["message"]
        connection.request("POST", "/v1/responses", json.dumps({"model": "gpt-5-codex", "input": "hi"}),
                           {"Content-Type": "application/json"})  # fmt: skip
        assert json.loads(connection.getresponse().read())["model"] == "gpt-5-codex"
    plain = site.ask("GET", "/v1/responses")
    assert (plain.status, plain.headers["allow"]) == (405, "OPTIONS, POST")


def test_codex_finds_its_own_list(site: Site) -> None:
    """It asks with its version, and gives up on a list without ``models``."""
    assert site.ask("GET", "/v1/models?client_version=0.58.0").json["models"] == []
    assert "models" not in site.ask("GET", "/v1/models").json


def test_codex_s_compressed_bodies(site: Site) -> None:
    """As it sends them to servers that it knows."""
    body = gzip.compress(json.dumps({"model": "coder", "input": "hi"}).encode())
    with contextlib.closing(site.connect()) as connection:
        fields = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        connection.request("POST", "/v1/responses", body, fields)
        assert connection.getresponse().status == 200


def test_the_list_is_anthropic_s_too(site: Site) -> None:
    """Type, display name and time of each, and one page."""
    listed = site.ask("GET", "/v1/models?limit=1000", headers={"anthropic-version": "2023-06-01"}).json
    first = listed["data"][0]
    assert (first["type"], first["display_name"]) == ("model", "The Coder")
    assert datetime.fromisoformat(first["created_at"].replace("Z", "+00:00")).timestamp() == first["created"]
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, "coder", "claude-sonnet-4-5")


def test_claude_code_s_probes(site: Site) -> None:
    """It looks by HEAD whether somebody is there, and counts tokens before it asks."""
    assert site.ask("HEAD", "/").status == 200
    assert site.ask("HEAD", "/v1/models").status == 200
    body = {"model": "claude-sonnet-4-5", "messages": [{"role": "user", "content": "one two"}]}
    counted = site.ask("POST", "/v1/messages/count_tokens?beta=true", body)
    assert (counted.status, counted.json["input_tokens"]) == (200, 2)


def test_fields_of_prompt_caching_reach_the_engine(site: Site) -> None:
    """Untouched, wherever they stand."""
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {
        "model": "coder",
        "max_tokens": 5,
        "system": [{"type": "text", "text": "You are terse.", **cached}],
        "tools": [{"name": "read", "input_schema": {"type": "object"}, **cached}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", **cached}]}],
    }
    headers = {"anthropic-beta": "prompt-caching-2024-07-31", "X-Sim-Echo": "body"}
    assert site.ask("POST", "/v1/messages?beta=true", body, headers=headers).json == body
    assert site.ask("POST", "/v1/messages?beta=true", body).status == 200


@pytest.mark.parametrize("name", ["coder:latest", "openai/coder", "hosted_vllm/coder", "CODER"])
def test_names_that_agents_make(site: Site, name: str) -> None:
    """VS Code's tag, aider's and LiteLLM's prefixes; answered under the name that was asked for."""
    answer = site.chat(name)
    assert (answer.status, answer.json["model"]) == (200, name)
