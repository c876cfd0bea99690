"""Anthropic's Claude Code, as docs/agents.md says. A model of 135 million parameters writes no code: it answers."""

from common import AGENT_LIMIT, BASE, NODE_MODULES, agent, interrupted, node_version, run, true

version = node_version("@anthropic-ai/claude-code")
PROGRAM = NODE_MODULES / ".bin/claude"


def at(model: str) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": BASE, "ANTHROPIC_AUTH_TOKEN": "none", "ANTHROPIC_MODEL": model,
        "ANTHROPIC_SMALL_FAST_MODEL": model, "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "64", "CLAUDE_CODE_MAX_RETRIES": "0",
        "API_TIMEOUT_MS": str(round(AGENT_LIMIT * 1000)),
    }  # fmt: skip


def chat() -> None:
    true(agent(PROGRAM, "-p", "Say hello", **at("coder")).strip(), "no answer")


def cancel() -> None:
    interrupted(PROGRAM, "-p", "Say hello", model="coder", **at("coder"))


def errors() -> None:
    true(
        "nobody" in agent(PROGRAM, "-p", "Say hello", wanted=None, **at("nobody")), "the error does not say which model"
    )


run("", {"chat": chat, "cancel": cancel, "errors": errors}, version)
