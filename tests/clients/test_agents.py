"""Coding agents as people install them, told of vllmd in three lines, without the internet: they have their answer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.admin.site import Site, running
from tests.machine import container

pytestmark = pytest.mark.clients

LIMIT = 180.0  # seconds; on idle cores it is ten
PROGRAMS = container.cache() / "clients" / "node" / "node_modules" / ".bin"
CONFIG = """\
devices: []
server: {{idle_exit: never}}
idle: never
models: {{coder: {{engine: sim, local_devices: 0, max_model_len: 200000}}}}
"""
CODEX = """\
model = "coder"
model_provider = "vllmd"
[model_providers.vllmd]
name = "vllmd"
base_url = "http://127.0.0.1:{port}/v1"
supports_websockets = {sockets}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("agents")
    with running(folder, CONFIG.format(folder=folder)) as site:
        yield site


def said(program: str, *words: str, home: Path, **environment: str) -> str:
    """What the agent prints; skips where it is not installed."""
    if not (PROGRAMS / program).exists():
        pytest.skip(f"no {program} here: packaging/dev/setup clients")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), **environment}
    command = [str(PROGRAMS / program), *words]
    done = subprocess.run(
        command, env=env, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.parametrize("sockets", ["false", "true"])
def test_codex(site: Site, tmp_path: Path, sockets: str) -> None:
    """Over HTTP at once, or after its WebSocket was refused."""
    (tmp_path / ".codex").mkdir()
    (tmp_path / ".codex" / "config.toml").write_text(CODEX.format(port=site.port, sockets=sockets))
    assert "Say hello" in said("codex", "exec", "--skip-git-repo-check", "Say hello", home=tmp_path)
    refused = 'code="426",method="GET",route="/v1/responses"'
    assert (refused in site.ask("GET", "/metrics").text) == (sockets == "true")


def test_claude_code(site: Site, tmp_path: Path) -> None:
    """Its probe, its prompt, its answer."""
    answer = said(
        *("claude", "-p", "Say hello"),
        home=tmp_path,
        ANTHROPIC_BASE_URL=f"http://127.0.0.1:{site.port}",
        ANTHROPIC_AUTH_TOKEN="any",
        ANTHROPIC_MODEL="coder",
        ANTHROPIC_SMALL_FAST_MODEL="coder",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )
    assert answer.strip()
    assert 'code="200",method="POST",route="/v1/messages"' in site.ask("GET", "/metrics").text
