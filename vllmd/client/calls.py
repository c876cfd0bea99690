"""Every endpoint as a request that is yet to be sent; ``Client`` and ``AsyncClient`` differ only in the sending."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from vllmd.api import verbs
from vllmd.api.verbs import Call as Call
from vllmd.api.verbs import quoted

Message = Mapping[str, Any]


def chat(model: str, messages: Sequence[Message], more: Mapping[str, Any]) -> Call:
    """``POST /v1/chat/completions``; ``more`` are the other fields of OpenAI's request."""
    return Call("POST", "/v1/chat/completions", {"model": model, "messages": list(messages), **more})


def completion(model: str, prompt: str | Sequence[Any], more: Mapping[str, Any]) -> Call:
    """The call of ``POST /v1/completions``."""
    return Call("POST", "/v1/completions", {"model": model, "prompt": prompt, **more})


def embeddings(model: str, text: str | Sequence[Any], more: Mapping[str, Any]) -> Call:
    """The call of ``POST /v1/embeddings``."""
    return Call("POST", "/v1/embeddings", {"model": model, "input": text, **more})


def rerank(model: str, query: str, documents: Sequence[str], more: Mapping[str, Any]) -> Call:
    """The call of ``POST /v1/rerank``."""
    return Call("POST", "/v1/rerank", {"model": model, "query": query, "documents": list(documents), **more})


def score(model: str, first: str | Sequence[str], second: str | Sequence[str], more: Mapping[str, Any]) -> Call:
    """The call of ``POST /v1/score``."""
    return Call("POST", "/v1/score", {"model": model, "text_1": first, "text_2": second, **more})


def models() -> Call:
    """The call of ``GET /v1/models``."""
    return Call("GET", "/v1/models")


def model(name: str) -> Call:
    """The call of ``GET /v1/models/{id}``."""
    return Call("GET", f"/v1/models/{quote(name)}")


def health() -> Call:
    """The call of ``GET /health``."""
    return Call("GET", "/health")


def verb(name: str, arguments: Mapping[str, object]) -> Call:
    """An operator's verb of the table, with these parameters."""
    return verbs.verb(name).call(arguments)


def put_model(name: str, settings: Mapping[str, Any]) -> Call:
    """``PUT /admin/guests/{id}``: a model with the settings of vllmd.yaml(5), for the daemon's life."""
    return Call("PUT", f"/admin/guests/{quoted(name)}", dict(settings))


def drop_model(name: str) -> Call:
    """``DELETE /admin/guests/{id}``: forget a model that was put."""
    return Call("DELETE", f"/admin/guests/{quoted(name)}")
