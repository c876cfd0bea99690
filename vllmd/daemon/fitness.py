"""The routes that a model cannot serve by its nature, known from its files before an engine is loaded.

An engine's kind says which routes it has; which of them a model can serve only its engine knows for certain, once it
runs. But nobody should load an embedding model to be told that it does not chat. So what is certain is refused before:
of the engines below, and only where neither the model's ``capabilities`` nor a flag says that it is used otherwise.
"""

from __future__ import annotations

from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.daemon.serializers import ABILITIES
from vllmd.engines.checkpoint import gguf_file
from vllmd.engines.facts import READING, argument
from vllmd.engines.gguf import config_of
from vllmd.foreign import Unreadable, within
from vllmd.hub import Located, kind_at, locate

GENERATING = frozenset(
    {
        *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses", "/v1/messages"),
        *("/v1/chat/completions/render", "/v1/messages/render", "/v1/responses/render", "/v1/messages/count_tokens"),
        *("/cohere/v2/chat", "/cohere/v2/chat/render"),
    }
)
EMBEDDING = frozenset({"/v1/embeddings", "/v2/embed", "/pooling", "/classify"})
HEARING = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
RANKING = frozenset({"/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score"})
# By the kind of model (``hub.kind_at``): its description, and the routes that it certainly does not serve.
UNFIT: dict[str, tuple[str, frozenset[str]]] = {
    "embed": ("an embedding model", GENERATING | HEARING),
    "rerank": ("a model that ranks or classifies", GENERATING | HEARING),
    "transcribe": ("a model that writes down speech", GENERATING | EMBEDDING | RANKING),
    "generate": ("a model that writes text", EMBEDDING),  # some of them hear, too
    "pool": ("run for embeddings, ranks or classes", GENERATING | HEARING),  # by its flags, whatever its files are
}
ENGINES = frozenset({"vllm", "sglang", "transformers"})  # those that take a model by its architecture
GGUF = "llama.cpp"  # its files may be for anything; of those that are for embeddings most are some BERT's
OTHERWISE = ("runner", "task", "convert", "is-embedding", "hf-overrides", "override-pooler-config", "pooler-config")


def kind_of(model: ModelConfig, hub: Path) -> str:
    """What the model's files are for, see ``hub.Found``; "" where that is not certain. Reads them."""
    if model.engine not in {*ENGINES, GGUF}:
        return ""
    if argument(model, "runner") == "pooling" or argument(model, "is-embedding"):
        return "pool"
    if any(argument(model, flag) for flag in OTHERWISE):
        return ""
    try:
        return within(READING, lambda: _read(model, locate(model.source, hub, argument(model, "revision"))))
    except (OSError, Unreadable):
        return ""


def _read(model: ModelConfig, located: Located) -> str:
    if located.path is None or model.engine != GGUF:
        return kind_at(located)
    file = gguf_file(located.path, located.tag, located.root)
    return "embed" if file and str(config_of(file, located.root)["model_type"]).endswith("bert") else ""


def unfit(model: ModelConfig, kind: str) -> tuple[str, frozenset[str]]:
    """The model's description, and the routes that it does not serve."""
    called, routes = UNFIT.get(kind, ("", frozenset()))
    if {ABILITIES.get(route) for route in routes}.intersection(model.capabilities):
        return "", frozenset()
    return called, routes
