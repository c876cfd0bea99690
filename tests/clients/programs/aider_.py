"""aider, as docs/agents.md says."""

import sys
from pathlib import Path

from common import BASE, agent, interrupted, run, true

PROGRAM = Path(sys.executable).with_name("aider")
AT = {"OPENAI_API_BASE": f"{BASE}/v1", "OPENAI_API_KEY": "none"}
QUIET = ("--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings",
         "--no-show-release-notes", "--no-auto-lint", "--map-tokens", "0")  # fmt: skip


def words(model: str) -> tuple[object, ...]:
    return (PROGRAM, "--model", f"openai/{model}", *QUIET, "--chat-mode", "ask", "--message", "Say hello")


def chat() -> None:
    true("Tokens:" in agent(*words("coder"), **AT), "no answer")


def cancel() -> None:
    interrupted(*words("coder"), model="coder", **AT)


def errors() -> None:
    true("'nobody'" in agent(*words("nobody"), **AT), "the error does not say which model")


run("aider-chat", {"chat": chat, "cancel": cancel, "errors": errors})
