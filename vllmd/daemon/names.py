"""What a client calls a model -> the model: exact name, alias, or a suffix that fits only one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from vllmd.config.types import ModelConfig
from vllmd.errors import BadRequest, UnknownModel


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
        candidates = sorted(self._suffixes.get(name, ()))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise BadRequest(
                f"model {name!r} could be any of: {', '.join(candidates)}; name one of them", param="model"
            )
        raise UnknownModel(self._unknown(name), param="model")

    def with_replica(self, name: str, engines: Mapping[str, ModelConfig]) -> str:
        """The configured name of a model, or the id of a replica. ``engines``: all there are, by id.

        A replica may also be called ``ALIAS@2``, or by the end of its model's name. Raises as ``resolve`` does.
        """
        if name in engines and engines[name].replica_of:
            return name
        short, _, label = name.rpartition("@")
        try:
            return self.resolve(name)
        except UnknownModel:
            if not short or (known := f"{self.resolve(short)}@{label}") not in engines:
                raise
            return known

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
