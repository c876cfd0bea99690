"""The table of model routes: which public path names its model where.

An engine's development routes (sleep, wake_up, collective_rpc, ...) are not in it and are never reached from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllmd.errors import NoUpgrade
from vllmd.proxy.access import Reach
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.forward import Parse, Relay
from vllmd.proxy.routing import NoSuchMethod, Route, Router
from vllmd.proxy.tunnel import Tunnels

# vLLM's: what becomes of a request before the model sees it, and of tokens after
RENDER_PATHS = (
    "/v1/chat/completions/render",
    "/v1/chat/completions/derender",
    "/v1/completions/render",
    "/v1/completions/derender",
    "/v1/messages/render",
    "/v1/responses/render",
    "/cohere/v2/chat/render",
)
JSON_PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/cohere/v2/chat",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/input_tokens",
    "/v1/responses/input_tokens",
    *RENDER_PATHS,
    "/v1/embeddings",
    "/v2/embed",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/v1/score",
    "/score",
    "/classify",
    "/pooling",
    "/tokenize",
    "/detokenize",
    "/generative_scoring",
    "/v1/systemone",
    "/v1/decisions",
    "/invocations",
    "/v1/images/generations",
    "/v1/audio/speech",
)
# Text Embeddings Inference's own
EMBEDDING_PATHS = ("/embed", "/embed_all", "/embed_sparse", "/predict", "/decode")
# llama.cpp's own
LLAMA_PATHS = ("/completion", "/infill", "/apply-template")
# Of an engine, not of a request: the model is the query's
QUERY_PATHS = ("/props", "/tokenizer_info")
# KServe's, as Triton serves it; the first that fits is taken
KSERVE_PATHS = (
    ("POST", "/v2/models/{model:path}/versions/{version}/infer"),
    ("POST", "/v2/models/{model:path}/infer"),
    ("POST", "/v2/models/{model:path}/generate"),
    ("POST", "/v2/models/{model:path}/generate_stream"),
    ("GET", "/v2/models/{model:path}/config"),
    ("GET", "/v2/models/{model:path}"),
)
# Azure's, and OpenAI's own of old: the model is the path's, and what follows it is below /v1
DEPLOYMENT_PATHS = tuple(
    f"{root}/{{model:path}}/{rest}"
    for root in ("/openai/deployments", "/v1/engines")
    for rest in ("chat/completions", "completions", "embeddings")
)
FORM_PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", "/v1/images/variations")
RESPONSE_PATHS = (
    ("GET", "/v1/responses/{id}"),
    ("DELETE", "/v1/responses/{id}"),
    ("POST", "/v1/responses/{id}/cancel"),
    ("GET", "/v1/responses/{id}/input_items"),
)
# What of a body is looked at here, in OpenAPI's words.
MODEL = {"model": {"type": "string"}, "stream": {"type": "boolean"}}
ASKED: Mapping[str, Any] = {"type": "object", "required": ["model"], "properties": MODEL}


def takes(content_type: str) -> Mapping[str, Any]:
    """A body of this type that names its model."""
    return {"requestBody": {"required": True, "content": {content_type: {"schema": ASKED}}}}


JSON, FORM = takes("application/json"), takes("multipart/form-data")
QUERY: Mapping[str, Any] = {
    "parameters": [{"name": "model", "in": "query", "required": True, "schema": {"type": "string"}}],
}


def most(method: str) -> int | None:
    """The most of a body that such a request has: a GET none, any other what the server takes."""
    return 0 if method in ("GET", "DELETE") else None


async def no_socket(exchange: Exchange) -> None:
    """Refuse OpenAI's WebSocket for responses, which no engine has. Codex goes on with POST after a 426.

    Raises NoUpgrade, NoSuchMethod.
    """
    if exchange.request.upgrade:
        raise NoUpgrade("/v1/responses speaks no WebSocket here: POST to it, with stream for events as they come")
    raise NoSuchMethod(exchange.request, ["POST"])


def add_model_routes(router: Router, relay: Relay) -> None:
    """Put all model routes into ``router``."""
    requests = relay.requests

    def add(method: str, path: str, parse: Parse, about: str, doc: Mapping[str, Any] = {}, **more: Any) -> None:
        router.add_raw(Route(method, path, relay.handler(parse), summary=about, doc=doc, **more))

    for path in (*JSON_PATHS, *EMBEDDING_PATHS, *LLAMA_PATHS):
        add("POST", path, requests.json, "relayed to the engine of the body's 'model'", JSON)
    for path in DEPLOYMENT_PATHS:
        add("POST", path, requests.deployment, "relayed to the engine of the path's model", JSON)
    for path in FORM_PATHS:
        add("POST", path, requests.form, "relayed to the engine of the form's 'model'", FORM)
    for method, path in KSERVE_PATHS:
        add(method, path, requests.kserve, "relayed to the engine of the path's model", max_body=most(method))
    for path in QUERY_PATHS:
        add("GET", path, requests.query, "relayed to the engine of ?model=", QUERY, max_body=0)
    for method, path in RESPONSE_PATHS:
        about = "relayed to the engine that made the response"
        add(method, path, requests.response, about, max_body=most(method))
    path, about = "/upstream/{rest:path}", "an engine's own API"
    for method in ("POST", "PUT", "DELETE"):
        add(method, path, requests.upstream, about, scope="admin", max_body=most(method))
    tunnels = Tunnels(relay, lambda request: router.recheck(request, "admin", Reach.ONE))
    plain = relay.handler(requests.upstream)

    async def own(exchange: Exchange) -> None:
        """A WebSocket, or a GET like any other."""
        await (tunnels.own if exchange.request.upgrade == "websocket" else plain)(exchange)

    router.add_raw(Route("GET", path, own, scope="admin", summary=about, max_body=0))
    about, nothing = "refuses a WebSocket: POST is served", Reach.NOTHING
    router.add_raw(Route("GET", "/v1/responses", no_socket, summary=about, reach=nothing, max_body=0))
    router.add_raw(
        Route("GET", "/v1/realtime", tunnels.realtime, summary="WebSocket to ?model=", doc=QUERY, max_body=0)
    )
