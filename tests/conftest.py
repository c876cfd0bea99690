"""What all tests share: where subprocesses find vllmd, what a skip means, and the machines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import bytecode, examples, pure, side_by_side
from tests.machine import container
from tests.machine.container import CannotBoot, Machine
from vllmd.daemon.event_loop import new_loop

__all__ = ["bytecode", "examples"]  # in this order, and before any test: imported for what they set
REPOSITORY = Path(__file__).resolve().parents[1]

# What daemons of the tests learn stays out of the user's cache.
os.environ["VLLMD_LEARNT"] = ""
os.environ["VLLMD_USAGE"] = os.environ["VLLMD_KEYS"] = os.environ["VLLMD_DISABLED"] = ""


# Tests run on the event loop that users get, or on the one that ``VLLMD_SERVER_EVENT_LOOP`` names; so do the programs
# that they start.
class _UsersLoop(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return new_loop(os.environ.get("VLLMD_SERVER_EVENT_LOOP", "auto"))


asyncio.set_event_loop_policy(_UsersLoop())

# Programs that tests start (python -m vllmd ...) find the package whatever their working directory.
os.environ["PYTHONPATH"] = str(REPOSITORY)


def _fail_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Under CI=true everything must run: what would be skipped has failed."""
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped, which counts as a failure under CI=true. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_in_ci(report)
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """A worker's folder gets a shorter name than xdist's: sockets are made in it, and their paths are limited."""
    if hasattr(config, "workerinput"):
        folder = Path(config.option.basetemp)
        config.option.basetemp = str(folder.with_name(folder.name.removeprefix("popen-")))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    pure.begin(item.nodeid if item.get_closest_marker("pure") else "")
    try:
        yield
    finally:
        pure.begin("")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A worker of several orders its tests as they are to be shared out; whoever runs alone keeps the files' order."""
    for item in items:
        if pure.is_pure(item.path):
            item.add_marker("pure")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: side_by_side.rank(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> side_by_side.ByFile:
    config.option.loadscopereorder = False
    return side_by_side.ByFile(config, log)


@contextlib.contextmanager
def booted_or_skip(suite: str = "bookworm", *, build: bool = False) -> Iterator[Machine]:
    """A booted Debian; where this computer cannot boot one the test is skipped, with the reason."""
    with contextlib.ExitStack() as stack:
        try:
            machine = stack.enter_context(container.booted(suite, container.vllm_binds(), build=build))
        except CannotBoot as reason:
            pytest.skip(f"no container: {reason}")
        yield machine


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """A booted Debian 12 with vllmd's dependencies but without vllmd, shared by the whole run."""
    with booted_or_skip() as machine:
        yield machine


@pytest.fixture(scope="module")
def fresh_machine() -> Iterator[Machine]:
    """A booted Debian 12 of this test module's own."""
    with booted_or_skip() as machine:
        yield machine


@dataclass(frozen=True)
class RealVllm:
    """A real vLLM for the CPU on this computer, outside of any container."""

    command: Path
    model: Path


@pytest.fixture(scope="session")
def real_vllm() -> RealVllm:
    """Where vLLM and the tiny model are; inside a machine they are at container.VLLM_INSIDE and MODEL_INSIDE."""
    if len(container.vllm_binds()) < 2:
        pytest.skip("no vLLM here: packaging/dev/setup vllm model")
    return RealVllm(container.cache() / "vllm/bin/vllm", container.cache() / "tiny-model")


@pytest.fixture(scope="session")
def accelerate(real_vllm: RealVllm) -> Path:
    """What `transformers serve` needs beside vLLM's environment, as an entry of PYTHONPATH."""
    folder = container.cache() / "engines"
    if not (folder / ".vllmd-stamp").exists():
        pytest.skip("no accelerate here: packaging/dev/setup engines")
    return folder


@pytest.fixture(scope="session")
def ray(real_vllm: RealVllm) -> Path:
    """Ray, and the plug-in by which vLLM on a CPU takes it, as an entry of PYTHONPATH beside vLLM's environment."""
    folder = container.cache() / "ray"
    if not (folder / ".vllmd-stamp").exists():
        pytest.skip("no Ray here: packaging/dev/setup ray")
    return folder


@dataclass(frozen=True)
class RealLlama:
    """A real llama.cpp: the folder with its environment, as ``VLLMD_ENGINES`` names it, and SmolLM2's file."""

    environments: Path
    model: Path


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> RealLlama:
    """Where llama.cpp and its model are; engines of the kind are started from there."""
    folder = container.cache() / "llama"
    if not (folder / ".vllmd-stamp").exists():
        pytest.skip("no llama.cpp here: packaging/dev/setup llama")
    monkeypatch.setenv("VLLMD_ENGINES", str(folder))
    return RealLlama(folder, next(folder.glob("SmolLM2-*.gguf")))


def build_package(kind: str) -> Path:
    """The package of this working tree, built when its sources have changed."""
    if os.geteuid() != 0:
        pytest.skip("building the package needs root")
    built = subprocess.run([REPOSITORY / "packaging/dev/build", kind], capture_output=True, text=True)
    if built.returncode:
        pytest.fail(f"the .{kind} does not build:\n{built.stderr}", pytrace=False)
    return REPOSITORY / built.stdout.strip()


@pytest.fixture(scope="session")
def package() -> Path:
    """The .deb of this working tree."""
    return build_package("deb")


@pytest.fixture(scope="session")
def old_package() -> Path:
    """The .deb of an earlier commit, which upgrades begin with (packaging/dev/setup has its number)."""
    made = subprocess.run([REPOSITORY / "packaging/dev/setup", "old"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(made.stderr.strip())
    package = container.cache() / "old/vllmd.deb"
    if not package.exists():
        pytest.xfail(made.stderr.strip())
    return package


@pytest.fixture(scope="session")
def rpm_package() -> Path:
    """The .rpm of this working tree."""
    return build_package("rpm")


@pytest.fixture(scope="module")
def installed_machine(package: Path) -> Iterator[Machine]:
    """A booted Debian 12 of this test module's own with vllmd installed from the .deb, as a user would."""
    with booted_or_skip() as machine:
        container.install(machine, package)
        yield machine


@pytest.fixture
def boot_machine() -> Iterator[Callable[..., Machine]]:
    """Boots as many machines as a test wants: `boot_machine("trixie")`, `boot_machine(build=True)`."""
    with contextlib.ExitStack() as stack:
        yield lambda suite="bookworm", **options: stack.enter_context(booted_or_skip(suite, **options))
