"""OpenAI's Codex, as docs/agents.md says. A model of 135 million parameters writes no code: that it answers is all."""

from common import AGENT_LIMIT, BASE, HOME, NODE_MODULES, agent, interrupted, node_version, run, true

version = node_version("@openai/codex")
PROGRAM = NODE_MODULES / ".bin/codex"
CONFIG = """\
model = "{model}"
model_provider = "vllmd"
model_context_window = 32768
[model_providers.vllmd]
name = "vllmd"
base_url = "{base}/v1"
stream_idle_timeout_ms = {limit}
request_max_retries = 0
stream_max_retries = 0
"""
EXEC = ("exec", "--skip-git-repo-check", "Say hello")


def configured(model: str) -> None:
    (HOME / ".codex").mkdir(exist_ok=True)
    (HOME / ".codex/config.toml").write_text(CONFIG.format(model=model, base=BASE, limit=round(AGENT_LIMIT * 1000)))


def responses() -> None:
    configured("coder")
    true(agent(PROGRAM, *EXEC).strip(), "no answer")


def cancel() -> None:
    configured("coder")
    interrupted(PROGRAM, *EXEC, model="coder")


def errors() -> None:
    configured("nobody")
    true("nobody" in agent(PROGRAM, *EXEC, wanted=None), "the error does not say which model")


run("", {"responses": responses, "cancel": cancel, "errors": errors}, version)
