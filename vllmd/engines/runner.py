"""Engines written as runners: three methods that start, stop and look at a server, as other managers have them.

A plug-in registers a subclass of ``BaseRunner`` in the entry-point group
``vllmd.engines``, and models name it as their engine:

    class Toy(BaseRunner):
        def start(self, model_name, gpu_id, **kwargs): ...  # listens on kwargs["port"], returns ModelInstanceInfo
        def stop(self, instance): ...
        def get_status(self, instance_id): ...

A runner acts where other kinds only say what to do, so it runs in a process of its
own, as the engines' user and in the model's scope: ``python -m vllmd.engines.runner``
calls ``start``, looks with ``get_status`` and calls ``stop`` on SIGTERM. Whatever it
raises ends that process, not the daemon, and what its server leaves behind dies with the scope.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Call, Failure, Launch, Listen, Place
from vllmd.engines.plain import PROBE, Plain, environment
from vllmd.engines.vllm import ROUTES
from vllmd.frozen import frozen

LOOK = 1.0  # seconds between looks at the server
RUNNING = frozenset({"running", "starting", "loading", "ready"})


@frozen
class ModelInstanceInfo:
    """A server that a runner has started. ``status``: running, starting, loading, ready, or anything else: gone."""

    id: str
    status: str = "running"
    pid: int | None = None


class BaseRunner:
    """Starts, stops and looks at servers. ``HEALTH`` answers 200 when one serves; ``ROUTES`` are its public paths."""

    HEALTH: ClassVar[str] = "/health"
    ROUTES: ClassVar[frozenset[str]] = ROUTES

    def start(self, model_name: str, gpu_id: int | str, **kwargs: Any) -> ModelInstanceInfo:
        """Start a server.

        ``gpu_id``: what CUDA_VISIBLE_DEVICES takes, a number or a UUID; -1 without a device. In ``kwargs``:
        ``port`` to listen on at 127.0.0.1, ``model`` (path or repository id), and the model's ``options``.
        """
        raise NotImplementedError

    def stop(self, instance: ModelInstanceInfo) -> None:
        """Stop the server, and wait for its end."""
        raise NotImplementedError

    def get_status(self, instance_id: str) -> ModelInstanceInfo:
        """The state of the server."""
        raise NotImplementedError


class RunnerKind(Plain):
    """The contract of ``base.Engine`` for a runner."""

    def __init__(self, name: str, target: str, runner: type[BaseRunner]) -> None:
        self.kind = name
        self._target = target  # module:attribute, as in the entry point
        self._runner = runner

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The process that plays the manager for this one model."""
        options = {"port": place.port, "model": model.source, **model.options}
        gpu = ",".join(place.device_ids) or "-1"
        argv = (*(model.command or (sys.executable,)), "-m", "vllmd.engines.runner", self._target, model.name, gpu)
        roots = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"PYTHONPATH": os.pathsep.join(roots), **environment(model, place)}
        return Launch((*argv, json.dumps(options)), Listen(port=place.port), env)

    def ready(self, model: ModelConfig) -> Call:
        """The engine is ready when the path answers that the runner's class names as ``HEALTH``."""
        return Call("GET", self._runner.HEALTH, timeout=PROBE)

    def routes(self, model: ModelConfig) -> frozenset[str]:
        """The paths that the runner's class names as ``ROUTES``."""
        return frozenset(self._runner.ROUTES)

    def failure(self, lines: Sequence[str]) -> Failure:
        """The exception that the runner raised, which is the last line of the traceback."""
        texts = [line.strip() for line in lines if line.strip()]
        return Failure(texts[-1] if texts else "it said nothing")


def main(argv: Sequence[str]) -> int:
    """Play the manager until SIGTERM, or until the server is gone."""
    target, model, gpu, options = argv
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    runner = load(target)()
    instance = runner.start(model, int(gpu) if gpu.lstrip("-").isdecimal() else gpu, **json.loads(options))
    while not stopped.wait(LOOK):
        status = runner.get_status(instance.id).status
        if status not in RUNNING:
            print(f"{target}: {instance.id} is {status}", file=sys.stderr)
            return 1
    runner.stop(instance)
    return 0


def load(target: str) -> type[BaseRunner]:
    """The class that ``module:attribute`` names."""
    module, _, name = target.partition(":")
    runner: type[BaseRunner] = getattr(importlib.import_module(module), name)
    return runner


def is_runner(thing: object) -> bool:
    """Whether an entry point names a runner."""
    return isinstance(thing, type) and issubclass(thing, BaseRunner)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
