"""Stands in for vLLM's ``tests/utils.py``: its server with our small models, directly, or behind vllmd.

``VLLMD_TESTS`` is a JSON object: ``through`` (whether vllmd is between), ``models`` (vLLM's name of a model -> our
folder), ``python`` (that runs vllmd), ``repository``, ``log`` (a folder).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import anthropic
import openai

HOW = json.loads(os.environ["VLLMD_TESTS"])
KEY = "token-abc123-of-these-tests"
START = 500.0  # seconds
FLAGS = ["--enforce-eager", "--max-num-seqs", "8"]
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}


class RemoteOpenAIServer:
    """The part of its interface that the tests use."""

    DUMMY_API_KEY = KEY

    def __init__(self, model: str, args: list[str], *, env_dict: dict[str, str] | None = None, **_: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        args, names = list(args), [model]
        if "--served-model-name" in args:
            at = args.index("--served-model-name")
            names = [args[at + 1]]
            del args[at : at + 2]
        if "--max-model-len" in args:
            args[args.index("--max-model-len") + 1] = "2048"  # what our models were made for
        if "--dtype" in args:
            args[args.index("--dtype") + 1] = "float32"  # so is it much faster on a CPU without bfloat16
        env, folder = {**os.environ, **ENV, **(env_dict or {})}, HOW["models"][model]
        vllm = str(Path(sys.executable).with_name("vllm"))
        if HOW["through"]:
            one = {"engine": "vllm", "command": vllm, "model": folder, "env": {**ENV, **(env_dict or {})}}
            one |= {"local_devices": 0, "max_model_len": 2048, "extra_args": [*FLAGS, *without_length(args)]}
            auth: dict[str, Any] = {}
            if "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in (env_dict or {}):  # which operators alone may do
                one["runtime_adapters"] = True
                auth = {"auth": {"keys": [{"name": "tests", "key": KEY, "scopes": ["models", "admin"]}]}}
            config = {"server": {"listen": [f"127.0.0.1:{self.port}"], "idle_exit": "never"}, "devices": []}
            file = Path(HOW["log"]) / f"{self.port}.yaml"
            file.write_text(json.dumps({**config, "idle": "never", "models": {names[0]: one}, **auth}))
            file.chmod(0o600)
            argv, env = (
                [HOW["python"], "-m", "vllmd", "--config", str(file)],
                {**os.environ, "PYTHONPATH": HOW["repository"]},
            )
        else:
            argv = [vllm, "serve", folder, "--served-model-name", *names, "--host", "127.0.0.1"]
            argv += ["--port", str(self.port), *FLAGS, *args]
        log = (Path(HOW["log"]) / f"{self.port}.log").open("w")
        self.process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
        self._wait(names[0])

    def _wait(self, name: str) -> None:
        """Until it answers: the first request through vllmd starts the engine."""
        body = json.dumps({"model": name, "prompt": "a", "max_tokens": 1}).encode()
        deadline = time.monotonic() + START
        while True:
            try:
                fields = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
                request = urllib.request.Request(self.url_for("v1/completions"), body, fields)
                urllib.request.urlopen(request, timeout=START).close()
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(1)

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def url_root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *parts])

    def get_client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(
            **{"base_url": self.url_for("v1"), "api_key": KEY, "max_retries": 0, "timeout": 600, **more}
        )

    def get_async_client(self, **more: Any) -> openai.AsyncOpenAI:
        more = {"base_url": self.url_for("v1"), "api_key": KEY, "max_retries": 0, "timeout": 600, **more}
        return openai.AsyncOpenAI(**more)

    def get_async_client_anthropic(self, **more: Any) -> anthropic.AsyncAnthropic:
        more = {"base_url": self.url_root, "api_key": KEY, "max_retries": 0, "timeout": 600, **more}
        return anthropic.AsyncAnthropic(**more)


def without_length(args: list[str]) -> list[str]:
    """vllmd writes that one itself."""
    at = args.index("--max-model-len") if "--max-model-len" in args else len(args)
    return args[:at] + args[at + 2 :]
