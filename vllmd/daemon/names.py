"""What a client calls a model -> the model: exact name, alias, or a suffix that fits only one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vllmd.config.types import ModelConfig
from vllmd.errors import BadRequest, UnknownModel
from vllmd.proxy.gate import LONGEST_NAME, TOO_LONG_A_NAME


class Names:
    """The names of all configured models and their aliases."""

    def __init__(self, models: Iterable[ModelConfig]) -> None:
        self._exact: dict[str, str] = {}
        for model in models:
            for name in (model.name, *model.aliases):
                self._exact[name] = model.name
        self._suffixes: dict[str, set[str]] = {}
        for name, model_name in self._exact.items():
            for suffix in _suffixes(name):
                self._suffixes.setdefault(suffix, set()).add(model_name)

    def resolve(self, name: str) -> str:
        """The model's configured name. Raises UnknownModel, or BadRequest if it is missing or could be several."""
        if not name:
            raise BadRequest("the request names no model; GET /v1/models lists those there are", param="model")
        if name in self._exact:
            return self._exact[name]
        if len(name) > LONGEST_NAME:  # before anything is compared with it
            raise BadRequest(TOO_LONG_A_NAME, param="model")
        candidates = sorted(self._suffixes.get(name, ()))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise BadRequest(
                f"model {name!r} could be any of: {', '.join(candidates)}; name one of them", param="model"
            )
        raise UnknownModel(self._unknown(name), param="model")

    def _unknown(self, name: str) -> str:
        if not self._exact:
            return f"model {name!r} does not exist: no models are configured"
        lowered = {known.lower(): known for known in self._exact}
        close = [lowered[hit] for hit in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)]
        close += [known for known in self._exact if name and name.lower() in known.lower() and known not in close]
        if close:
            return f"model {name!r} does not exist; did you mean {' or '.join(map(repr, close[:3]))}?"
        return f"model {name!r} does not exist; GET /v1/models lists those that do"


def _suffixes(name: str) -> Iterable[str]:
    """``org/team/name`` may also be called ``team/name`` or ``name``."""
    parts = name.split("/")
    return ("/".join(parts[start:]) for start in range(1, len(parts)))
