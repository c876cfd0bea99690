"""Which client can do what through vllmd: docs/clients.md is made anew.

usage: python -m tests.clients.table [CLIENT ...]     all that are installed, or those named

Real engines answer: SmolLM2-135M on llama.cpp, the same as a model of embeddings, and a tiny model on vLLM for tools. A
client's program (``programs/``) runs in the client's own environment, which ``packaging/dev/setup clients`` makes; it
knows vllmd's address and two names. A row of a client that is not named, or not installed, is kept as it stands.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.installed import Site, daemon
from tests.machine import container

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "clients.md"
PROGRAMS = Path(__file__).with_name("programs")
FUNCTIONS = ("list", "chat", "responses", "stream", "tools", "images", "embeddings", "count tokens", "cancel", "errors")
LIMIT = 600.0  # seconds for all functions of one client
CHAT_MODEL, EMBED_MODEL, TOOLS_MODEL = "smollm2", "smollm2-embed", "tiny"
TOOL_ARGS = {"enforce-eager": True, "max-num-seqs": 8, "enable-auto-tool-choice": True, "tool-call-parser": "hermes"}
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Client:
    """One client. ``name`` as people call it; ``program``: the file in ``programs``."""

    name: str
    program: str


CLIENTS = (
    Client("openai (Python)", "openai_python.py"),
    Client("openai (Node)", "openai_node.mjs"),
    Client("anthropic (Python)", "anthropic_python.py"),
    Client("@anthropic-ai/sdk (Node)", "anthropic_node.mjs"),
    Client("LangChain (langchain-openai)", "langchain_openai_.py"),
    Client("LlamaIndex (openai-like)", "llama_index_.py"),
    Client("LiteLLM", "litellm_.py"),
    Client("llm", "llm_.py"),
)


@dataclass(frozen=True)
class Row:
    """What a client did. ``told`` by function: "" for a plain success, or what is to be said. ``failed``: those."""

    name: str
    version: str
    told: Mapping[str, str]
    failed: frozenset[str]

    def line(self) -> str:
        """It in the table."""
        marks = ["-" if name not in self.told else "no" if name in self.failed else "yes" for name in FUNCTIONS]
        return f"| {self.name} | {self.version} | {' | '.join(marks)} |"


def tried(client: Client, folder: Path, site_url: str) -> Row | None:
    """Run the client's program; None if the client is not installed."""
    own = folder / Path(client.program).stem  # an environment of its own, or the one for all
    python = next((env / "bin/python" for env in (own, folder / "py") if (env / "bin/python").exists()), None)
    command = ["node"] if client.program.endswith(".mjs") else [str(python)]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "BASE": site_url,
        "CHAT_MODEL": CHAT_MODEL,
        "EMBED_MODEL": EMBED_MODEL,
        "TOOLS_MODEL": TOOLS_MODEL,
        "NODE_MODULES": str(folder / "node" / "node_modules"),
    }
    done = subprocess.run(
        [*command, str(PROGRAMS / client.program)], env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines or "version" not in lines[0]:
        print(f"{client.name}: not run: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    said = {line["function"]: str(line["told"]) for line in lines[1:]}
    failed = frozenset(line["function"] for line in lines[1:] if not line["ok"])
    for name in sorted(failed):
        print(f"{client.name}: {name}: {said[name]}", file=sys.stderr)
    return Row(client.name, str(lines[0]["version"]), said, failed)


def configuration(cache: Path) -> dict[str, Any]:
    """Three models, on the CPU. llama.cpp leaves tools out of this model's prompts, so vLLM is asked for those."""
    model = {"engine": "llama.cpp", "model": str(next((cache / "llama").glob("SmolLM2-*.gguf")))}
    chat = {**model, "max_model_len": 8192, "options": {"gpu_layers": 0, "parallel": 1}}
    embed = {**model, "max_model_len": 512, "options": {"gpu_layers": 0, "embedding": True}}
    tools = {"engine": "vllm", "command": str(cache / "vllm/bin/vllm"), "model": str(cache / "tiny-model"), "env": VLLM}
    tools |= {"max_model_len": 512, "local_devices": 0, "extra_args": TOOL_ARGS}
    models = {CHAT_MODEL: chat, EMBED_MODEL: {**embed, "extra_args": {"pooling": "mean"}}, TOOLS_MODEL: tools}
    return {"devices": [], "server": {"idle_exit": "never"}, "idle": "never", "models": models}


def page(rows: Sequence[Row], kept: Mapping[str, str]) -> str:
    """docs/clients.md; ``kept``: lines of clients that were not run this time."""
    head = f"| client | version | {' | '.join(FUNCTIONS)} |"
    new = {row.name: row.line() for row in rows}
    lines = [new.get(client.name) or kept.get(client.name) for client in CLIENTS]
    notes = sorted({f"- {row.name}, {name}: {said}" for row in rows for name, said in row.told.items() if said})
    return "\n".join([
        "# Clients that were run",
        "",
        f"Made by `make clients` ({datetime.date.today():%Y-%m-%d}); run it again for clients of your own.",
        "Behind vllmd: SmolLM2-135M on llama.cpp, which answers and embeds, and for tools a small model on vLLM,",
        "all on a CPU. `yes`: it worked, answers are true ones; `no`: it did not; `-`: the client has no such thing.",
        "`cancel`: the client left in the middle of a stream, and the engine stopped. `errors`: an unknown model",
        "raises the client's own error, with the name in it. `images`: a picture reaches the engine, and its refusal",
        "(it sees none) the client. `tools`: the request reaches the engine, whose model has random weights and need",
        "not write a sound call: `no` says that it did not.",
        "",
        head,
        "|" + "---|" * (len(FUNCTIONS) + 2),
        *[line for line in lines if line],
        "",
        *notes,
        "",
    ])  # fmt: skip


def former(text: str) -> Iterator[tuple[str, str]]:
    """The lines of clients in a page."""
    for line in text.splitlines():
        if (found := re.match(r"\| ([^|]+) \| ", line)) and found[1] != "client":
            yield found[1], line


def main(names: Sequence[str]) -> int:
    """Run, and write the page; 1 if something failed."""
    folder, llama = container.cache() / "clients", container.cache() / "llama"
    wanted = [client for client in CLIENTS if not names or any(name in client.program for name in names)]
    rows = []
    os.environ |= {"VLLMD_ENGINES": str(llama), "PYTHONPATH": str(REPOSITORY)}
    with (
        tempfile.TemporaryDirectory(prefix="vllmd-clients-") as place,
        daemon(Path(place) / "s", configuration(container.cache())) as site,
    ):
        url = address(site)
        for model in (CHAT_MODEL, EMBED_MODEL, TOOLS_MODEL):  # vLLM's start takes longer than clients wait
            site.admin.post(f"/admin/models/{model}/load?wait=true", json={}, timeout=LIMIT).raise_for_status()
        for client in wanted:
            row = tried(client, folder, url)
            if row is not None:
                rows.append(row)
                print(row.line(), flush=True)
    kept = dict(former(PAGE.read_text())) if PAGE.exists() else {}
    PAGE.write_text(page(rows, kept))
    return int(any(row.failed for row in rows))


def address(site: Site) -> str:
    """Where clients find it."""
    return str(site.http.base_url).rstrip("/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
