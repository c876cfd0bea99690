"""Engines as runners: start, stop, get_status."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from vllmd.engines.runner import BaseRunner, ModelInstanceInfo


class ToyRunner(BaseRunner):
    """Keeps its servers in a table, as managers do."""

    ROUTES = frozenset({"/v1/chat/completions"})

    def __init__(self) -> None:
        self.servers: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, model_name: str, gpu_id: int | str, **kwargs: Any) -> ModelInstanceInfo:
        command = [sys.executable, str(Path(__file__).with_name("server.py")), str(kwargs["port"])]
        server = subprocess.Popen([*command, f"{model_name} on {gpu_id}: "])
        self.servers[str(server.pid)] = server
        self.diary = kwargs.get("diary", "/dev/null")
        return ModelInstanceInfo(str(server.pid), pid=server.pid)

    def stop(self, instance: ModelInstanceInfo) -> None:
        server = self.servers.pop(instance.id)
        server.terminate()
        server.wait()
        Path(self.diary).write_text("the toy was put away")

    def get_status(self, instance_id: str) -> ModelInstanceInfo:
        ended = self.servers[instance_id].poll()
        return ModelInstanceInfo(instance_id, "running" if ended is None else "stopped")


class StillbornRunner(ToyRunner):
    """Cannot start anything."""

    def start(self, model_name: str, gpu_id: int | str, **kwargs: Any) -> ModelInstanceInfo:
        raise RuntimeError("the toy box is empty")
