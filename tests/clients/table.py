"""Which client can do what through vllmd: docs/clients.md is made anew.

usage: python -m tests.clients.table [CLIENT ...]     all that are installed, or those named

Real engines answer: SmolLM2-135M on llama.cpp, MiniLM on vLLM for embeddings, and a tiny model on vLLM for tools. No
small model that sees is to be had, so pictures go to the stand-in engine, which says that it got them; and so do the
tools of clients that cannot insist on a call, since a tiny model makes none by itself. A client's program
(``programs/``) runs in the client's own environment, which ``packaging/dev/setup clients`` makes, in an empty folder;
it knows vllmd's address and the models' names. A row of a client that is not named, or not installed, is kept.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines.installed import Site, daemon
from tests.machine import container
from tests.vllm_on_cpu import ENV as VLLM

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "clients.md"
PROGRAMS = Path(__file__).with_name("programs")
FUNCTIONS = ("list", "chat", "responses", "stream", "tools", "images", "embeddings", "count tokens", "cancel", "errors")
LIMIT = 2400.0  # seconds for all functions of one client
CHAT_MODEL, EMBED_MODEL, TOOLS_MODEL, IMAGES_MODEL, AGENT_MODEL = "smollm2", "minilm", "tiny", "stand-in", "coder"
# Without heat a model of random weights puts white space between the parts of a call for ever, so tools are asked with.
TOOL_ARGS = {"enable-auto-tool-choice": True, "tool-call-parser": "hermes"}
VLLM_ARGS = {"enforce-eager": True, "max-num-seqs": 8}
GGUF_UINT32 = 4  # the number of that type in its format
AGENT_CONTEXT = 32768  # tokens; agents' prompts are longer than what the model was made for


ABOUT = """
Run it again for clients of your own. Behind vllmd: SmolLM2-135M on llama.cpp, which answers, MiniLM on vLLM, which
embeds, and for tools a tiny model on vLLM, all on a CPU. `yes`: it worked, and the answers are true ones; `no`: it did
not, and why is told below; `-`: the client has no such thing, or its program does not try it. `cancel`: the client left
in the middle of an answer, and the engine stopped. `errors`: an unknown model raises the client's own error, with the
name in it; what it is called stands below. `images`: a picture reaches the engine, which is the stand-in; so is it for
tools of Ollama's clients, which cannot insist on a call, and of instructor, which sends no `strict`. `tools` elsewhere:
the call of a function with `strict` parameters, to which alone vLLM holds a model. Agents ask SmolLM2 with its context
stretched to 32,768 tokens: they have an answer of it, but no sensible one; they send tools, which so small a model does
not call.
"""


@dataclass(frozen=True)
class Client:
    """One client. ``name`` as people call it; ``program``: the file in ``programs``; ``place``: its environment's
    folder, where it is not called as the program is."""

    name: str
    program: str
    place: str = ""


CLIENTS = (
    Client("openai (Python)", "openai_python.py", "py"),
    Client("openai (Node)", "openai_node.mjs"),
    Client("anthropic (Python)", "anthropic_python.py", "py"),
    Client("@anthropic-ai/sdk (Node)", "anthropic_node.mjs"),
    Client("ollama (Python)", "ollama_python.py", "py"),
    Client("ollama (Node)", "ollama_node.mjs"),
    Client("LangChain (langchain-openai)", "langchain_openai_.py", "py"),
    Client("LangChain (langchain-ollama)", "langchain_ollama_.py", "py"),
    Client("LlamaIndex (openai-like)", "llama_index_.py"),
    Client("LlamaIndex (ollama)", "llama_index_ollama.py", "llama_index_"),
    Client("LiteLLM", "litellm_.py"),
    Client("instructor", "instructor_.py"),
    Client("Pydantic AI", "pydantic_ai_.py"),
    Client("Haystack", "haystack_.py"),
    Client("Vercel AI SDK", "vercel_ai.mjs"),
    Client("llm", "llm_.py"),
    Client("llm (llm-ollama)", "llm_ollama_.py", "llm_"),
    Client("Open WebUI", "open_webui_.py"),
    Client("Codex", "codex_.py", "py"),
    Client("Claude Code", "claude_code.py", "py"),
    Client("opencode", "opencode_.py", "py"),
    Client("aider", "aider_.py"),
    Client("Continue (cn)", "continue_.py", "py"),
    Client("VS Code (Copilot)", "vscode_.py", "py"),
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
    python = folder / (client.place or Path(client.program).stem) / "bin/python"
    command = ["node"] if client.program.endswith(".mjs") else [str(python)]
    if not shutil.which(command[0]):
        print(f"{client.name}: not installed: packaging/dev/setup clients", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory(prefix="vllmd-client-", ignore_cleanup_errors=True) as home:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": home,
            "BASE": site_url,
            "CHAT_MODEL": CHAT_MODEL,
            "EMBED_MODEL": EMBED_MODEL,
            "TOOLS_MODEL": TOOLS_MODEL,
            "IMAGES_MODEL": IMAGES_MODEL,
            "NODE_MODULES": str(folder / "node" / "node_modules"),
        }
        argv = [*command, str(PROGRAMS / client.program)]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=LIMIT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines or "version" not in lines[0]:
        print(f"{client.name}: not run: {done.stderr.strip()[-600:]}", file=sys.stderr)
        return None
    said = {line["function"]: str(line["told"]) for line in lines[1:]}
    failed = frozenset(line["function"] for line in lines[1:] if not line["ok"])
    for name in sorted(failed):
        print(f"{client.name}: {name}: {said[name]}", file=sys.stderr)
    if failed and os.environ.get("VERBOSE"):
        print(done.stderr[-6000:], file=sys.stderr)
    return Row(client.name, str(lines[0]["version"]), said, failed)


def stretched(model: Path, place: Path) -> Path:
    """A copy of a GGUF file that says of itself that it takes AGENT_CONTEXT tokens."""
    data = bytearray(model.read_bytes())
    at = data.index(b"llama.context_length") + len(b"llama.context_length")
    kind, _ = struct.unpack_from("<II", data, at)
    assert kind == GGUF_UINT32, kind
    struct.pack_into("<I", data, at + 4, AGENT_CONTEXT)
    copy = place / model.name
    copy.write_bytes(data)
    return copy


def configuration(cache: Path, place: Path) -> dict[str, Any]:
    """The models, all on the CPU. Agents have one of their own, whose context is stretched to what they send."""
    gguf = {"engine": "llama.cpp", "model": str(next((cache / "llama").glob("SmolLM2-*.gguf")))}
    vllm = {"engine": "vllm", "command": str(cache / "vllm/bin/vllm"), "env": VLLM, "local_devices": 0}
    minilm = next((cache / "clients/minilm").glob("*/model"))
    options = {"gpu_layers": 0, "parallel": 1}
    models = {
        CHAT_MODEL: {**gguf, "max_model_len": 8192, "options": options},
        AGENT_MODEL: {
            **gguf,
            "model": str(stretched(Path(gguf["model"]), place)),
            "max_model_len": AGENT_CONTEXT,
            "options": options,
        },
        TOOLS_MODEL: {
            **vllm,
            "model": str(cache / "tiny-model"),
            "max_model_len": 2048,
            "extra_args": VLLM_ARGS | TOOL_ARGS,
        },
        EMBED_MODEL: {**vllm, "model": str(minilm), "extra_args": {**VLLM_ARGS, "runner": "pooling"}},
        IMAGES_MODEL: {"engine": "sim", "local_devices": 0, "max_model_len": 8192},
    }
    # It would talk for ever. Claude Code takes an answer that was cut off for a failure, so it ends with a sentence.
    ending = {"max_tokens": 64, "max_output_tokens": 64, "stop_sequences": ["."]}
    models[AGENT_MODEL]["request"] = {"default": ending}
    return {"devices": [], "server": {"idle_exit": "never"}, "idle": "never", "models": models}


def page(rows: Sequence[Row], kept: Mapping[str, str], kept_notes: Sequence[str] = ()) -> str:
    """docs/clients.md; ``kept``, ``kept_notes``: lines on clients that were not run this time."""
    head = f"| client | version | {' | '.join(FUNCTIONS)} |"
    new = {row.name: row.line() for row in rows}
    lines = [new.get(client.name) or kept.get(client.name) for client in CLIENTS]
    run = {row.name for row in rows}
    notes = sorted(
        {f"- {row.name}, {name}: {said}" for row in rows for name, said in row.told.items() if said}
        | {line for line in kept_notes if line[2:].split(", ")[0] not in run}
    )
    return "\n".join([
        "# Clients that were run",
        "",
        textwrap.fill(f"Made by `make clients` ({datetime.date.today():%Y-%m-%d}). {' '.join(ABOUT.split())}", 120),
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started is ended, too
    folder, llama = container.cache() / "clients", container.cache() / "llama"
    wanted = [client for client in CLIENTS if not names or any(name in client.program for name in names)]
    os.environ |= {"VLLMD_ENGINES": str(llama), "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryDirectory(prefix="vllmd-clients-") as place:
        config = configuration(container.cache(), Path(place))
        with daemon(Path(place) / "s", config) as site:
            rows: list[Row] = []
            before = PAGE.read_text() if PAGE.exists() else ""
            notes = [line for line in before.splitlines() if line.startswith("- ")]
            for row in asked(site, config["models"], wanted, folder):
                rows.append(row)
                PAGE.write_text(page(rows, dict(former(before)), notes))  # what is known counts, whatever comes after
    return int(any(row.failed for row in rows))


def asked(site: Site, models: Iterable[str], wanted: Iterable[Client], folder: Path) -> Iterator[Row]:
    """Load the models, and run the clients one after another."""
    for model in models:  # vLLM's start takes longer than clients wait
        loaded = site.admin.post(f"/admin/models/{model}/load?wait=true", json={}, timeout=LIMIT)
        if loaded.status_code != 200:
            raise SystemExit(f"{model} does not load: {loaded.text}\n{site.log.read_text()[-3000:]}")
    for client in wanted:
        row = tried(client, folder, address(site))
        if row is not None:
            print(row.line(), flush=True)
            yield row


def address(site: Site) -> str:
    """Where clients find it."""
    return str(site.http.base_url).rstrip("/")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
