"""A running engine's description of itself: the length of its context, and what it serves.

The configuration has what was wanted, the files what the model could do; only the engine knows what became of it:
``max_model_len: auto`` is decided at its start, and vLLM registers the routes of those tasks that the loaded model has.
The engine is asked once per start, when a client first lists the models, by requests that change nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping

from vllmd.daemon.calls import ask
from vllmd.daemon.engine_process import EngineProcess
from vllmd.engines.base import Call
from vllmd.errors import VllmdError
from vllmd.frozen import frozen

ASKED_FOR = 5.0  # seconds that an engine has for each question
CONTEXT = ("max_model_len", "context_length", "context_window", "n_ctx")


@frozen
class SelfDescription:
    """``context`` in tokens, None if unknown; ``routes``: the engine's paths, empty if unknown.

    ``tools``: whether its model's chat template takes tools, None if unknown; likewise
    ``takes_images`` and ``takes_audio``: whether its model takes pictures and sounds.
    """

    context: int | None = None
    routes: frozenset[str] = frozenset()
    tools: bool | None = None
    takes_images: bool | None = None
    takes_audio: bool | None = None


async def describe_itself(process: EngineProcess) -> SelfDescription:
    """Ask the engine. What it does not answer, or in an unknown form, is unknown."""
    model = process.engine.served_name(process.model)
    questions = ["/v1/models", "/openapi.json", *(["/props"] if process.model.engine == "llama.cpp" else [])]
    models, schema, props = (*await asyncio.gather(*(_json(process, path) for path in questions)), None)[:3]
    paths = schema.get("paths") if isinstance(schema, dict) else None
    routes = frozenset(paths) if isinstance(paths, dict) else frozenset()
    abilities = tools_of(props), modality(props, "vision"), modality(props, "audio")
    return SelfDescription(context_of(models, model), routes, *abilities)


def tools_of(props: object) -> bool | None:
    """Whether the chat template takes tools, in an answer to llama.cpp's ``GET /props``."""
    caps = props.get("chat_template_caps") if isinstance(props, dict) else None
    tools = caps.get("supports_tools") if isinstance(caps, dict) else None
    return tools if isinstance(tools, bool) else None


def modality(props: object, name: str) -> bool | None:
    """Whether the model takes ``vision`` or ``audio``, in an answer to llama.cpp's ``GET /props``."""
    modalities = props.get("modalities") if isinstance(props, dict) else None
    taken = modalities.get(name) if isinstance(modalities, dict) else None
    return taken if isinstance(taken, bool) else None


def context_of(models: object, name: str) -> int | None:
    """The context of the model ``name`` in an answer to ``GET /v1/models``, or of the only model in it."""
    data = models.get("data") if isinstance(models, dict) else None
    cards = [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []
    named = [card for card in cards if card.get("id") == name] or (cards if len(cards) == 1 else [])
    for card in named:
        meta = card.get("meta") if isinstance(card.get("meta"), dict) else {}
        for value in (fields.get(name) for fields in (card, meta or {}) for name in CONTEXT):
            if isinstance(value, int) and value > 0 and value is not True:
                return value
    return None


async def _json(process: EngineProcess, path: str) -> object:
    call = Call("GET", path, timeout=ASKED_FOR, headers=tuple(process.engine.headers()))
    try:
        status, _, body = await ask(process.listen, call)
        return json_of(body) if status == 200 else None
    except (OSError, VllmdError):
        return None


def json_of(body: bytes) -> object:
    """``body`` as JSON, None if it is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _key(process: EngineProcess) -> str:
    """What identifies a start; a remote engine, which is not started here, has only its name."""
    return process.instance or process.name


class Descriptions:
    """Engines' descriptions, by start.

    A caller waits ``patience`` seconds at most; a later answer is kept for the next.
    """

    def __init__(self, patience: float = 1.0) -> None:
        self._patience = patience
        self._said: dict[str, SelfDescription] = {}  # by instance
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def of(
        self, processes: Iterable[EngineProcess], running: Iterable[EngineProcess]
    ) -> Mapping[str, SelfDescription]:
        """By the engine's name: what these, which serve, say of themselves.

        ``running``: all engines that there are; what was said by others is forgotten.
        """
        serving = {_key(process): process for process in processes}
        alive = {_key(process) for process in running}
        self._said = {instance: said for instance, said in self._said.items() if instance in alive}
        for instance, process in serving.items():
            if instance not in self._said and instance not in self._asking:
                self._asking[instance] = asyncio.ensure_future(self._ask(instance, process))
        if pending := [self._asking[instance] for instance in serving if instance in self._asking]:
            await asyncio.wait(pending, timeout=self._patience)
        return {process.name: self._said[key] for key, process in serving.items() if key in self._said}

    async def _ask(self, instance: str, process: EngineProcess) -> None:
        try:
            self._said[instance] = await describe_itself(process)
        finally:
            del self._asking[instance]
