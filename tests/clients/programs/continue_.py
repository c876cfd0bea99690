"""Continue's command line, as docs/agents.md says."""

import json

from common import BASE, HOME, NODE_MODULES, agent, interrupted, node_version, run, true

version = node_version("@continuedev/cli")
PROGRAM = NODE_MODULES / ".bin/cn"


def config(provider: str, base: str, model: str) -> str:
    file = HOME / f"{provider}-{model}.yaml"
    one = {"name": model, "provider": provider, "model": model, "apiBase": base, "apiKey": "none", "roles": ["chat"],
           "defaultCompletionOptions": {"contextLength": 32768, "maxTokens": 64}}  # fmt: skip
    file.write_text(json.dumps({"name": "vllmd", "version": "1.0.0", "schema": "v1", "models": [one]}))
    return str(file)


def chat() -> None:
    true(agent(PROGRAM, "-p", "--config", config("openai", f"{BASE}/v1", "coder"), "Say hello").strip(), "no answer")


def cancel() -> None:
    interrupted(PROGRAM, "-p", "--config", config("openai", f"{BASE}/v1", "coder"), "Say hello", model="coder")


def errors() -> None:
    told = agent(PROGRAM, "-p", "--config", config("openai", f"{BASE}/v1", "nobody"), "Say hello", wanted=None)
    true("nobody" in told, "the error does not say which model")


run("", {"chat": chat, "cancel": cancel, "errors": errors}, version)
