"""Two kinds: one that is the same for all models, and one that each model's options make."""

from __future__ import annotations

import sys
from pathlib import Path

from vllmd.config.types import ModelConfig
from vllmd.engines.base import Launch, Listen, Place
from vllmd.engines.options import text, unknown
from vllmd.engines.plain import Plain

HERE = str(Path(__file__).parent)


class Echo(Plain):
    """What ``Plain`` says, and how to start it."""

    kind = "echo"
    ROUTES = frozenset({"/v1/chat/completions"})

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        return Launch((sys.executable, f"{HERE}/server.py", str(place.port)), Listen(port=place.port))


class Polite:
    """``bind`` makes an engine of a model's options, and refuses what is wrong with them."""

    kind = "polite"

    def bind(self, model: ModelConfig) -> Echo:
        unknown(model, {"greeting"})
        return PoliteTo(text(model, "greeting", "hello, "))


class PoliteTo(Echo):
    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def launch(self, model: ModelConfig, place: Place) -> Launch:
        plain = super().launch(model, place)
        return Launch((*plain.argv, self.greeting), plain.listen)
