"""Paths that clients send by habit of another server -> the path that is meant, or a hint what to use instead.

Used only where no route has the path as it was sent. The result is looked up in the route table like any other path,
and has the scope of that route: no path opens anything that its plain form does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SLASHES = re.compile(r"/{2,}")
V1_AGAIN = re.compile(r"/v1(?:/v1)+(?=/|$)")
# Base URLs that people know from other servers: Groq's, OpenRouter's, LM Studio's, Google's, Docker's, Fireworks'.
FOREIGN_ROOTS = ("/openai", "/api", "/api/v0", "/v1beta/openai", "/v1/openai", "/engines", "/inference", "/anthropic")
ROOT = re.compile(r"/(?:v1|api)/")  # the API's own
SYNONYMS = {
    "/reranking": "/rerank",
    "/v1/reranking": "/v1/rerank",
    "/healthz": "/health",
    "/livez": "/health/live",
    "/readyz": "/health/ready",
    "/redoc": "/docs",
    "/swagger": "/docs",
}

_STATE = "vllmd alone puts engines to sleep, wakes, pauses and changes them; POST /admin/models/NAME/sleep, wake, load"
_OWN = "it is an engine's own; GET /upstream/NAME{path} has it, for keys with the scope admin"
_SLOTS = "it shows what others ask; GET /upstream/NAME{path} has it, for keys with the scope admin"
_ADAPTER = "adapters are the configuration's (adapters of a model), not a client's; its name in a request loads it"
_USAGE = "GET /admin/usage tells who used how much, for keys with the scope read"
_KEPT = "nothing of a client's is kept here: each request has all that it needs, see /docs"
# Objects that OpenAI's own service keeps for its clients, with all paths below them.
KEPT = tuple(
    f"/v1/{name}"
    for name in ("files", "batches", "uploads", "assistants", "threads", "vector_stores", "conversations", "containers",
                 "evals", "fine_tuning", "videos", "messages/batches")
)  # fmt: skip
# Paths that vLLM or llama-server serve and vllmd does not, and what to use instead.
REFERRED = {
    **dict.fromkeys(
        ("/", "/v1"), "each path says more, such as /v1/models, which lists the models; GET /docs lists the paths"
    ),
    "/upstream": "/upstream/NAME/ is the own API of a model's engine, for keys with the scope admin",
    **dict.fromkeys(("/v1/model/info", "/v1/model", "/key/info"), "GET /v1/models tells what there is to tell"),
    **dict.fromkeys(("/v1/usage", "/v1/organization/usage", "/v1/dashboard/billing/usage"), _USAGE),
    "/v1/moderations": "POST /classify asks a model that classifies, /v1/chat/completions any other one",
    "/v1/complete": "Anthropic's messages are at /v1/messages, OpenAI's completions at /v1/completions",
    "/v1/chat": "OpenAI's chat is at /v1/chat/completions, Ollama's at /api/chat",
    **dict.fromkeys(
        ("/sleep", "/wake_up", "/pause", "/resume", "/abort_requests", "/release_kv_cache_memory", "/collective_rpc"),
        _STATE,
    ),
    **dict.fromkeys(("/is_sleeping", "/is_paused"), "GET /v1/models tells each model's state"),
    **dict.fromkeys(("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"), _STATE),
    **dict.fromkeys(("/start_profile", "/stop_profile", "/scale_elastic_ep", "/is_scaling_elastic_ep"), _STATE),
    **dict.fromkeys(
        (
            *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update"),
            *("/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version"),
            *("/weight_checker", "/weight_info", "/get_world_size", "/fault_tolerance/apply"),
        ),
        _STATE,
    ),
    "/lora-adapters": _ADAPTER,
    **dict.fromkeys(("/server_info", "/kv_event_sources", "/fault_tolerance/status", "/inference/v1/generate"), _OWN),
    "/load": "GET /metrics tells what runs and waits, vllmctl ps too",
    "/slots": _SLOTS,
    "/models/load": "POST /admin/models/NAME/load loads a model; the first request for it does, too",
    "/models/unload": "POST /admin/models/NAME/unload unloads a model",
    "/embedding": "POST /v1/embeddings answers in OpenAI's form",
    "/cors-proxy": "vllmd asks no other servers for a page",
    "/tools": "tools run in the client",
}

# Routes that only some engines serve -> what to use with a model of another engine.
INSTEAD = {
    "/completion": "POST /v1/completions",
    "/infill": "POST /v1/completions, with the model's own marks of prefix and suffix",
    "/apply-template": "POST /v1/chat/completions/render, or /tokenize with messages",
    "/v1/chat/completions/input_tokens": "POST /tokenize with messages counts them",
    "/v1/responses/input_tokens": "POST /tokenize with messages counts them",
    "/props": "GET /v1/models tells what there is to tell of a model",
    "/tokenizer_info": "vLLM has it with enable-tokenizer-info-endpoint in extra_args",
}


def candidates(path: str) -> Iterator[str]:
    """The paths that ``path`` may mean, the likeliest first, without ``path`` itself."""
    tidy = V1_AGAIN.sub("/v1", SLASHES.sub("/", path))
    if len(tidy) > 1:
        tidy = tidy.removesuffix("/")
    tails = list(_tail(tidy))
    roots = [tidy.removeprefix(root) for root in FOREIGN_ROOTS if tidy.startswith(root + "/")]
    for plain in (tidy, *tails):
        if plain != path:
            yield SYNONYMS.get(plain, plain)
    for plain in (tidy, *roots, *tails):
        plain = SYNONYMS.get(plain, plain)
        for each in (plain, plain.removeprefix("/v1") if plain.startswith("/v1/") else "/v1" + plain):
            if each != path:
                yield SYNONYMS.get(each, each)


def _tail(path: str) -> Iterator[str]:
    """``path`` from the API's own root on, without a prefix that the reverse proxy of another server would remove.

    Of several roots, the first one without a ``/v1/`` behind it.
    """
    if found := ROOT.search(path, max(1, path.rfind("/v1/") - len("/api"))):
        yield path[found.start() :]


def alternative_for(path: str) -> str:
    """The hint what to use instead of ``path``, "" for none."""
    for each in (path, *candidates(path)):
        if each in REFERRED:
            return REFERRED[each].replace("{path}", each)
        if any(each == kept or each.startswith(kept + "/") for kept in KEPT):
            return _KEPT
        if each.startswith("/slots/"):
            return _SLOTS.replace("{path}", each)
    return ""
