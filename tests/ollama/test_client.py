"""Ollama's own Python client, every call of it, against a real daemon with stand-in engines."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest

from tests.admin.site import Site, running
from tests.ollama.test_requests import PNG

MODELS = """\
devices: [{{memory: 80GiB, file: {folder}/gpu0}}]
server: {{idle_exit: never}}
auth: {{keys: [{{key: models-key}}, {{key: admin-key, scopes: [models, admin]}}, {{key: beta-key, models: [beta]}}]}}
models:
  alpha: {{engine: sim, gpu_memory: 20GiB, aliases: [first], max_model_len: 4096, options: {{load_time: 0.01s}}}}
  beta: {{engine: sim, gpu_memory: 20GiB, options: {{load_time: 0.01s}}}}
  secret: {{engine: sim, gpu_memory: 20GiB, hidden: true, options: {{load_time: 0.01s}}}}
"""
HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ollama")
    with running(folder, MODELS.format(folder=folder)) as site:
        yield site


def client(site: Site, key: str = "models-key") -> ollama.Client:
    return ollama.Client(f"http://127.0.0.1:{site.port}", headers={"Authorization": f"Bearer {key}"}, timeout=60)


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: where
    """
    return city


def test_chat(site: Site) -> None:
    """Whole and streamed; the counts are the engine's, the durations divisible by."""
    whole = client(site).chat("alpha", HELLO)
    assert (whole.message.content, whole.done_reason, whole.prompt_eval_count, whole.eval_count) == (
        "hello there",
        "stop",
        2,
        2,
    )
    assert whole.eval_duration and whole.total_duration and whole.total_duration >= (whole.load_duration or 0)
    parts = list(client(site).chat("alpha:latest", HELLO, stream=True))
    assert [part.message.content for part in parts] == ["hello", " there", ""]
    assert [part.done for part in parts] == [False, False, True]
    assert (parts[-1].eval_count, parts[-1].model) == (2, "alpha:latest")


def test_tools(site: Site) -> None:
    """A function is described by the client, and its call comes back as an object; its result is understood."""
    whole = client(site).chat("alpha", HELLO, tools=[weather])
    (call,) = whole.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("weather", {"text": "hello there"})
    streamed = [part.message.tool_calls for part in client(site).chat("alpha", HELLO, tools=[weather], stream=True)]
    assert [calls[0].function.arguments for calls in streamed if calls] == [{"text": "hello there"}]
    result: list[Any] = [*HELLO, whole.message, {"role": "tool", "content": "rain", "tool_name": "weather"}]
    assert client(site).chat("alpha", result, tools=[weather]).message.content == "rain"


def test_images_formats_options_and_thinking(site: Site) -> None:
    """All that a chat may have is taken."""
    seen = [{"role": "user", "content": "see", "images": [base64.b64decode(PNG)]}]
    assert client(site).chat("alpha", seen).message.content == "see [image]"
    for format in ("json", {"type": "object", "properties": {"x": {"type": "integer"}}}):
        assert client(site).chat("alpha", HELLO, format=format).done
    short = client(site).chat("alpha", HELLO, think=False, options={"num_predict": 1, "num_ctx": 9, "temperature": 0})
    assert (short.message.content, short.done_reason) == ("hello", "length")


def test_generate(site: Site) -> None:
    """Whole, streamed, raw, between two texts, and on with the conversation."""
    ask = client(site).generate
    first = ask("alpha", "once upon", system="be brief")
    assert (first.response, first.eval_count) == ("once upon", 2)
    assert ask("alpha", "a time", context=first.context).response == "a time"
    assert [part.response for part in ask("alpha", "once upon", stream=True)] == ["once", " upon", ""]
    raw = ask("alpha", "once upon", raw=True)
    assert (raw.response, raw.context) == ("once upon", None)
    assert ask("alpha", "once upon", suffix="the end").response == "once upon"


def test_embeddings(site: Site) -> None:
    """One text, several, and the older form."""
    assert len(client(site).embed("alpha", "a").embeddings) == 1
    assert len(client(site).embed("alpha", ["a", "b"]).embeddings) == 2
    assert len(client(site).embeddings("alpha", "a").embedding) > 1


def test_lists(site: Site) -> None:
    """What the key may use and is not hidden, with tags; what is loaded; what one can do."""
    assert [each.model for each in client(site).list().models] == ["alpha:latest", "first:latest", "beta:latest"]
    assert [each.model for each in client(site, "beta-key").list().models] == ["beta:latest"]
    shown = client(site).show("first")
    assert shown.modelinfo and shown.modelinfo["sim.context_length"] == 4096
    assert "tools" in (shown.capabilities or ())
    client(site).generate("secret")
    client(site).generate("beta", keep_alive="5m")
    assert "secret" not in str(client(site).ps())
    (loaded,) = client(site, "beta-key").ps().models
    assert (loaded.model, loaded.size_vram, loaded.expires_at is not None) == ("beta:latest", 20 << 30, True)


def test_load_and_unload(site: Site) -> None:
    """A request that asks nothing loads the model; with keep_alive 0 it goes, asleep where it can sleep."""
    assert client(site).chat("beta").done_reason == "load"
    assert site.line("beta")["state"] == "running"
    assert client(site).chat("beta", keep_alive=0).done_reason == "unload"
    site.operate("POST", "/admin/models/beta/load?wait=true")  # comes to rest once what was begun is done
    decisions = site.operate("GET", "/admin/decisions?model=beta")["decisions"]
    assert "unused for 0 s" in [each["why"] for each in decisions if each["what"] == "sleep"]


REFUSED = [
    ("models-key", lambda c: c.chat("gamma", HELLO), 404, "does not exist"),
    ("models-key", lambda c: c.chat("alpha", HELLO, options={"temperature": "hot"}), 400, "'options.temperature'"),
    ("beta-key", lambda c: c.chat("alpha", HELLO), 403, "may not use"),
    ("wrong", lambda c: c.list(), 401, "not valid"),
    ("models-key", lambda c: c.pull("gamma"), 403, "scope admin"),
    ("admin-key", lambda c: c.pull("gamma"), 400, "no well-known name and no repository"),
    ("admin-key", lambda c: list(c.pull("gamma", stream=True)), 400, "no well-known name and no repository"),
    ("models-key", lambda c: c.delete("alpha"), 403, "needs the scope admin"),
    ("admin-key", lambda c: c.delete("alpha"), 409, "is configured in"),
    ("models-key", lambda c: c.copy("alpha", "x"), 403, "needs the scope admin"),
    ("models-key", lambda c: c.create("x", from_="alpha"), 403, "needs the scope admin"),
    ("admin-key", lambda c: c.create("x", from_="alpha", system="be brief"), 501, "configuration"),
    ("models-key", lambda c: c.push("alpha"), 501, "pushed"),
    ("models-key", lambda c: c.create_blob(Path(__file__)), 501, "files of models"),
]


@pytest.mark.parametrize(("key", "call", "status", "why"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(site: Site, key: str, call: Any, status: int, why: str) -> None:
    """Each is the client's own error, with the status and the sentence."""
    with pytest.raises(ollama.ResponseError) as refused:
        call(client(site, key))
    assert (refused.value.status_code, why in refused.value.error) == (status, True), refused.value.error


def test_pull_of_what_is_here(site: Site) -> None:
    """Programs pull before they ask."""
    assert client(site).pull("alpha").status == "success"
    assert [each.status for each in client(site).pull("alpha", stream=True)][-1] == "success"


def test_the_asynchronous_client(site: Site) -> None:
    """It has the same calls; a stream that it leaves is over for the engine, too."""

    async def play() -> None:
        ask = ollama.AsyncClient(
            f"http://127.0.0.1:{site.port}", headers={"Authorization": "Bearer models-key"}, timeout=60
        )
        stream = await ask.chat("alpha", HELLO, stream=True)
        assert [part.message.content async for part in stream] == ["hello", " there", ""]
        assert (await ask.chat("alpha", HELLO)).done
        assert [part async for part in await ask.generate("alpha", "x", stream=True)][-1].done
        assert len((await ask.embed("alpha", "a")).embeddings) == 1
        assert (await ask.list()).models and (await ask.ps()) and (await ask.show("alpha")).modelinfo

    asyncio.run(play())
