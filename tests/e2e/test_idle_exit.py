"""When a daemon that systemd activated exits: when nobody has wanted anything of it for long enough."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.engines.installed import daemon


def test_refused_requests_keep_it_awake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would start it anew: connections count that came and went between two looks at who is there."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    with daemon(tmp_path, {"server": {"idle_exit": 0.5}, "devices": [], "models": {}}) as site:
        began, statuses = time.monotonic(), set()
        while time.monotonic() < began + 5:
            answer = httpx.post(f"http://127.0.0.1:{site.port}/v1/completions", json={"model": "no", "prompt": "x"})
            statuses.add(answer.status_code)
            time.sleep(0.05)
        assert statuses == {404}
        assert site.process.poll() is None
        httpx.get(f"http://127.0.0.1:{site.port}/health")  # so that it lives a moment longer
