"""Clients written in Python, run one after the other by one interpreter: the official ones import for 1 to 2 s each."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.machine.container import VLLM_INSIDE, Machine

LOOP = """
import contextlib, io, json, sys, traceback
import anthropic, httpx, openai
for line in sys.stdin:
    said, failed = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(said):
            exec(json.loads(line), {"__name__": "__main__"})
    except Exception:
        failed = traceback.format_exc()
    print(json.dumps([said.getvalue(), failed]), flush=True)
"""


class Clients:
    """vLLM's Python in a machine, which has the official clients."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._running: subprocess.Popen[str] | None = None

    def ask(self, code: str) -> dict[str, Any]:
        """Run one client, which prints JSON. Raises AssertionError with its traceback if it fails."""
        if self._running is None:
            argv = [f"{VLLM_INSIDE}/bin/python", "-c", LOOP]
            self._running = self._machine.popen(argv, stdin=subprocess.PIPE)
        assert self._running.stdin and self._running.stdout and self._running.stderr
        self._running.stdin.write(json.dumps(code) + "\n")
        self._running.stdin.flush()
        line = self._running.stdout.readline()
        assert line, self._running.stderr.read()
        said, failed = json.loads(line)
        assert not failed, failed
        return json.loads(said)  # type: ignore[no-any-return]

    def end(self) -> None:
        """Close their connections; whoever asks later begins anew."""
        if self._running is not None:
            self._running.communicate()
        self._running = None
