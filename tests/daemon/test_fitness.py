"""A model of the wrong kind is refused before anything is loaded, where its files or its settings tell it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_quotas import Core
from tests.estimate.files import LLAMA_8B, model
from vllmd.admin.counters import Counters
from vllmd.config.types import ModelConfig, ServerConfig
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.fitness import kind_of
from vllmd.daemon.quotas import Quotas
from vllmd.engines.llama_cpp import LlamaCpp
from vllmd.errors import NotFound
from vllmd.proxy.access import ANYBODY
from vllmd.proxy.http import Headers, Request
from vllmd.proxy.limits import Limits
from vllmd.proxy.model_requests import ModelRequests

CHAT, EMBED, HEAR = "/v1/chat/completions", "/v1/embeddings", "/v1/audio/transcriptions"
BERT = {**LLAMA_8B, "architectures": ["BertModel"], "model_type": "bert"}
WHISPER = {**LLAMA_8B, "architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
RANKER = {**LLAMA_8B, "architectures": ["XLMRobertaForSequenceClassification"], "model_type": "xlm-roberta"}


def gate_of(config: ModelConfig, folder: Path) -> AdmissionGate:
    """One that knows what the model's files say."""
    gate = AdmissionGate(EngineResolver(), Quotas([]), Counters())
    gate.configure({config.name: config}, {config.name: config})
    gate.learn_kinds({config.name: kind_of(config, folder)})
    return gate


def refusal(gate: AdmissionGate, route: str) -> str:
    """What a client hears that asks for this path; "" if it is let through."""
    try:
        ModelRequests(gate, Limits(ServerConfig())).target(
            Request("POST", route, route, "", Headers([]), caller=ANYBODY), "m", route
        )
    except NotFound as error:
        return error.message
    return ""


@pytest.mark.parametrize(
    ("files", "route", "instead"),
    [
        (BERT, CHAT, "it is an embedding model, it serves /v1/embeddings"),
        (BERT, "/v1/messages", "it is an embedding model"),
        (RANKER, CHAT, "it is a model that ranks or classifies"),
        (WHISPER, EMBED, "it is a model that writes down speech, it serves /v1/audio/transcriptions"),
        (LLAMA_8B, EMBED, "it is a model that writes text, it serves /v1/chat/completions, /v1/completions"),
    ],
)
def test_the_reason_and_what_would_be_right(tmp_path: Path, files: dict[str, Any], route: str, instead: str) -> None:
    """Nobody loads an embedding model to be told that it does not chat."""
    source = model(tmp_path / "files", files, BF16=1000)
    gate = gate_of(ModelConfig("m", model=str(source)), tmp_path)
    assert refusal(gate, route).startswith(f"the model 'm' does not serve {route}: {instead}")


@pytest.mark.parametrize(("files", "route"), [(BERT, EMBED), (RANKER, "/v1/rerank"), (WHISPER, HEAR), (LLAMA_8B, CHAT)])
def test_what_it_is_for_is_let_through(tmp_path: Path, files: dict[str, Any], route: str) -> None:
    """And so is what only the engine can tell: some models that write text hear, too."""
    source = model(tmp_path / "files", files, BF16=1000)
    gate = gate_of(ModelConfig("m", model=str(source)), tmp_path)
    assert refusal(gate, route) == ""
    assert refusal(gate_of(ModelConfig("m", model=str(model(tmp_path / "b", LLAMA_8B, BF16=9))), tmp_path), HEAR) == ""


@pytest.mark.parametrize("flags", [("--runner", "pooling"), ("--runner=pooling",)])
def test_a_model_that_is_run_for_embeddings_does_not_chat(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Whatever its files would be good for."""
    config = ModelConfig("m", model=str(model(tmp_path / "files", LLAMA_8B, BF16=1000)), extra_args=flags)
    gate = gate_of(config, tmp_path)
    assert "run for embeddings" in refusal(gate, CHAT)
    assert refusal(gate, EMBED) == refusal(gate, "/v1/rerank") == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"extra_args": ("--runner", "generate")},
        {"extra_args": ("--hf-overrides", "{}")},
        {"capabilities": ("chat", "embeddings")},
        {"engine": "command"},
    ],
)
def test_a_model_that_is_used_otherwise_is_not_judged_by_its_files(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A flag or the administrator says what it is for; what other engines make of the files is not known."""
    config = ModelConfig("m", model=str(model(tmp_path / "files", BERT, BF16=1000)), **settings)
    assert refusal(gate_of(config, tmp_path), CHAT) == ""


def test_files_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    """The engine will tell."""
    (tmp_path / "config.json").write_text("[")
    for source in (tmp_path, tmp_path / "none", "org/not-here"):
        assert kind_of(ModelConfig("m", model=str(source)), tmp_path) == ""


def test_the_request_that_wakes_the_daemon_is_refused_before_the_core_hears_of_it(tmp_path: Path) -> None:
    """The files are read while it waits: what it asks for is looked at once more."""
    config = ModelConfig("m", model=str(model(tmp_path / "files", BERT, BF16=1000)))

    async def story() -> None:
        gate, core = AdmissionGate(EngineResolver(), Quotas([]), Counters()), Core()
        core.gate = gate
        gate.configure({"m": config}, {"m": config})
        waiting = asyncio.ensure_future(gate.acquire("m", "", route=CHAT))
        fitting = asyncio.ensure_future(gate.acquire("m", "", route=EMBED))
        await asyncio.sleep(0)
        gate.learn_kinds({"m": kind_of(config, tmp_path)})
        gate.open(core)  # type: ignore[arg-type]
        with pytest.raises(NotFound, match="it is an embedding model"):
            await waiting
        (await fitting).release()
        assert gate.requests == 0

    asyncio.run(asyncio.wait_for(story(), 10))


@pytest.mark.parametrize(
    ("settings", "serves"),
    [
        ({}, set()),
        ({"options": {"embedding": True}}, {EMBED}),
        ({"extra_args": ("--embeddings",)}, {EMBED}),
        ({"options": {"reranking": True}}, {EMBED, "/v1/rerank"}),
        ({"env": {"LLAMA_ARG_RERANKING": "1"}}, {EMBED, "/v1/rerank"}),
    ],
)
def test_llama_embeds_and_ranks_only_when_told(settings: dict[str, Any], serves: set[str]) -> None:
    """llama-server b10549 answers 501 otherwise, and does chat in each of these cases."""
    routes = LlamaCpp().routes(ModelConfig("m", engine="llama.cpp", **settings))
    assert routes & {EMBED, "/v1/rerank"} == serves
    assert CHAT in routes
