"""The code of L's and P's documents, as it stands there but for the import.

L is the Python library; P is the on-demand proxy: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.client.site import HERE, Stub, running
from tests.conftest import RealVllm
from tests.vllm_on_cpu import ENV, FORKING

ROOT = str(HERE.parents[1])


def run(name: str, timeout: float = 60.0, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, str(HERE / "documents" / f"{name}.py")],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["l_model_easy", "l_model_manual"])
def test_L_model_manager_as_in_the_document(name: str) -> None:
    """A script without a main guard is not run a second time in the engine's process."""
    out = run(name, PYTHONPATH=f"{HERE / 'fake'}:{ROOT}")
    assert out.count("released") == (1 if name == "l_model_manual" else 0)


def test_L_server_manager_as_in_the_document(nowhere: Stub) -> None:
    """With ``with``: the name, and the answer."""
    assert run("l_server_easy").splitlines() == ["Qwen/Qwen2.5-0.5B-Instruct", "你好"]
    argv = nowhere.calls()[-1]
    assert {"--enforce-eager", "--enable-auto-tool-choice", "hermes"} <= set(argv)


def test_L_server_manager_by_hand_as_in_the_document(nowhere: Stub) -> None:
    """start(), a client, the timer, stop(); progress, since it is verbose."""
    out = run("l_server_manual")
    assert "ready after" in out
    assert "OpenAI" in out


def test_L_multimodal_as_in_the_document(nowhere: Stub) -> None:
    """It gets through to the engine, which answers (the stand-in does not look at pictures)."""
    assert "Choice(" in run("l_multimodal")


QUICK_START = """
models:
  llama2-7b-chat:
    model_path: "meta-llama/Llama-2-7b-chat-hf"
    param_count: 7
    precision: "fp16"
    max_model_len: 4096
"""
CURL = """
curl http://localhost:8080/v1/models

curl http://localhost:8080/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "llama2-7b-chat",
    "messages": [{"role": "user", "content": "Hello!"}]
  }'
"""


def test_P_quick_start_as_in_the_document(tmp_path: Path, stub: Stub) -> None:
    """Its configuration, its two calls with curl, its client; at port 8080, where P was."""
    try:
        socket.create_server(("127.0.0.1", 8080)).close()
    except OSError:
        pytest.fail("somebody else has port 8080, which the document names")
    config = {**yaml.safe_load(QUICK_START), "devices": [{"memory": "80GiB"}]}
    with running(tmp_path, config, {"PATH": stub.path}, port=8080):
        models, chat = (json.loads(answer) for answer in curl(CURL))
        assert [model["id"] for model in models["data"]] == ["llama2-7b-chat"]
        assert chat["choices"][0]["message"]["content"] == "Hello!"
        assert run("p_client") == "Hello!\n讲个笑话"
    argv = stub.calls()[-1]
    assert argv[:2] == ["serve", "meta-llama/Llama-2-7b-chat-hf"]
    assert "--max-model-len 4096" in " ".join(argv)


def curl(script: str) -> list[str]:
    """The answers of a shell script's calls, one a line."""
    done = subprocess.run(
        ["sh", "-euc", script.replace("curl ", "curl -sSf -w '\\n' ")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.vllm
def test_L_server_manager_with_the_real_vllm(
    real_vllm: RealVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model through a private vllmd and a real vLLM, by the official client, and nothing left behind."""
    monkeypatch.setenv("VLLMD_ADMIN_SOCKET", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", f"{real_vllm.command.parent}:{os.environ['PATH']}")
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}:{FORKING}")
    from vllmd.client import ServerManager, VLLMEngineArgs

    args = VLLMEngineArgs(str(real_vllm.model), max_model_len=512, enforce_eager=True, max_num_seqs=2)
    with ServerManager(args, "lab/tiny", auto_terminate="directly", daemon_settings={"devices": []}) as serve:
        pid = serve._line()["pid"]
        client = serve.make_client()
        messages: list[object] = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(model="lab/tiny", messages=messages, max_tokens=4)  # type: ignore[arg-type]
        assert answer.usage is not None and answer.usage.completion_tokens == 4
    assert not Path(f"/proc/{pid}").exists()
