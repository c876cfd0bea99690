"""What the tests of the library share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.site import Stub, Vllmd, make_stub, running

CONFIG = {
    "devices": [{"memory": "80GiB"}],
    "idle": {"sleep_after": "never", "stop_after": "never"},
    "models": {
        "org/tiny": {"engine": "sim", "aliases": ["t"], "gpu_memory": "4GiB"},
        "org/embed": {"engine": "sim", "gpu_memory": "4GiB", "options": {"dimensions": 4}},
        "org/cut": {"engine": "sim", "gpu_memory": "4GiB", "options": {"fail": ["crash-mid-stream"]}},
        "org/broken": {"engine": "sim", "gpu_memory": "4GiB", "command": "/nonexistent/engine"},
    },
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """A stand-in under vLLM's name."""
    return make_stub(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def vllmd(tmp_path_factory: pytest.TempPathFactory, stub: Stub) -> Iterator[Vllmd]:
    """The machine's daemon, as far as a module of tests is concerned."""
    with running(tmp_path_factory.mktemp("site"), CONFIG, {"PATH": stub.path}) as daemon:
        yield daemon


@pytest.fixture
def here(vllmd: Vllmd, monkeypatch: pytest.MonkeyPatch) -> Vllmd:
    """That daemon is the one which managers find."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", vllmd.socket)
    monkeypatch.delenv("VLLMD_URL", raising=False)
    return vllmd


@pytest.fixture
def nowhere(stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    """No vllmd runs here."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "none.sock"))
    monkeypatch.delenv("VLLMD_URL", raising=False)
    monkeypatch.setenv("PATH", stub.path)
    return stub
