"""Engines' programs are looked at before anything starts: whether they are there, and start, for who runs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.conftest import RealLlama
from vllmd.config.types import ModelConfig
from vllmd.engines import environments, programs
from vllmd.engines.programs import troubles


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environments, and a PATH with a shell only."""
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(tmp_path))


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_what_is_missing_is_said_once_with_where_it_was_looked_for(tmp_path: Path) -> None:
    """Beside what installs it. Of a server that is somebody else's, and of a stand-in, nothing is looked for."""
    models = [
        *(ModelConfig(name) for name in ("a", "b")),
        ModelConfig("c", engine="llama.cpp", model="/a.gguf"),
        ModelConfig("d", engine="remote", options={"url": "http://x/v1"}),
        ModelConfig("e", engine="sim"),
        ModelConfig("f", engine="tei", model="x", command=("/nowhere/tei",)),
    ]
    first, second, third = troubles(models, system=False)
    assert (first.models, first.what) == (("a", "b"), f"there is no command 'vllm': looked in {tmp_path}")
    assert "vllmctl engine install vllm" in first.advice
    assert "vllmctl engine install llama.cpp" in second.advice
    assert str(third).startswith("f: there is no command '/nowhere/tei'; ")


def test_the_systems_engines_have_a_path_of_their_own() -> None:
    """Not that of whoever asks."""
    (trouble,) = troubles([ModelConfig("a", engine="tei", model="x")], system=True)
    assert trouble.what.endswith(f"for vllmd-engine: looked in {environments.PATH}")


def test_a_python_without_the_engines_module_does_not_start(tmp_path: Path) -> None:
    """Whether it is named itself, or by the first line of the engine's script; the module is not imported."""
    own = script(tmp_path / "vllm", f"#!{sys.executable}\nraise SystemExit(3)\n")
    models = [
        ModelConfig("a", command=(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve")),
        ModelConfig("b", command=(str(own),)),
    ]
    found = troubles(models, system=False)
    assert [trouble.models for trouble in found] == [("a",), ("b",)]
    assert all("does not start: No module named 'vllm'" in trouble.what for trouble in found)
    assert all("vllmctl engine install vllm" in trouble.advice for trouble in found)


def test_a_module_is_looked_for_where_the_models_env_says(tmp_path: Path) -> None:
    """As at the start itself; a model without that variable is told apart."""
    (tmp_path / "lib/vllm").mkdir(parents=True)
    (tmp_path / "lib/vllm/__init__.py").write_text("raise SystemExit(3)\n")
    own = script(tmp_path / "vllm", f"#!{sys.executable}\nraise SystemExit(3)\n")
    models = [
        ModelConfig("a", command=(str(own),), env={"PYTHONPATH": str(tmp_path / "lib")}),
        ModelConfig("b", command=(str(own),)),
    ]
    assert [trouble.models for trouble in troubles(models, system=False)] == [("b",)]


def test_what_may_not_be_executed(tmp_path: Path) -> None:
    """A file without the bit, and a llama-server that says what it lacks."""
    closed = script(tmp_path / "closed", "#!/bin/sh\n", 0o644)
    broken = script(
        tmp_path / "llama-server", "#!/bin/sh\necho libgomp.so.1: cannot open shared object file >&2\nexit 127\n"
    )
    models = [
        ModelConfig("a", engine="command", command=(str(closed), "${PORT}"), options={"health": "/x"}),
        ModelConfig("b", engine="llama.cpp", model="/a.gguf", command=(str(broken),)),
    ]
    first, second = troubles(models, system=False)
    assert first.what == f"{closed} cannot be executed: Permission denied"
    assert second.what == f"{broken} does not start: libgomp.so.1: cannot open shared object file"
    assert "library is missing" in second.advice


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as somebody else")
def test_it_is_looked_at_as_the_engines_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What root may run, that user may not be able to reach."""
    monkeypatch.setattr(programs, "ENGINES_USER", "nobody")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    server = script(folder / "llama-server", "#!/bin/sh\n")
    model = ModelConfig("a", engine="llama.cpp", model="/a.gguf", command=(str(server),))
    assert troubles([model], system=False) == []
    (trouble,) = troubles([model], system=True)
    assert trouble.what == f"{server} cannot be executed for nobody: Permission denied"


@pytest.mark.llama
def test_a_real_one_starts(llama: RealLlama) -> None:
    """The package is imported, so that a library which is missing shows."""
    assert troubles([ModelConfig("a", engine="llama.cpp", model=str(llama.model))], system=False) == []
