"""Where engines' environments are found, and which program an engine runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.estimate.files import cached
from vllmd.config.sources import default_file
from vllmd.config.types import ModelConfig
from vllmd.engines import engine_of, environments
from vllmd.engines.base import Place
from vllmd.engines.llama_cpp import OWN_SERVER

PLACE = Place(Path("/run/x"))


def environment(root: Path, version: str, *programs: str, kind: str = "llama.cpp") -> Path:
    """An environment as venv makes it, as far as anybody looks."""
    folder = root / kind / version / "bin"
    folder.mkdir(parents=True)
    for name in ("python", *programs):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder.parent


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of environments, and an empty PATH."""
    monkeypatch.setenv("VLLMD_ENGINES", str(tmp_path / "engines"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "engines"


def argv(**settings: object) -> tuple[str, ...]:
    model = ModelConfig("m", engine="llama.cpp", model="/srv/a.gguf", **settings)  # type: ignore[arg-type]
    return engine_of(model).launch(model, PLACE).argv


def test_the_users_own_folder_comes_before_the_machines() -> None:
    """XDG_DATA_HOME, else below the home; a system's daemon has neither."""
    assert environments.roots({"XDG_DATA_HOME": "/d", "HOME": "/h"}) == (Path("/d/vllmd/engines"), environments.SYSTEM)
    assert environments.roots({"HOME": "/h"})[0] == Path("/h/.local/share/vllmd/engines")
    assert environments.roots({}) == (environments.SYSTEM,)


def test_the_newest_is_in_use_unless_a_link_or_the_asker_says_another(root: Path) -> None:
    """Versions are numbers, not letters; what is not finished, or has no Python, is none."""
    for version in ("0.9.1", "0.10.0", "0.10.0rc1", ".0.11.0-being-made"):
        environment(root, version)
    (root / "llama.cpp" / "0.12.0").mkdir()
    assert [one.version for one in environments.installed("llama.cpp")] == ["0.10.0", "0.10.0rc1", "0.9.1"]
    newest = environments.in_use("llama.cpp")
    assert newest and newest.version == "0.10.0"
    older = environments.in_use("llama.cpp", "0.10.0rc1")
    assert older and older.version == "0.10.0rc1"
    (root / "llama.cpp" / "current").symlink_to("0.9.1")
    linked = environments.in_use("llama.cpp")
    assert linked and linked.path == root / "llama.cpp" / "0.9.1"
    assert environments.in_use("vllm") is None


def test_llama_cpp_is_an_installed_server_else_the_environments(root: Path, tmp_path: Path) -> None:
    """PATH, which is the administrator's, goes first; a command goes before everything."""
    assert argv()[0] == "llama-server"  # there is none: the launcher will say so
    made = environment(root, "2026.10")
    assert argv()[:3] == (str(made / "bin/python"), "-I", str(OWN_SERVER))
    (made / "bin/llama-server").write_text("#!/bin/sh\n")
    (made / "bin/llama-server").chmod(0o755)
    assert argv()[0] == str(made / "bin/llama-server")
    (tmp_path / "bin/llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "bin/llama-server").chmod(0o755)
    assert argv()[0] == "llama-server"
    assert argv(command=("/opt/x/llama-server",))[0] == "/opt/x/llama-server"
    assert argv(command=("/opt/x/bin/python3.12",))[:2] == ("/opt/x/bin/python3.12", "-I")


def test_vllm_is_that_of_path_else_the_environments(root: Path, tmp_path: Path) -> None:
    """By the same rule."""
    model = ModelConfig("m")
    assert engine_of(model).launch(model, PLACE).argv[:2] == ("vllm", "serve")
    made = environment(root, "0.33.0", "vllm", kind="vllm")
    assert engine_of(model).launch(model, PLACE).argv[:2] == (str(made / "bin/vllm"), "serve")
    (tmp_path / "bin/vllm").write_text("#!/bin/sh\n")
    (tmp_path / "bin/vllm").chmod(0o755)
    assert engine_of(model).launch(model, PLACE).argv[0] == "vllm"


def test_a_repository_in_the_cache_is_a_file(root: Path, tmp_path: Path) -> None:
    """No server asks the hub for what is here; the projector beside it lets it see."""
    snapshot = cached(tmp_path, "org/name-GGUF")
    for name in ("name-Q4_K_M.gguf", "name-Q8_0.gguf", "mmproj-name-f16.gguf"):
        (snapshot / name).write_bytes(b"GGUF" * len(name))
    model = ModelConfig("m", engine="llama.cpp", model="org/name-GGUF:Q4_K_M")
    place = Place(Path("/run/x"), hub=tmp_path)
    words = engine_of(model).launch(model, place).argv
    assert words[1:5] == (
        "--model",
        str(snapshot / "name-Q4_K_M.gguf"),
        "--mmproj",
        str(snapshot / "mmproj-name-f16.gguf"),
    )
    absent = ModelConfig("m", engine="llama.cpp", model="org/other:Q8_0")
    assert engine_of(absent).launch(absent, place).argv[1:3] == ("--hf-repo", "org/other:Q8_0")


@pytest.mark.skipif(os.geteuid() != 0, reason="root becomes somebody else for this")
def test_a_home_that_is_closed_to_us_has_no_environments() -> None:
    """``sudo -u`` keeps root's HOME: that is not the end of whoever asks."""
    with tempfile.TemporaryDirectory() as closed:  # only root may look into it
        assert ended_as_somebody(lambda: environments.in_use("vllm", variables={"HOME": closed}) is None)
        assert ended_as_somebody(lambda: not environments.installed("vllm", {"HOME": closed}))
        config = {"HOME": closed, "XDG_CONFIG_HOME": closed}
        assert ended_as_somebody(lambda: str(default_file(config)).endswith("vllmd.yaml"))


def ended_as_somebody(question: Callable[[], bool]) -> bool:
    """The answer of a user without rights."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            status = 0 if question() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
