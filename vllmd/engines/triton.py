"""Triton: ``tritonserver`` on a loopback port under explicit model control, one model of a repository each.

Facts that shape this file (Triton's model management guide and its model
repository extension): only what ``--load-model`` names is loaded; loading and
unloading are calls whose status tells whether they worked; an unload lets what
runs finish, so that the memory comes back a moment after the answer. Requests
name the model in their path (``/v2/models/NAME/infer``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import ClassVar
from urllib.parse import quote

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Call, Engine, Launch, Listen, Place
from vllmd.engines.options import switch, text, unknown, wrong
from vllmd.engines.plain import PROBE, Plain, environment


class Triton:
    """The kind; its calls name the model, see ``bind``."""

    kind = "triton"
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "repository": "the model repository (default: the directory that the model is in)",
        "cpu": "true: it runs on the CPU and takes no device",
    }

    def bind(self, model: ModelConfig) -> Engine:
        """The engine of one model. Raises ConfigError where the repository is not known."""
        unknown(model, self.OPTIONS)
        return TritonOf(model)


class TritonOf(Plain):
    """The contract of ``base.Engine`` for one model."""

    kind = "triton"
    PROGRAM = "tritonserver"
    INSTALL = (
        "it comes in NVIDIA's container: give a command such as [podman, run, ...] with the engine 'command', "
        "or name its tritonserver in command"
    )
    # Log lines that show that a phase has begun.
    PHASES = (
        ("weights", r"loading: "),
        ("loaded", r"successfully loaded"),
        ("serving", r"Started HTTPService"),
    )
    ROUTES: ClassVar[frozenset[str]] = frozenset(
        {
            "/v2/models/{model}",
            "/v2/models/{model}/config",
            "/v2/models/{model}/versions/{version}/infer",
            "/v2/models/{model}/infer",
            "/v2/models/{model}/generate",
            "/v2/models/{model}/generate_stream",
        }
    )

    # Not /v2/repository, /v2/trace and /v2/logging.
    OWN_API: ClassVar[frozenset[str]] = frozenset(
        {
            *("GET /v2", "GET /v2/health/live", "GET /v2/health/ready"),
            *(f"GET /v2/models/{{m}}{rest}" for rest in ("", "/config", "/ready", "/stats")),
            *(f"GET /v2/models/{{m}}/versions/{{v}}{rest}" for rest in ("", "/config", "/ready", "/stats")),
            *(f"POST /v2/models/{{m}}/versions/{{v}}/{verb}" for verb in ("generate", "generate_stream")),
        }
    )

    def __init__(self, model: ModelConfig) -> None:
        path = PurePath(model.source)
        self._repository = text(model, "repository") or (str(path.parent) if path.is_absolute() else "")
        self._name = path.name if path.is_absolute() else model.source
        self._cpu = switch(model, "cpu")
        if not self._repository:
            raise wrong(model, "repository", "is missing: the model repository, where model is not a path into one")

    def sleep_levels(self, model: ModelConfig) -> frozenset[int]:
        """Level 2: the model is unloaded, the server stays."""
        return frozenset() if model.sleep_mode is False else frozenset({2})

    def device_count(self, model: ModelConfig) -> int:
        """The number of devices that the engine takes; 0 where it runs on the CPU."""
        return 0 if self._cpu else super().device_count(model)

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The command line and environment of ``tritonserver``."""
        argv = (
            *(model.command or ("tritonserver",)),
            f"--model-repository={self._repository}",
            "--model-control-mode=explicit",
            f"--load-model={self._name}",
            "--http-address=127.0.0.1",
            f"--http-port={place.port}",
            "--allow-grpc=false",
            "--allow-metrics=false",
            f"--exit-timeout-secs={max(1, round(model.stop_timeout))}",
            *model.extra_args,
        )
        return Launch(argv, Listen(port=place.port), environment(model, place))

    def ready(self, model: ModelConfig) -> Call:
        """The probe of the model, not of the server, which is ready without it."""
        return Call("GET", f"/v2/models/{quote(self._name, safe='')}/ready", timeout=PROBE)

    def alive(self, model: ModelConfig) -> Call:
        """Of the server, which lives without the model."""
        return Call("GET", "/v2/health/live", timeout=PROBE)

    def served_name(self, model: ModelConfig) -> str:
        """The name of the model's directory in the repository."""
        return self._name

    def sleep(self, level: int, *, freeze: bool) -> Sequence[Call]:
        """Unload the model, and what was loaded for it."""
        return (self._control("unload", {"parameters": {"unload_dependents": True}}),)

    def wake(self, level: int) -> Sequence[Call]:
        """The call that loads the model again."""
        return (self._control("load", {}),)

    def _control(self, what: str, body: object) -> Call:
        return Call("POST", f"/v2/repository/models/{quote(self._name, safe='')}/{what}", json=body, timeout=600.0)
