"""From what a user writes as ``gpu_memory`` to what vLLM is told, through the estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.estimate.files import LLAMA_8B, GiB, model
from vllmd.config.types import ModelConfig
from vllmd.engines.base import Place
from vllmd.engines.estimate import estimate
from vllmd.engines.vllm import Vllm

UTILIZATION, KV_CACHE = "--gpu-memory-utilization", "--kv-cache-memory-bytes"


def flags(path: Path, device_ids: tuple[str, ...] = ("GPU-a",), **settings: Any) -> dict[str, str]:
    """The two flags as vLLM gets them on an 80 GiB device, the user's own first."""
    config = ModelConfig("m", model=str(path), **settings)
    told = estimate(config, Path("/no/such/cache"), 80 * GiB)
    place = Place(Path("/run/m"), device_ids, told.footprint.awake, 80 * GiB, kv_cache=told.kv_cache)
    argv = Vllm(accelerator=lambda: True).launch(config, place).argv
    return {flag: argv[argv.index(flag) + 1] for flag in (UTILIZATION, KV_CACHE) if flag in argv}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return model(tmp_path, LLAMA_8B, BF16=15 * GiB)


def test_auto_sets_both(llama: Path) -> None:
    """The start check looks at the utilization even when the cache's size is given: 21.4 of 80 GiB, rounded down."""
    assert flags(llama) == {UTILIZATION: "0.2674", KV_CACHE: str(4 * GiB)}


def test_bytes_set_both(llama: Path) -> None:
    """The cache is what weights and overhead leave of the 20 GiB."""
    left = 20 * GiB - 15 * GiB - 3 * GiB // 2 - 15 * GiB * 6 // 100
    assert flags(llama, gpu_memory=20 * GiB) == {UTILIZATION: "0.25", KV_CACHE: str(left)}


def test_a_fraction_is_passed_literally(llama: Path) -> None:
    """vLLM's own meaning, vLLM's own sizing."""
    assert flags(llama, gpu_memory=0.35) == {UTILIZATION: "0.35"}


def test_an_unknown_model_gets_the_share_of_the_device_only() -> None:
    """What is left for its cache only the engine can tell."""
    assert flags(Path("/no/such/model")) == {UTILIZATION: "0.9"}


def test_the_users_own_flag_is_not_given_twice(llama: Path) -> None:
    """argparse would take the last one, and the ledger another."""
    config = ("--kv-cache-memory-bytes=1000000000",)
    told = ModelConfig("m", model=str(llama), extra_args=config)
    place = Place(Path("/run/m"), ("GPU-a",), 20 * GiB, 80 * GiB, kv_cache=GiB)
    argv = Vllm(accelerator=lambda: True).launch(told, place).argv
    assert [each for each in argv if each.startswith(KV_CACHE)] == [*config]


def test_on_a_cpu_neither_is_set(llama: Path) -> None:
    """There both flags mean host memory."""
    assert flags(llama, device_ids=()) == {}
