"""A real llama.cpp behind the installed package: the system's daemon, its environment, a real answer, no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site
from tests.machine import container
from tests.machine.container import REPOSITORY, CannotBoot

pytestmark = [pytest.mark.machine, pytest.mark.llama]

CONFIG = """
server: {idle_exit: never}
devices: []
idle: never
pull: {endpoint: "http://127.0.0.1:8099", keep_free: 0}
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


def test_a_model_comes_from_the_hub_by_one_command_and_goes_again(site: Site) -> None:
    """Fetched as the engines' user, its file the daemon's, answering, removed; all by a member of vllmd-admin."""
    machine, name = site.machine, "org/SmolLM2-GGUF"
    machine.add_user("op", groups="vllmd-admin")
    for program in ("tests/store/hub.py", "tests/loopback.py"):  # the first imports the second
        machine.copy_in(REPOSITORY / program, f"/srv/hub/{program}")
    machine.run("ln -sf /srv/smollm2.gguf /srv/SmolLM2-Q4_1.gguf")
    machine.run(
        "systemd-run --unit=hub --working-directory=/srv/hub "
        f"python3 -m tests.store.hub 8099 {name}=/srv/SmolLM2-Q4_1.gguf"
    )
    machine.wait_until("curl -s http://127.0.0.1:8099 || ! systemctl is-active hub")
    said = machine.run(["vllmctl", "run", name, "--temperature", "0", *QUESTION.split()], user="op", check=False)
    assert said.stdout == "The capital of France is Paris.\n", said.stderr + machine.journal()[-3000:]
    assert "was fetched" in said.stderr
    file = "/var/lib/vllmd/models.d/org-smollm2-gguf.yaml"
    assert machine.out(f"stat -c '%U %a' {file}").split() == ["vllmd", "644"]
    repository = "/var/lib/vllmd-engine/.cache/huggingface/hub/models--org--SmolLM2-GGUF"
    assert machine.out(f"stat -c %U {repository}").strip() == "vllmd-engine"
    assert "org/SmolLM2-GGUF" in machine.out("vllmctl list", user="op")
    machine.run("systemctl restart vllmd.service")
    assert site.state(name) in ("running", "stopped")
    machine.run(["vllmctl", "rm", "--files", "--yes", name], user="op")
    assert machine.run(f"test -e {repository} -o -e {file}", check=False).returncode == 1
    machine.add_user("somebody")
    refused = machine.run(["vllmctl", "pull", name], user="somebody", check=False)
    assert refused.returncode == 77


def test_it_stops_and_leaves_nothing(site: Site) -> None:
    """By SIGTERM, with status 0."""
    scope = site.scope("smollm2")
    site.machine.run("vllmctl stop smollm2")
    site.machine.wait_until(lambda: site.state("smollm2") == "stopped")
    assert site.active(scope) == "inactive"
    assert "ended with status 0" in site.machine.journal("vllmd-launcher.service")
