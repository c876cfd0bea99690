"""Text Embeddings Inference: ``text-embeddings-router`` on a loopback port.

It cannot sleep (``--uds-path`` is a socket between its own parts, not a place to
listen), serves whom it loads, and drains on SIGTERM. Its metrics have a port of
their own, 9000 unless told otherwise, which a second one could not open: it
gets a free one. It asks for the key of its start, which its environment tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Launch, Listen, Place
from vllmd.engines.options import choice, switch, unknown, whole, wrong_setting
from vllmd.engines.plain import Plain, environment, own_key

POOLING = ("", "cls", "mean", "splade", "last-token")
DTYPES = {"float16": "float16", "half": "float16", "fp16": "float16", "float32": "float32", "float": "float32"}


class Tei(Plain):
    """The contract of ``base.Engine`` for TEI."""

    kind = "tei"
    PROGRAM = "text-embeddings-router"
    INSTALL = (
        "install text-embeddings-inference (https://github.com/huggingface/text-embeddings-inference), "
        "or name its text-embeddings-router in command"
    )
    OPTIONS: ClassVar[Mapping[str, str]] = {
        "pooling": "cls, mean, splade or last-token, instead of the model's own",
        "max_batch_tokens": "tokens in one batch",
        "auto_truncate": "true: inputs that are too long are shortened, not refused",
        "cpu": "true: it runs on the CPU and takes no device",
    }
    # Log lines that show that a phase has begun.
    PHASES = (
        ("weights", r"Starting model backend"),
        ("download", r"Downloading"),
        ("warm-up", r"Warming up model"),
        ("serving", r"Starting HTTP server"),
    )
    ROUTES: ClassVar[frozenset[str]] = frozenset(
        {"/v1/embeddings", "/embed", "/embed_all", "/embed_sparse", "/predict", "/rerank", "/tokenize", "/decode"}
    )

    OWN_API: ClassVar[frozenset[str]] = frozenset(
        {"GET /", "GET /info", "GET /docs/{rest:path}", "GET /api-doc/openapi.json", "POST /similarity"}
    )

    def device_count(self, model: ModelConfig) -> int:
        """One device, or none where the build is for the CPU."""
        return 0 if switch(model, "cpu") else 1

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        """The command and its environment. Raises ConfigError for a dtype that TEI does not have, or a wrong option."""
        unknown(model, self.OPTIONS)
        argv = [*(model.command or ("text-embeddings-router",)), "--model-id", model.source]
        argv += ["--served-model-name", self.served_name(model), "--hostname", "127.0.0.1", "--port", str(place.port)]
        if model.dtype is not None and model.dtype != "auto":
            if model.dtype not in DTYPES:
                raise wrong_setting(model, "dtype", f"TEI has no {model.dtype}; right are auto, float16 and float32")
            argv += ["--dtype", DTYPES[model.dtype]]
        pooling, tokens = choice(model, "pooling", POOLING), whole(model, "max_batch_tokens")
        argv += ["--pooling", pooling] if pooling else []
        argv += ["--max-batch-tokens", str(tokens)] if tokens else []
        argv += ["--auto-truncate"] if switch(model, "auto_truncate") else []
        key = own_key(model, place, "API_KEY", "--api-key")
        env = {"PROMETHEUS_PORT": "0", **({"API_KEY": key} if key else {}), **environment(model, place)}
        return Launch((*argv, *model.extra_args), Listen(port=place.port, key=key), env)
