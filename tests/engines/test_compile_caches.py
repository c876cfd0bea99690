"""What engines compile: kept for each version, found again by each start, and gone with the version."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines.test_environments import environment
from vllmd.cli import main
from vllmd.config.types import ModelConfig
from vllmd.daemon.homes import Homes
from vllmd.engines import compile_caches, environments
from vllmd.engines.compile_caches import place, remove, variables
from vllmd.engines.environments import Environment

VLLM = Environment("vllm", "0.33.0", Path("/var/lib/vllmd/engines/vllm/0.33.0"))


def test_each_version_has_a_folder_in_the_engines_home() -> None:
    """Nothing in /tmp, which a reboot empties; llama.cpp compiles nothing, and what is not ours is left alone."""
    found = variables(VLLM, Path("/home"))
    assert set(found) == {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"}
    assert {str(Path(path).parent) for path in found.values()} == {"/home/.cache/vllmd/vllm/0.33.0"}
    assert variables(Environment("llama.cpp", "1", Path("/x")), Path("/home")) == {}
    assert variables(None, Path("/home"), "vllm") == {"TORCHINDUCTOR_CACHE_DIR": "/home/.cache/vllmd/inductor"}
    assert variables(None, Path("/home"), "sim") == variables(VLLM, None) == {}


def test_the_home_is_that_which_the_engine_sees() -> None:
    """The model's own word first; the daemon's where no other is known, but never for another user's engine."""
    homes = Homes(None, Path("/own"), {"HOME": "/daemon"})
    assert homes.at(ModelConfig("m")) == Path("/daemon")
    assert homes.at(ModelConfig("m", env={"HOME": "/mine"})) == Path("/mine")
    assert Homes(Path("/shared"), None, {"HOME": "/daemon"}).at(ModelConfig("m")) == Path("/shared")
    assert Homes(None, None, {"HOME": "/daemon"}).at(ModelConfig("m", user="nobody-of-this-name")) is None


def test_a_version_takes_along_what_it_has_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing of another one; a link in its place is removed, not what it leads to."""
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for version in ("0.32.0", "0.33.0"):
        environment(tmp_path / "engines", version, kind="vllm")
        (place(tmp_path / "home", "vllm", version) / "triton").mkdir(parents=True)
    assert main(["engine", "remove", "vllm", "0.32.0"]) == 0
    assert [each.name for each in (tmp_path / "home/.cache/vllmd/vllm").iterdir()] == ["0.33.0"]
    (tmp_path / "precious").mkdir()
    place(tmp_path / "home", "vllm", "0.31.0").symlink_to(tmp_path / "precious")
    assert remove(tmp_path / "home", "vllm", "0.31.0") == ""
    assert (tmp_path / "precious").is_dir()
    assert remove(tmp_path / "home", "vllm", "never") == ""


def test_the_systems_engines_have_the_homes_of_their_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared one, and each model's own."""
    monkeypatch.setattr(compile_caches, "SYSTEM_HOMES", tmp_path)
    (tmp_path / "one-12345678").mkdir()
    assert compile_caches.homes(environments.SYSTEM) == [compile_caches.SYSTEM_HOME, tmp_path / "one-12345678"]
    monkeypatch.setattr(compile_caches, "SYSTEM_HOMES", tmp_path / "closed")
    assert compile_caches.homes(environments.SYSTEM) == [compile_caches.SYSTEM_HOME]
