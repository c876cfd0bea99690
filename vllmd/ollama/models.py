"""The models as Ollama's clients list them. Pure: of the cards of ``/v1/models`` and the lines of ``/admin/status``."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from vllmd.api.answers import Card, ModelLine

LATEST = ":latest"
NEVER = "9999-12-31T23:59:59Z"  # when a model goes that does not
LOADED = frozenset({"running", "starting", "waking"})
GGUF = frozenset({"llama.cpp"})  # kinds of engines that load such files
# What a model can, as the configuration or its engine says it -> what Ollama calls it
ABILITIES: Mapping[str, tuple[str, ...]] = {
    "chat": ("completion",),
    "completion": ("completion",),
    "embeddings": ("embedding",),
    "tools": ("tools",),
    "vision": ("vision",),
    "thinking": ("thinking",),
    "reasoning": ("thinking",),
    "infill": ("insert",),
    "audio": ("audio",),
}


def tagged(name: str) -> str:
    """The name as Ollama lists it: with a tag, ``latest`` if it has none. Clients find it by either."""
    return name if ":" in name.rpartition("/")[2] else name + LATEST


def names(cards: Iterable[Card]) -> list[tuple[str, Card]]:
    """Each model, and each alias, that ``GET /api/tags`` lists."""
    return [(name, card) for card in cards if not card.hidden for name in (card.id, *card.aliases)]


def tag(name: str, card: Card, since: float) -> dict[str, Any]:
    """What ``GET /api/tags`` lists of a model by one of its names. ``since``: Unix time."""
    return {**_entry(name, card), "modified_at": _time(since), "size": 0}


def ps(cards: Iterable[Card], lines: Iterable[ModelLine], now: float) -> dict[str, Any]:
    """``GET /api/ps``: those that serve, or are about to. To Ollama's clients one that sleeps is not loaded."""
    known = {card.id: card for card in cards if not card.hidden}
    running = []
    for line in lines:
        card = known.get(line.name)
        if card is None or line.state not in LOADED:
            continue
        size = line.memory * max(1, len(line.devices))
        goes = NEVER if line.rests_in is None else _time(now + line.rests_in)
        more = {"size": size, "size_vram": size, "expires_at": goes, "context_length": card.max_model_len or 0}
        running.append({**_entry(card.id, card), **more})
    return {"models": running}


def show(card: Card, since: float) -> dict[str, Any]:
    """``POST /api/show``. Programs take the context's length from it, and what the model can."""
    family = _family(card)
    info: dict[str, Any] = {"general.architecture": family, "general.basename": card.display_name}
    if card.max_model_len:
        info[f"{family}.context_length"] = card.max_model_len
    return {
        "license": "",
        "modelfile": f"# {card.display_name}, as vllmd is configured\nFROM {card.id}\n",
        "parameters": "",
        "template": "",
        "details": _details(card),
        "model_info": info,
        "capabilities": abilities(card),
        "modified_at": _time(since),
    }


def abilities(card: Card) -> list[str]:
    """What it can, in Ollama's words."""
    return sorted({word for ability in card.capabilities for word in ABILITIES.get(ability, ())})


def _entry(name: str, card: Card) -> dict[str, Any]:
    digest = hashlib.sha256(card.id.encode()).hexdigest()  # clients tell models apart by it, and show its beginning
    listed = tagged(name)
    return {"name": listed, "model": listed, "digest": digest, "details": _details(card)}


def _details(card: Card) -> dict[str, Any]:
    family = _family(card)
    return {
        "parent_model": "",
        "format": "gguf" if card.engine in GGUF else "safetensors",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }


def _family(card: Card) -> str:
    """The engine's kind stands for the architecture, which the configuration does not know."""
    return re.sub(r"\W+", "_", str(card.engine).removesuffix(".cpp"))


def _time(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
