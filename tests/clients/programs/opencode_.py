"""opencode, as docs/agents.md says."""

import json

from common import BASE, HOME, NODE_MODULES, agent, interrupted, node_version, run, true

version = node_version("opencode-ai")
PROGRAM = NODE_MODULES / ".bin/opencode"
MODELS = {name: {"limit": {"context": 32768, "output": 64}} for name in ("coder", "nobody")}
CONFIG = {
    "autoupdate": False, "share": "disabled", "small_model": "vllmd/coder",
    "provider": {"vllmd": {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{BASE}/v1", "apiKey": "none"},
                           "models": MODELS}},
}  # fmt: skip
(HOME / "opencode.json").write_text(json.dumps(CONFIG))
AT = {"OPENCODE_CONFIG": str(HOME / "opencode.json")}


def chat() -> None:
    true(agent(PROGRAM, "run", "-m", "vllmd/coder", "Say hello", **AT).strip(), "no answer")


def cancel() -> None:
    interrupted(PROGRAM, "run", "-m", "vllmd/coder", "Say hello", model="coder", **AT)


run("", {"chat": chat, "cancel": cancel}, version)
