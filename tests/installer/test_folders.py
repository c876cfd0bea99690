"""Versions side by side: which is in use, going back, removing, and what an interrupted run left."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.engines.test_environments import environment
from vllmd.config.engine_kinds import WITH_VERSIONS
from vllmd.config.types import ModelConfig
from vllmd.core.types import Placement
from vllmd.daemon.engine_process import EngineProcess, environment_now, fingerprint, is_outdated
from vllmd.engines import engine_of, environments
from vllmd.engines.base import Listen, Place
from vllmd.errors import BadRequest, ConfigError, Conflict, NotFound
from vllmd.installer import folders, recipes


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of environments, with two versions, and an empty PATH."""
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for version in ("1.0", "2.0"):
        environment(tmp_path, version)
    return tmp_path


def used(root: Path) -> str:
    found = folders.in_use(root, "llama.cpp")
    return found.version if found else ""


def test_use_and_rollback_take_turns(root: Path) -> None:
    """The newest until one is chosen; rollback goes back, and forth again."""
    with folders.changing(root, "llama.cpp") as folder:
        assert used(root) == "2.0"
        with pytest.raises(NotFound):
            folders.rollback(folder)
        assert folders.use(folder, "1.0") == "2.0"
        assert used(root) == "1.0"
        assert folders.rollback(folder) == ("2.0", "1.0")
        assert folders.rollback(folder) == ("1.0", "2.0")
        assert folders.use(folder, "1.0") == "1.0"  # which is no change: one can still go back
        assert folders.rollback(folder) == ("2.0", "1.0")
        with pytest.raises(NotFound, match=r"these are: 2\.0, 1\.0"):
            folders.use(folder, "3.0")


def test_a_version_is_removed_unless_it_runs(root: Path) -> None:
    """What runs keeps its files; the link to what is gone goes along, and the newest is in use."""
    program = root / "llama.cpp/2.0/bin/python"
    argv = ["/bin/sh", "-c", "echo; read x", str(program)]
    running = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.readline()  # only now /proc has its arguments for certain
    with folders.changing(root, "llama.cpp") as folder:
        folders.use(folder, "2.0")
        try:
            with pytest.raises(Conflict, match=f"runs, as process {running.pid}"):
                folders.remove(folder, "2.0")
        finally:
            running.communicate()
        assert folders.remove(folder, "2.0") == "1.0"
        assert sorted(os.listdir(folder)) == [".lock", "1.0"]
        assert folders.remove(folder, "1.0") == ""
        with pytest.raises(NotFound):
            folders.remove(folder, "1.0")


def test_only_one_changes_a_kind_and_tidies_first(root: Path) -> None:
    """What a run that was killed left is removed by the next, which alone is there."""
    (root / "llama.cpp/.making-x/env/bin").mkdir(parents=True)
    with folders.changing(root, "llama.cpp") as folder:
        assert not (folder / ".making-x").exists()
        with pytest.raises(Conflict, match="another vllmctl engine is at work"), folders.changing(root, "llama.cpp"):
            pass
        with folders.changing(root, "vllm"):
            pass


@pytest.mark.parametrize("version", ["", "../1", "-1", ".1", "1/2", "v1", "1 2", "1" * 65])
def test_a_version_is_a_word_for_a_folder_and_for_pip(version: str) -> None:
    """Nothing that comes over the socket names another folder, or is an option of pip's."""
    with pytest.raises(BadRequest):
        folders.known_version(version)
    with pytest.raises(BadRequest):
        folders.known_kind(f"../{version}")


def test_a_model_may_name_its_version(root: Path) -> None:
    """It comes before the one in use and before PATH; one that is not here is named with those that are."""
    (root / "bin").mkdir()
    (root / "bin/llama-server").write_text("#!/bin/sh\n")
    (root / "bin/llama-server").chmod(0o755)
    model = ModelConfig("m", engine="llama.cpp", model="/srv/a.gguf", engine_version="1.0")
    assert engine_of(model).launch(model, Place(Path("/run/x"))).argv[0] == str(root / "llama.cpp/1.0/bin/python")
    model = ModelConfig("m", engine="llama.cpp", engine_version="0.9")
    with pytest.raises(
        ConfigError, match=r"models\.m\.engine_version: llama\.cpp 0\.9 is not installed \(here: 2\.0, 1\.0"
    ):
        environments.chosen(model)
    assert environments.chosen(ModelConfig("m", engine="llama.cpp")) is None  # PATH has one


def test_a_reload_replaces_what_runs_in_another_version(root: Path) -> None:
    """What an older vllmd started, which noted nothing, is left alone, and so is what could not be started any more."""
    model = ModelConfig("m", engine="llama.cpp")
    process = EngineProcess(model, engine_of(model), "m-1", Listen(), Placement(), fingerprint(model))
    assert not is_outdated(process, model)
    process.environment = environment_now(model)
    assert process.environment == str(root / "llama.cpp/2.0")
    assert not is_outdated(process, model)
    with folders.changing(root, "llama.cpp") as folder:
        folders.use(folder, "1.0")
    assert is_outdated(process, model)
    assert not is_outdated(process, ModelConfig("m", engine="llama.cpp", engine_version="7"))


def test_one_list_of_kinds() -> None:
    """What can be installed, what a model may name a version of, and where programs are looked for."""
    assert set(recipes.KINDS) == set(environments.PROGRAMS) == set(WITH_VERSIONS)


def test_the_build_is_for_what_the_machine_has(tmp_path: Path) -> None:
    """CUDA where NVIDIA's driver is loaded, of the version that it runs; AMD's GPUs are not passed over in silence."""
    assert recipes.build_here("vllm", tmp_path) == "cpu"
    (tmp_path / "kfd").touch()
    assert recipes.build_here("llama.cpp", tmp_path) == "cpu"
    with pytest.raises(BadRequest, match="AMD"):
        recipes.build_here("vllm", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert recipes.build_here("vllm", tmp_path) == "cuda"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n")
    assert recipes.cuda_tag(tmp_path / "version") == "cu132"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Wed\n")
    assert recipes.cuda_tag(tmp_path / "version") == "cu128"
    assert recipes.cuda_tag(tmp_path / "none") == "cu128"
