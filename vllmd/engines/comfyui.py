"""ComfyUI: its ``main.py`` on a loopback port. It speaks no OpenAI protocol: its own API is below /upstream/NAME.

Facts that shape this file (ComfyUI's server.py and main.py):

- A job outlives the request that put it into the queue; ``/queue`` lists what
  runs and what waits, so that nothing is put to sleep or stopped in its middle.
- ``/free`` answers at once and takes effect between jobs. Models come back with
  the job that needs them: waking is nothing but letting requests through.
- What it holds of the device changes from job to job, so the figure to count
  with has to be configured (``gpu_memory``).
- It ends cleanly on SIGINT.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Call, Launch, Listen, Place
from vllmd.engines.options import text, unknown, wrong
from vllmd.engines.plain import PROBE, Plain, environment

_NO_DIRECTORY = re.compile(r"could not be started: No such file or directory: /")


# Its page, what that asks, jobs, and a user's files and settings: each path by itself and below /api. Not /free,
# /interrupt, and what clears the queue and the history: these are everybody's. Not /internal nor any extension's own.
_READ = (
    *("/object_info", "/object_info/{node}", "/system_stats", "/features", "/embeddings", "/extensions", "/i18n"),
    *(
        "/models",
        "/models/{folder:path}",
        "/view",
        "/view_metadata/{folder}",
        "/workflow_templates",
        "/node_replacements",
    ),
    *("/prompt", "/queue", "/history", "/history/{id}", "/jobs", "/jobs/{id}", "/users", "/settings", "/settings/{id}"),
    *("/userdata", "/userdata/{file:path}", "/v2/userdata", "/global_subgraphs", "/global_subgraphs/{id}"),
)
_WRITTEN = (
    *(
        "POST /prompt",
        "POST /upload/image",
        "POST /upload/mask",
        "POST /users",
        "POST /settings",
        "POST /settings/{id}",
    ),
    *("POST /userdata/{file:path}", "DELETE /userdata/{file:path}"),
)
_FILES = ("assets", "cursor", "docs", "extensions", "fonts", "icons", "images", "lib", "scripts", "templates")
_API = frozenset(
    {
        *(
            "GET /",
            "GET /ws",
            "GET /api/ws",
            "GET /{file:file}",
            *(f"GET /{folder}/{{rest:path}}" for folder in _FILES),
        ),
        *(f"GET {prefix}{path}" for path in _READ for prefix in ("", "/api")),
        *(rule.replace(" ", f" {prefix}") for rule in _WRITTEN for prefix in ("", "/api")),
        *("GET /api/userdata/{file:path}", "GET /api/extensions/{rest:path}"),
    }
)


class Comfyui(Plain):
    """The contract of ``base.Engine`` for ComfyUI."""

    kind = "comfyui"
    PROGRAM = "main.py"
    INSTALL = "install ComfyUI (https://github.com/comfyanonymous/ComfyUI) and name its directory in options.directory"
    OWN_API = _API
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "directory": "where ComfyUI's main.py is",
        "python": "the Python that has its requirements (default python3)",
    }

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """Level 2: the models go, the server stays."""
        return frozenset() if model.sleep_mode is False else frozenset({2})

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The command, in ComfyUI's directory. Raises ConfigError where that is not known."""
        unknown(model, self.OPTIONS)
        directory = text(model, "directory")
        if not directory and not model.command:
            raise wrong(model, "directory", "is missing: the directory of ComfyUI's main.py")
        program = model.command or (text(model, "python", "python3"), "main.py")
        argv = (*program, "--listen", "127.0.0.1", "--port", str(place.port), "--disable-auto-launch")
        return Launch(
            (*argv, *model.extra_args),
            Listen(port=place.port),
            environment(model, place),
            cwd=directory,
            stop_signal=signal.SIGINT,
            self_managed=True,
        )

    def _absent(self, lines: Sequence[str]) -> str:
        """The line that says that the program, or its directory, is missing; "" if none does."""
        return super()._absent(lines) or next((line for line in lines if _NO_DIRECTORY.search(line)), "")

    def ready(self, model: ModelConfig) -> Call:
        """ComfyUI has no ``/health``: it is ready when it answers ``/system_stats``."""
        return Call("GET", "/system_stats", timeout=PROBE)

    def busy(self) -> Call | None:
        """``/queue``: the jobs that run and those that wait."""
        return Call("GET", "/queue", timeout=PROBE)

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """One call, which takes effect between two jobs."""
        return (Call("POST", "/free", json={"unload_models": True, "free_memory": True}, timeout=PROBE),)
