"""Models, health, metrics, and the development routes that put it to sleep."""

from __future__ import annotations

import asyncio
import os

from vllmd.simengine.context import VERSION, Context, Refused, bad_request, invalid, parse_json
from vllmd.simengine.http import Connection, Request
from vllmd.simengine.state import CallFailed

_MODES = ("abort", "wait", "keep")


async def models(context: Context, request: Request, out: Connection) -> None:
    """``GET /v1/models``: the model, its aliases and its adapters."""
    options = context.options
    card = {"object": "model", "created": context.created, "owned_by": "vllm", "root": options.model, "parent": None}
    data = [{"id": name} | card | {"max_model_len": options.max_model_len} for name in options.names]
    own = {"parent": options.names[0], "max_model_len": None}
    data += [{"id": name} | card | {"root": path} | own for name, path in context.adapters.items()]
    await out.send_json(200, {"object": "list", "data": data})


async def health(context: Context, request: Request, out: Connection) -> None:
    """GET /health: 200 while asleep, too; 503 when the core is dead."""
    if "hang-health" in context.state.failures:
        await asyncio.Event().wait()
    await out.send(503 if "dead" in context.state.failures else 200)


async def version(context: Context, request: Request, out: Connection) -> None:
    """``GET /version``: the version of vLLM that is imitated."""
    await out.send_json(200, {"version": VERSION})


async def load(context: Context, request: Request, out: Connection) -> None:
    """GET /load: requests in flight."""
    await out.send_json(200, {"server_load": context.in_flight})


async def metrics(context: Context, request: Request, out: Connection) -> None:
    """GET /metrics: the figures of vLLM's that a manager looks at."""
    await out.send(200, _exposition(context).encode(), "text/plain; version=0.0.4; charset=utf-8")


def _exposition(context: Context) -> str:
    state, name = context.state, context.options.names[0]
    labels = f'{{engine="0",model_name="{name}"}}'
    rows: list[tuple[str, str, float]] = [
        ("gauge", "vllm:num_requests_running", len(state.running)),
        ("gauge", "vllm:num_requests_waiting", len(state.waiting)),
        ("gauge", "vllm:kv_cache_usage_perc", len(state.running) / context.options.max_num_seqs),
        ("counter", "vllm:prompt_tokens_total", state.prompted),
        ("counter", "vllm:generation_tokens_total", state.generated),
        ("counter", "vllm:request_success_total", state.finished),
    ]
    lines = [line for kind, row, value in rows for line in (f"# TYPE {row} {kind}", f"{row}{labels} {float(value)}")]
    return "\n".join([*lines, *_sleep_rows(state.level, name), ""])


def _sleep_rows(level: int, name: str) -> list[str]:
    states = ("awake", "weights_offloaded", "discard_all")
    row = 'vllm:engine_sleep_state{{engine="0",model_name="{}",sleep_state="{}"}} {}'
    values = [row.format(name, state, float(i == level)) for i, state in enumerate(states)]
    return ["# TYPE vllm:engine_sleep_state gauge", *values]


# Adapters


async def load_lora(context: Context, request: Request, out: Connection) -> None:
    """POST /v1/load_lora_adapter: an adapter is a folder with an ``adapter_config.json``."""
    name, path = _named(request)
    if name in context.adapters and parse_json(request.body).get("load_inplace") is not True:
        raise Refused(400, f"The lora adapter '{name}' has already been loaded.", "InvalidUserInput")
    if not os.access(f"{path}/adapter_config.json", os.R_OK):
        raise Refused(404, f"Loading lora {name} failed: No adapter found for <path>", "NotFoundError")
    context.adapters[name] = path
    await out.send(200, f"Success: LoRA adapter '{name}' added successfully.".encode())


async def unload_lora(context: Context, request: Request, out: Connection) -> None:
    """``POST /v1/unload_lora_adapter``. Raises Refused for an adapter that is not loaded."""
    name = str(parse_json(request.body).get("lora_name", ""))
    if context.adapters.pop(name, None) is None:
        raise Refused(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
    await out.send(200, f"Success: LoRA adapter '{name}' removed successfully.".encode())


def _named(request: Request) -> tuple[str, str]:
    body = parse_json(request.body)
    name, path = str(body.get("lora_name") or ""), str(body.get("lora_path") or "")
    if not name or not path:
        raise Refused(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
    return name, path


# Development routes


async def sleep(context: Context, request: Request, out: Connection) -> None:
    """``POST /sleep?level&mode``: answered when the memory has been given back."""
    level = _level(request)
    await context.state.sleep(level, _mode(request))
    await out.send_json(200, {"status": "sleeping", "level": level})


async def wake_up(context: Context, request: Request, out: Connection) -> None:
    """``POST /wake_up?tags``: answered when the memory has been taken again."""
    tags = request.query.get("tags")
    awake = await context.state.wake_up(tags)
    await out.send_json(200, {"status": "awake" if awake else "sleeping", "tags": tags})


async def is_sleeping(context: Context, request: Request, out: Connection) -> None:
    """GET /is_sleeping; true when merely paused, too."""
    await out.send_json(200, {"is_sleeping": context.state.is_sleeping})


async def pause(context: Context, request: Request, out: Connection) -> None:
    """``POST /pause?mode``: no request is scheduled until ``/resume``."""
    await context.state.pause_scheduler(_mode(request))
    await out.send_json(200, {"status": "paused"})


async def resume(context: Context, request: Request, out: Connection) -> None:
    """``POST /resume``: end what ``/pause`` began."""
    context.state.resume_scheduler()
    await out.send_json(200, {"status": "resumed"})


async def is_paused(context: Context, request: Request, out: Connection) -> None:
    """``GET /is_paused``: whether ``/pause`` holds requests."""
    await out.send_json(200, {"is_paused": bool(context.state.pause)})


async def abort_requests(context: Context, request: Request, out: Connection) -> None:
    """POST /abort_requests: all of them, whatever is named."""
    await out.send_json(200, {"status": "aborted", "aborted": context.state.abort_all()})


async def collective_rpc(context: Context, request: Request, out: Connection) -> None:
    """POST /collective_rpc: ``reload_weights`` is known."""
    method = parse_json(request.body).get("method")
    if method is None:
        raise bad_request("Missing 'method' in request body")
    if method != "reload_weights":
        what = f"''Worker' object has no attribute '{method}'', please check the stack trace above for the root cause"
        raise CallFailed(f"Call to collective_rpc method failed: Worker failed with error {what}")
    await context.state.reload_weights()
    await out.send_json(200, {"results": [None]})


async def reset_prefix_cache(context: Context, request: Request, out: Connection) -> None:
    """POST /reset_prefix_cache: fails, with 200, while requests hold blocks."""
    await out.send_json(200, {"success": not context.state.running})


async def nothing(context: Context, request: Request, out: Connection) -> None:
    """A route whose effect nobody could see here: 200."""
    await out.send(200)


async def server_info(context: Context, request: Request, out: Connection) -> None:
    """GET /server_info: what it was told to be."""
    await out.send_json(200, {"vllm_config": str(context.options)})


def _level(request: Request) -> int:
    text = request.query.get("level", ["1"])[0]
    if text not in ("0", "1", "2"):
        raise invalid("Input should be 0, 1 or 2", "query.level", "less_than_equal", text)
    return int(text)


def _mode(request: Request) -> str:
    mode = request.query.get("mode", ["abort"])[0]
    if mode not in _MODES:
        raise invalid("Input should be 'abort', 'wait' or 'keep'", "query.mode", "literal_error", mode)
    return mode
