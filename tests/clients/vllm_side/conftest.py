"""Stands in for vLLM's ``tests/conftest.py``: adapters of random weights in the place of its own."""

from __future__ import annotations

import json
import os

import pytest

HOW = json.loads(os.environ.get("VLLMD_TESTS", "{}"))  # it is collected with all other tests, too, and has none then


@pytest.fixture(scope="session")
def qwen3_lora_files() -> str:
    return str(HOW["adapters"][0])


@pytest.fixture(scope="session")
def qwen3_meowing_lora_files() -> str:
    return str(HOW["adapters"][0])


@pytest.fixture(scope="session")
def qwen3_woofing_lora_files() -> str:
    return str(HOW["adapters"][1])
