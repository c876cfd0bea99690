"""Models found on disk are models only under names that the configuration could give them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.estimate.files import LLAMA_8B, GiB, cached, model
from vllmd.config.types import Config
from vllmd.daemon.discovery import with_discovered


@pytest.mark.parametrize(
    "name", ["e\nOnSuccess=evil.service\nX=", "-trust-remote-code", "--etc--passwd", "a\x1b[31m", "x" * 201]
)
def test_a_folders_name_is_checked_as_a_configured_one(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The engines' user writes that cache: a model's code could name a folder as it likes."""
    for each in ("org/good", name):
        model(cached(tmp_path, each), LLAMA_8B, BF16=GiB)
    with caplog.at_level(logging.WARNING):
        found = with_discovered(Config(discover=True), tmp_path)
    assert set(found.models) == {"org/good"}
    assert "is left out: it is not named like a repository" in caplog.text
