"""What GET /v1/models says: the running engine's own word before the configuration's and the files'."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.proxy.fakes import Asked, Engine, until
from vllmd.admin.models import ModelEndpoints
from vllmd.config.types import Config, ModelConfig, ReplicaConfig
from vllmd.daemon.current import Current, Later, RuntimeEnvironment
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.offers import Offers
from vllmd.daemon.self_description import Descriptions, SelfDescription, context_of, modality, tools_of
from vllmd.daemon.serializers import card
from vllmd.daemon.status import AT_A_TIME, Status
from vllmd.engines.base import Listen
from vllmd.engines.vllm import ROUTES
from vllmd.ollama.models import abilities
from vllmd.proxy.access import ANYBODY
from vllmd.proxy.http import Headers, Request

VLLM = {"object": "list", "data": [{"id": "m", "max_model_len": 512}]}
LLAMA = {"object": "list", "data": [{"id": "x.gguf", "meta": {"n_ctx": 2048, "n_ctx_train": 8192}}]}
SCHEMA = {"openapi": "3.1.0", "paths": {"/v1/embeddings": {}, "/tokenize": {}, "/health": {}}}


@pytest.mark.parametrize(
    ("answer", "context"),
    [
        (VLLM, 512),
        (LLAMA, 2048),
        ({"data": [{"id": "a", "max_model_len": 1}, {"id": "m", "context_length": 2}]}, 2),
        ({"data": [{"id": "a", "max_model_len": 1}, {"id": "b", "max_model_len": 2}]}, None),
        ({"data": [{"id": "m", "max_model_len": "many"}]}, None),
        ({"data": "none"}, None),
        (None, None),
    ],
)
def test_the_context_is_found_in_what_engines_answer(answer: Any, context: int | None) -> None:
    """vLLM and SGLang have it in the model's card, llama-server in its ``meta``."""
    assert context_of(answer, "m") == context


def answering(**bodies: object) -> Callable[[Engine, Asked, asyncio.StreamWriter], Awaitable[None]]:
    """An engine that has these paths, slashes written as ``__``."""

    async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        found = bodies.get(asked.line.split()[1].strip("/").replace("/", "__").replace(".", "_"))
        body = json.dumps(found).encode() if found else b""
        line = "200 OK" if found else "404 Not Found"
        writer.write(f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    return script


def test_an_engine_is_asked_once_per_start(tmp_path: Path) -> None:
    """And nobody waits for one that does not answer: what it says later is there the next time."""

    async def play() -> None:
        engine = Engine(answering(v1__models=VLLM, openapi_json=SCHEMA))
        async with await asyncio.start_unix_server(engine.serve, tmp_path / "s"):
            kind = SimpleNamespace(served_name=lambda model: "m", headers=lambda: ())
            process: Any = SimpleNamespace(
                name="m", instance="m-1", model=ModelConfig("m"), engine=kind, listen=Listen(uds=str(tmp_path / "s"))
            )
            told = Descriptions(patience=10.0)
            expected = {"m": SelfDescription(512, frozenset(SCHEMA["paths"]))}  # type: ignore[arg-type]
            there = [process]
            assert await told.of(there, there) == expected == await told.of(there, there)
            assert await told.of([], there) == {}  # another model's card was wanted
            assert await told.of(there, there) == expected
            assert len(engine.asked) == 2
            process.instance = "m-2"
            assert await told.of(there, there) == expected
            assert len(engine.asked) == 4
            assert await told.of([], []) == {}
            hasty, process.instance = Descriptions(patience=0.0), "m-3"
            assert await hasty.of(there, there) == {}
            await until(lambda: not hasty._asking)
            assert await hasty.of(there, there) == expected
            await until(lambda: engine.closed == engine.connections)

    asyncio.run(play())


def test_what_an_engine_says_counts_more_than_its_files_and_a_setting_more_than_both() -> None:
    """A model whose files look like a chat model's is no such if its engine does not serve chats."""
    model, said = ModelConfig("m", max_model_len=100), SelfDescription(512, frozenset({"/v1/embeddings", "/tokenize"}))
    assert "chat" in card(model, ROUTES, None, "")["capabilities"]
    assert "chat" in card(model, ROUTES, None, "generate")["capabilities"]
    told = card(model, ROUTES, None, "generate", said)
    assert (told["capabilities"], told["max_model_len"]) == (("embeddings", "tokenize"), 512)
    assert card(model, ROUTES, None, "generate", SelfDescription())["max_model_len"] == 100
    own = ModelConfig("m", capabilities=("vision", "chat"))
    assert card(own, ROUTES, None, "generate", said)["capabilities"] == ("chat", "vision")


def test_what_a_model_sees_and_hears_is_its_engine_s_word() -> None:
    """llama-server has the route for speech whatever its model is."""
    routes, blind = [*ROUTES, "/v1/audio/transcriptions"], {"modalities": {"vision": False, "audio": False}}
    for props, able in ((blind, set()), ({"modalities": {"vision": True, "audio": True}}, {"vision", "transcription"})):
        said = SelfDescription(takes_images=modality(props, "vision"), takes_audio=modality(props, "audio"))
        found = card(ModelConfig("m", engine="llama.cpp"), routes, None, "", said)
        assert {"vision", "transcription"} & set(found.capabilities) == able
    assert modality({}, "audio") is modality(None, "audio") is None


TEMPLATES = {"chat_template_caps": {"supports_tools": False}}


@pytest.mark.parametrize(
    ("model", "said", "able"),
    [
        (ModelConfig("m"), None, False),
        (ModelConfig("m", extra_args=("--enable-auto-tool-choice", "--tool-call-parser=hermes")), None, True),
        (ModelConfig("m", engine="sglang", extra_args=("--tool-call-parser", "qwen")), None, True),
        (ModelConfig("m", engine="sglang"), None, False),
        (ModelConfig("m", engine="llama.cpp"), None, True),  # not known before it runs
        (ModelConfig("m", engine="llama.cpp"), SelfDescription(tools=tools_of(TEMPLATES)), False),
        (ModelConfig("m", engine="llama.cpp"), SelfDescription(tools=tools_of({"chat_template": "x"})), True),
        (ModelConfig("m", engine="remote"), None, True),
        (ModelConfig("m", capabilities=("chat",)), None, False),
        (ModelConfig("m", capabilities=("chat", "tools")), None, True),
    ],
)
def test_tools_are_claimed_where_the_engine_takes_calls(
    model: ModelConfig, said: SelfDescription | None, able: bool
) -> None:
    """vLLM only with its flag, llama.cpp by its template; programs leave out models that do not claim it."""
    found = card(model, ROUTES, None, "generate", said)
    assert ("tools" in found.capabilities) == able
    assert ("tools" in abilities(found)) == able


def test_a_hidden_model_is_not_listed_and_answers_by_its_name() -> None:
    """For a model that only some program uses."""
    models = [ModelConfig("a", display_name="The A", description="for all"), ModelConfig("b", hidden=True)]

    class Status:
        async def models(self) -> list[dict[str, Any]]:
            return [card(model, ROUTES, None, "") for model in models]

        async def model(self, name: str) -> dict[str, Any] | None:
            return next((each for each in await self.models() if each["id"] == name), None)

        def resolve(self, name: str, caller: object) -> str:
            return name

        def called(self, name: str, caller: object) -> str:
            return name

    async def play() -> None:
        endpoints = ModelEndpoints(SimpleNamespace(status=Status()))  # type: ignore[arg-type]
        listed = json.loads((await endpoints.every(Request("GET", "/", "/", "", Headers(), caller=ANYBODY))).body)  # type: ignore[arg-type]
        assert [(each["id"], each["display_name"], each["description"]) for each in listed["data"]] == [
            ("a", "The A", "for all")
        ]
        one = await endpoints.one(Request("GET", "/", "/", "", Headers(), params={"model": "b"}, caller=ANYBODY))
        assert json.loads(one.body)["id"] == "b"  # type: ignore[arg-type]

    asyncio.run(play())


def test_a_list_that_is_drawn_up_while_the_configuration_changes_is_of_one_moment(tmp_path: Path) -> None:
    """A model that a reload gives replicas meanwhile has engines of which the list's moment knows nothing."""

    alone = {name: ModelConfig(name) for name in map(str, range(2 * AT_A_TIME))}
    pairs = {
        name: replace(
            model, replicas=ReplicaConfig(of=tuple(replace(model, name=f"{name}@{n}", replica_of=name) for n in (1, 2)))
        )
        for name, model in alone.items()
    }

    async def play() -> None:
        current, gate = (
            Current(Config(models=alone)),
            SimpleNamespace(refusal=None, requests=0, offers=Offers({}, {}, lambda _: {})),
        )
        runtime, resolver = (
            RuntimeEnvironment(home=tmp_path),
            lambda model: SimpleNamespace(routes=lambda model: ROUTES),
        )
        status = Status(current, runtime, resolver, gate, Learnt(None), Later(), lambda: 0)  # type: ignore[arg-type]
        await status.models()  # which reads the cache, in a thread
        listing = asyncio.ensure_future(status.models())
        await asyncio.sleep(0)
        assert not listing.done()
        current.apply(Config(models=pairs))
        assert len(await listing) == 2 * AT_A_TIME

    asyncio.run(play())
