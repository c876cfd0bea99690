"""Another engine for real: transformers serve. (vLLM that embeds: tests/e2e/test_conformance.py.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RealVllm
from tests.engines.driven import Driven
from tests.engines.test_stand_ins import free_port
from tests.vllm_on_cpu import ONE_THREAD
from vllmd.config.types import ModelConfig
from vllmd.engines.base import Place

LIMIT = 240.0  # seconds: on two busy cores
Start = Callable[..., Driven]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a model as its kind says and waits until it is ready."""
    running: list[Driven] = []

    def begin(**settings: Any) -> Driven:
        running.append(Driven(ModelConfig("m", **settings), Place(tmp_path, port=free_port()), LIMIT))
        return running[-1].wait_ready()

    yield begin
    for one in running:
        one.close()


@pytest.mark.vllm
def test_transformers_serve_answers_the_same_after_a_sleep(start: Start, real_vllm: RealVllm, accelerate: Path) -> None:
    """Level 2 drops the weights and loads them again; any name but the one that it is pinned to is refused."""
    one = start(
        engine="transformers",
        model=str(real_vllm.model),
        command=(str(real_vllm.command.with_name("transformers")),),
        options={"cpu": True},
        env={"PYTHONPATH": str(accelerate), "HF_HUB_OFFLINE": "1", **ONE_THREAD},
    )
    before = one.chat()
    one.call(one.engine.alive(one.model))
    one.call_all(one.engine.sleep(2, freeze=False))
    one.call(one.engine.alive(one.model))
    one.call_all(one.engine.wake(2))
    assert one.chat() == before
    assert one.http.post("/v1/chat/completions", json={"model": "m", "messages": []}).status_code == 400
    one.end()


@pytest.mark.vllm
def test_transformers_without_accelerate_says_what_is_missing(real_vllm: RealVllm, tmp_path: Path) -> None:
    """Its own words, and no retry."""
    command = (str(real_vllm.command.with_name("transformers")),)
    model = ModelConfig("m", engine="transformers", model=str(real_vllm.model), command=command,
                        env={"HF_HUB_OFFLINE": "1", **ONE_THREAD}, options={"cpu": True})  # fmt: skip
    one = Driven(model, Place(tmp_path, port=free_port()))
    try:
        assert one.popen.wait(LIMIT) != 0
        failure = one.engine.failure(one.lines())
        assert failure.permanent
        assert "requires `accelerate`. You can install it with `pip install accelerate`" in failure.reason
    finally:
        one.close()
