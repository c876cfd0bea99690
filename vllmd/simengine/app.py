"""The route table, and what happens to every request before and after its route."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus

from vllmd.simengine import control, generate, pooling, realtime
from vllmd.simengine.context import Context, Refused, error_content
from vllmd.simengine.http import Connection, Request
from vllmd.simengine.logs import plain
from vllmd.simengine.state import CallFailed, die

Route = Callable[[Context, Request, Connection], Awaitable[None]]

# What is served: the routes that vLLM's own key would guard, and their like.
SERVING: Mapping[tuple[str, str], Route] = {
    ("POST", "/v1/chat/completions"): generate.chat,
    ("POST", "/v1/completions"): generate.completions,
    ("POST", "/v1/responses"): generate.responses,
    ("GET", "/v1/responses/*"): generate.get_response,
    ("POST", "/v1/responses/*/cancel"): generate.cancel_response,
    ("POST", "/v1/messages"): generate.messages,
    ("POST", "/v1/messages/count_tokens"): generate.count_tokens,
    ("POST", "/v1/embeddings"): pooling.embeddings,
    ("POST", "/v2/embed"): pooling.embeddings,
    ("POST", "/pooling"): pooling.pooling,
    ("POST", "/classify"): pooling.classify,
    ("POST", "/score"): pooling.score,
    ("POST", "/v1/score"): pooling.score,
    ("POST", "/rerank"): pooling.rerank,
    ("POST", "/v1/rerank"): pooling.rerank,
    ("POST", "/v2/rerank"): pooling.rerank,
    ("POST", "/v1/audio/transcriptions"): pooling.audio,
    ("POST", "/v1/audio/translations"): pooling.audio,
    ("GET", "/v1/realtime"): realtime.realtime,
    ("POST", "/tokenize"): generate.tokenize,
    ("POST", "/detokenize"): generate.detokenize,
}
CONTROL: Mapping[tuple[str, str], Route] = {
    ("GET", "/v1/models"): control.models,
    ("GET", "/health"): control.health,
    ("GET", "/ping"): control.health,
    ("POST", "/ping"): control.health,
    ("GET", "/version"): control.version,
    ("GET", "/load"): control.load,
    ("GET", "/metrics"): control.metrics,
}
ADAPTERS: Mapping[tuple[str, str], Route] = {
    ("POST", "/v1/load_lora_adapter"): control.load_lora,
    ("POST", "/v1/unload_lora_adapter"): control.unload_lora,
}
DEVELOPMENT: Mapping[tuple[str, str], Route] = {
    ("POST", "/sleep"): control.sleep,
    ("POST", "/wake_up"): control.wake_up,
    ("GET", "/is_sleeping"): control.is_sleeping,
    ("POST", "/pause"): control.pause,
    ("POST", "/resume"): control.resume,
    ("GET", "/is_paused"): control.is_paused,
    ("POST", "/abort_requests"): control.abort_requests,
    ("POST", "/collective_rpc"): control.collective_rpc,
    ("POST", "/reset_prefix_cache"): control.reset_prefix_cache,
    ("POST", "/reset_mm_cache"): control.nothing,
    ("POST", "/reset_encoder_cache"): control.nothing,
    ("GET", "/server_info"): control.server_info,
}


class Unrouted(Exception):
    """No such route (404), or not by this method (405); FastAPI's answer, not vLLM's."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class App:
    """Finds the route, turns exceptions into vLLM's errors, applies the failures of every request."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._routes = dict(CONTROL) | dict(SERVING)
        if context.options.late_lora:
            self._routes |= dict(ADAPTERS)
        if context.options.dev_mode:
            self._routes |= dict(DEVELOPMENT)

    async def __call__(self, request: Request, out: Connection) -> None:
        name = request.get("x-request-id")
        if name and self._context.options.enable_request_id_headers:
            out.extra_headers = (("x-request-id", name),)
        else:
            out.extra_headers = ()
        try:
            await self._dispatch(request, out)
        except Unrouted as unrouted:
            await out.send_json(unrouted.status, {"detail": HTTPStatus(unrouted.status).phrase})
        except Refused as refused:
            await out.send_json(refused.status, refused.content)
        except CallFailed as failed:
            if out.streaming:
                await generate.stream_failed(out, failed)
            else:
                await out.send_json(500, error_content(str(failed), "InternalServerError", 500))
        finally:
            if not self._context.options.quiet:
                plain(f'INFO:      - "{request.method} {request.target} HTTP/1.1" {out.status_line}')

    async def _dispatch(self, request: Request, out: Connection) -> None:
        if echo := request.get("x-sim-echo"):  # "body" or "head": the very bytes that came, to compare them
            if echo == "body":
                return await out.send(200, request.body, request.get("content-type"))
            return await out.send(200, request.head, "application/octet-stream")
        path = pooling.body_shape(request) if request.path == "/invocations" else request.path
        route = self._routes.get((request.method, _pattern(path)))
        if route is None:
            raise Unrouted(405 if any(known == _pattern(path) for _, known in self._routes) else 404)
        if (request.method, _pattern(path)) in SERVING:
            return await self._serve(route, request, out)
        return await route(self._context, request, out)

    async def _serve(self, route: Route, request: Request, out: Connection) -> None:
        """A request to the model: counted, and subject to the failures."""
        context, failures = self._context, self._context.state.failures
        if "hang" in failures:
            await asyncio.Event().wait()
        if "dead" in failures:
            raise CallFailed("EngineCore encountered an issue. See stack trace (above) for the root cause.")
        if (seconds := failures.get("slow-headers")) is not None:
            await asyncio.sleep(seconds)
        context.in_flight += 1
        try:
            await route(context, request, out)
        finally:
            context.in_flight -= 1
        context.answered += 1
        limit = failures.get("crash-after")
        if limit is not None and context.answered >= limit:  # not before this answer has left
            asyncio.get_running_loop().call_soon(die, 1, "told to crash after so many requests")


def _pattern(path: str) -> str:
    """``/v1/responses/ID...`` with the id replaced by a star."""
    parts = path.split("/")
    if parts[:3] == ["", "v1", "responses"] and len(parts) > 3:
        parts[3] = "*"
    return "/".join(parts)
