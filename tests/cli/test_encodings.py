"""Terminals, files and locales that are not UTF-8: everything is said as far as they can, and nobody dies of it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.fake_daemon import fake_daemon, model, status
from vllmd.cli import main

WHY = "the model \u2018m\u2019 failed \u2713 \u65e5\u672c, na\xefvely"
DECISION = {"at": 0.0, "what": "fail", "model": "m", "why": WHY, "numbers": {"of": WHY}}
CHUNK = 'data: {"choices": [{"delta": {"content": "gr\xfc\xdfe \u2019 \u65e5"}}]}'
LINES = ["ps", "top -n 1", "why m --numbers", "events", "status m", "info", "doctor", "start m", "chat m hello"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("line", LINES)
def test_every_verb_says_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, encoding: str) -> None:
    """What there is no character for is written out; no verb ends with a traceback."""
    answers = {
        "GET /admin/status": (200, status(model("m", "error", failure=WHY))),
        "GET /admin/decisions?model=m": (200, {"decisions": [DECISION]}),
        "GET /admin/events": (200, [f"data: {DECISION}".replace("'", '"')]),
        "POST /admin/models/m/load?wait=true": (200, [f'{{"error": {{"message": "{WHY}"}}, "done": true}}']),
        "POST /v1/chat/completions": (200, [CHUNK, "", "data: [DONE]"]),
    }
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding, "strict", write_through=True) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    with fake_daemon(answers, tmp_path / "admin.sock") as daemon, fake_daemon(answers) as http:
        monkeypatch.setenv("VLLMD_ADMIN_SOCKET", daemon.address)
        main([*line.split(), *(["--url", http.address] if line.startswith("chat") else [])])
    shown = (out.buffer.getvalue() + error.buffer.getvalue()).decode(encoding)  # type: ignore[attr-defined]
    assert shown.strip()
    if line not in ("info", "doctor", "events"):
        assert "\\u65e5" in shown
        assert ("\xef" in shown or "\xfc" in shown) == (encoding == "latin-1")


@pytest.mark.parametrize("module", ["vllmd", "vllmd.cli"])
def test_a_file_with_a_name_that_cannot_be_shown(tmp_path: Path, module: str) -> None:
    """It is named all the same, in the C locale, too, where Python is not let to choose another one."""
    file = tmp_path / "gr\xfc\xdfe.yaml"
    file.write_text("models: {m: {engin: sim}}")
    command = ["--check", "--config", str(file)] if module == "vllmd" else ["config", "check", str(file)]
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", module, *command], env=env, capture_output=True, check=False)
    assert done.returncode == 78
    assert b"did you mean" in done.stderr
    assert b"Traceback" not in done.stderr
