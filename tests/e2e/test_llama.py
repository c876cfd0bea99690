"""A real llama.cpp behind the installed package: the system's daemon, its environment, a real answer, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site
from tests.machine import container
from tests.machine.container import CannotBoot

pytestmark = [pytest.mark.machine, pytest.mark.llama]

CONFIG = """
server: {idle_exit: never}
devices: []
idle: never
models:
  smollm2: {engine: llama.cpp, model: /srv/smollm2.gguf, max_model_len: 1024, start_timeout: 5m}
  absent: {engine: llama.cpp, model: /srv/absent.gguf}
"""
QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def site(package: Path) -> Iterator[Site]:
    """A machine whose engines' folder has an environment with llama.cpp, as an administrator would make it."""
    folder = container.cache() / "llama"
    if not (folder / ".vllmd-stamp").exists():
        pytest.skip("no llama.cpp here: packaging/dev/setup llama")
    binds = {folder / "llama.cpp": "/var/lib/vllmd/engines/llama.cpp", next(folder.glob("*.gguf")): "/srv/smollm2.gguf"}
    gomp = next(Path("/usr/lib").glob("*/libgomp.so.1"))  # the .deb recommends it, the tree has no recommended packages
    try:
        with container.booted(binds={**binds, gomp: str(gomp)}) as machine:
            container.install(machine, package)
            site = Site(machine)
            site.configure(CONFIG)
            yield site
    except CannotBoot as reason:
        pytest.skip(f"no container: {reason}")


def test_the_check_finds_the_program_and_misses_nothing(site: Site) -> None:
    """As the engines' user, whom the environment is not writable for."""
    checked = site.machine.run("vllmd --check", check=False)
    assert checked.returncode == 0, checked.stderr
    assert "valid: 2 models" in checked.stdout


def test_a_first_request_is_answered_truly(site: Site) -> None:
    """Woken, started in a scope of its own as the engines' user, and its memory counted as the host's."""
    body = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    status, answer = site.post("/v1/chat/completions", body)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"] == "The capital of France is Paris."
    scope = site.scope("smollm2")
    assert scope.startswith("vllmd-model-smollm2-")
    assert site.users(scope) == {"vllmd-engine"}
    program = site.machine.out(f"tr '\\0' ' ' </proc/{site.engine_pid('smollm2')}/cmdline")
    assert program.startswith("/var/lib/vllmd/engines/llama.cpp/")
    assert site.status()["host_memory"]["promised"] > 512 << 20


def test_a_model_without_its_file_is_told_of_in_one_line(site: Site) -> None:
    """To the client what helps him; to the operator llama.cpp's own line and what to do."""
    body = {"model": "absent", "messages": [{"role": "user", "content": QUESTION}]}
    status, answer = site.post("/v1/chat/completions", body)
    assert status == 503
    assert "/srv/absent.gguf" not in str(answer)
    why = site.machine.out("vllmctl why absent")
    assert "failed to open GGUF file '/srv/absent.gguf'" in why


def test_it_stops_and_leaves_nothing(site: Site) -> None:
    """By SIGTERM, with status 0."""
    scope = site.scope("smollm2")
    site.machine.run("vllmctl stop smollm2")
    site.machine.wait_until(lambda: site.state("smollm2") == "stopped")
    assert site.active(scope) == "inactive"
    assert "ended with status 0" in site.machine.journal("vllmd-launcher.service")
