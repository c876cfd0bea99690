"""Every endpoint as a request that is yet to be sent; ``Client`` and ``AsyncClient`` differ only in the sending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from vllmd.errors import BadRequest

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One request. ``patient``: its answer may take as long as a model takes to load, so no read timeout counts."""

    method: str
    path: str
    body: Any = None
    query: Mapping[str, str] = field(default_factory=dict)
    patient: bool = False


def chat(model: str, messages: Sequence[Message], more: Mapping[str, Any]) -> Call:
    """``POST /v1/chat/completions``; ``more`` are the other fields of OpenAI's request."""
    return Call("POST", "/v1/chat/completions", {"model": model, "messages": list(messages), **more})


def completion(model: str, prompt: str | Sequence[Any], more: Mapping[str, Any]) -> Call:
    """``POST /v1/completions``."""
    return Call("POST", "/v1/completions", {"model": model, "prompt": prompt, **more})


def embeddings(model: str, text: str | Sequence[Any], more: Mapping[str, Any]) -> Call:
    """``POST /v1/embeddings``."""
    return Call("POST", "/v1/embeddings", {"model": model, "input": text, **more})


def rerank(model: str, query: str, documents: Sequence[str], more: Mapping[str, Any]) -> Call:
    """``POST /v1/rerank``."""
    return Call("POST", "/v1/rerank", {"model": model, "query": query, "documents": list(documents), **more})


def score(model: str, first: str | Sequence[str], second: str | Sequence[str], more: Mapping[str, Any]) -> Call:
    """``POST /v1/score``."""
    return Call("POST", "/v1/score", {"model": model, "text_1": first, "text_2": second, **more})


def models() -> Call:
    """``GET /v1/models``."""
    return Call("GET", "/v1/models")


def model(name: str) -> Call:
    """``GET /v1/models/{id}``."""
    return Call("GET", f"/v1/models/{quote(name)}")


def health() -> Call:
    """``GET /health``."""
    return Call("GET", "/health")


def status() -> Call:
    """``GET /admin/status``."""
    return Call("GET", "/admin/status")


def decisions(name: str) -> Call:
    """``GET /admin/decisions``, of one model unless the name is empty."""
    return Call("GET", "/admin/decisions", query={"model": name} if name else {})


def load(name: str, *, wait: bool) -> Call:
    """``POST .../load``: start or wake it."""
    return Call("POST", _path(name, "load"), query=_flags(wait=wait), patient=wait)


def wake(name: str, *, wait: bool) -> Call:
    """``POST .../wake``."""
    return Call("POST", _path(name, "wake"), query=_flags(wait=wait), patient=wait)


def unload(name: str, *, force: bool, wait: bool) -> Call:
    """``POST .../unload``: stop it, after its requests unless ``force``."""
    return Call("POST", _path(name, "unload"), query=_flags(force=force, wait=wait), patient=wait)


def sleep(name: str, level: int, *, wait: bool) -> Call:
    """``POST .../sleep``."""
    return Call("POST", _path(name, "sleep"), query={"level": str(level), **_flags(wait=wait)}, patient=wait)


def pin(name: str, *, pinned: bool) -> Call:
    """``POST .../pin``."""
    return Call("POST", _path(name, "pin"), {"pinned": pinned})


def lease(name: str, holder: str, seconds: float | None) -> Call:
    """``POST .../lease``: keep it for ``seconds``, or until released."""
    return Call("POST", _path(name, "lease"), {"lease": holder, "deadline_seconds": seconds})


def release(name: str, holder: str, *, stop: bool) -> Call:
    """``DELETE .../lease``; ``stop``: the last one to go stops the model."""
    return Call("DELETE", _path(name, "lease"), query={"lease": holder, **_flags(stop=stop)})


def put_model(name: str, settings: Mapping[str, Any]) -> Call:
    """``PUT /admin/guests/{id}``: a model with the settings of vllmd.yaml(5), for the daemon's life."""
    return Call("PUT", f"/admin/guests/{_quoted(name)}", dict(settings))


def drop_model(name: str) -> Call:
    """``DELETE /admin/guests/{id}``: forget a model that was put."""
    return Call("DELETE", f"/admin/guests/{_quoted(name)}")


def probe(name: str, *, everybody: bool, limit: float | None) -> Call:
    """``POST .../probe``; it may take as long as the slowest of them may, so no read timeout counts."""
    query = _flags(all=everybody) | ({} if limit is None else {"limit": f"{limit:g}"})
    return Call("POST", _path(name, "probe"), query=query, patient=True)


def _path(name: str, verb: str) -> str:
    return f"/admin/models/{_quoted(name)}/{verb}"


def _quoted(name: str) -> str:
    """A model's name may hold slashes; they are quoted so that no verb can hide in it."""
    if not name:
        raise BadRequest("the model's name is empty", param="model")
    return quote(name, safe="")


def _flags(**flags: bool) -> dict[str, str]:
    return {name: "true" for name, value in flags.items() if value}
