"""A real vLLM and a real transformers serve on the CPU that are made of a standby, through the daemon."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import RealVllm
from tests.engines.installed import Site, daemon, ports
from tests.engines.test_standbys import pid_of, until, waiting
from tests.vllm_on_cpu import ENV, ONE_THREAD

pytestmark = pytest.mark.vllm

SCRIPT = """#!{python}
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""
LIMIT = 300.0  # seconds
TICK = os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """A process and all that come from it."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    except OSError:
        pass
    return found


def worked(pid: int) -> float:
    """Seconds of processor time of a process, of all that come from it, and of what it has waited for."""
    total = 0
    for each in tree(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / TICK


def script(python: Path, folder: Path) -> Path:
    """vLLM's program as pip makes it."""
    path = folder / "vllm"
    path.write_text(SCRIPT.format(python=python))
    path.chmod(0o755)
    return path


def test_a_real_vllm_is_made_of_a_standby(real_vllm: RealVllm, tmp_path: Path) -> None:
    """It answers as one that was started anew does, and its start takes less than half of the work.

    Most of that is imports: of the eager starts here some 50 s of processor time on a busy machine, 3 of them after the
    hand-over.
    """
    model = {
        "engine": "vllm",
        "command": [str(script(real_vllm.command.parent / "python", tmp_path))],
        "model": str(real_vllm.model),
        "max_model_len": 512,
        "extra_args": ["--enforce-eager", "--max-num-seqs", "8"],
        "start_timeout": LIMIT,
        "env": ENV,
    }
    config = {"engines": {**ports(), "standby": 1}, "devices": [], "models": {"a": model, "b": model}}
    body = {"prompt": "a b c", "max_tokens": 4, "temperature": 0}
    with daemon(tmp_path / "site", config) as site:
        site.http.timeout = LIMIT
        answers = []
        for name in ("a", "b"):
            if name == "b":
                instance = until(lambda: waiting(site), LIMIT)
                before = worked(pid_of(site, instance))
            reply = site.http.post("/v1/completions", json={"model": name, **body})
            assert reply.status_code == 200, reply.text
            answers.append(reply.json()["choices"][0]["text"])
        pids = {name: site.view(name)["pid"] for name in ("a", "b")}
        assert f"made of {instance}" in site.log.read_text()
        assert worked(pids["b"]) - before < 0.5 * worked(pids["a"])
        assert answers[0] == answers[1]


def asked_briefly(site: Site, model: str) -> str:
    """Two tokens, always the same."""
    body = {"model": model, "messages": [{"role": "user", "content": "a b"}], "max_tokens": 2, "temperature": 0}
    reply = site.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_a_real_transformers_serve_is_made_of_a_standby(real_vllm: RealVllm, accelerate: Path, tmp_path: Path) -> None:
    """Two models of one program: the second takes less than half of the work, nearly all of which is imports.

    9.2 s of processor time here; of the second start 8.5 beforehand, and 0.45 after the hand-over.
    """
    model = {
        "engine": "transformers",
        "command": [str(real_vllm.command.with_name("transformers"))],
        "model": str(real_vllm.model),
        "options": {"cpu": True},
        "env": {"PYTHONPATH": str(accelerate), "HF_HUB_OFFLINE": "1", **ONE_THREAD},
        "start_timeout": LIMIT,
    }
    config = {"engines": {**ports(), "standby": 1}, "devices": [], "models": {"a": model, "b": model}}
    with daemon(tmp_path / "site", config) as site:
        site.http.timeout = LIMIT
        answers = [asked_briefly(site, "a")]
        instance = until(lambda: waiting(site), LIMIT)
        before = worked(pid_of(site, instance))
        answers.append(asked_briefly(site, "b"))
        assert answers[0] == answers[1]
        pids = {name: site.view(name)["pid"] for name in ("a", "b")}
        assert f"made of {instance}" in site.log.read_text()
        assert worked(pids["b"]) - before < 0.5 * worked(pids["a"])
