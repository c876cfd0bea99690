"""What a client calls a model -> the model: exact name, alias, or a suffix that fits only one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping

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

    def resolve(self, name: str, visible: Callable[[str], bool] = lambda model: True) -> str:
        """The model's configured name. Raises UnknownModel, or BadRequest if it is missing or could be several.

        Only ``visible`` models are guessed and suggested; another one is found by its full name or alias alone,
        and whoever asks finds out whether it may be used.
        """
        if not name:
            raise BadRequest("the request names no model; GET /v1/models lists those there are", param="model")
        if name in self._exact:
            return self._exact[name]
        if len(name) > LONGEST_NAME:  # before anything is compared with it
            raise BadRequest(TOO_LONG_A_NAME, param="model")
        candidates = sorted(filter(visible, self._suffixes.get(name, ())))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise BadRequest(
                f"model {name!r} could be any of: {', '.join(candidates)}; name one of them", param="model"
            )
        raise UnknownModel(self._unknown(name, visible), param="model")

    def with_replica(
        self, name: str, engines: Mapping[str, ModelConfig], visible: Callable[[str], bool] = lambda model: True
    ) -> str:
        """The configured name of a model, or the id of a replica. ``engines``: all there are, by id.

        A replica may also be called ``ALIAS@2``, or by the end of its model's name. Raises as ``resolve`` does.
        """
        if name in engines and engines[name].replica_of:
            return name
        short, _, label = name.rpartition("@")
        try:
            return self.resolve(name, visible)
        except UnknownModel:
            if not short or (known := f"{self.resolve(short, visible)}@{label}") not in engines:
                raise
            return known

    def _unknown(self, name: str, visible: Callable[[str], bool]) -> str:
        if not self._exact:
            return f"model {name!r} does not exist: no models are configured"
        seen = [known for known, model in self._exact.items() if visible(model)]
        lowered = {known.lower(): known for known in seen}
        close = [lowered[hit] for hit in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.5)]
        close += [known for known in seen if name and name.lower() in known.lower() and known not in close]
        if close:
            return f"model {name!r} does not exist; did you mean {' or '.join(map(repr, close[:3]))}?"
        return f"model {name!r} does not exist; GET /v1/models lists those that do"


def _suffixes(name: str) -> Iterable[str]:
    """``org/team/name`` may also be called ``team/name`` or ``name``."""
    parts = name.split("/")
    return ("/".join(parts[start:]) for start in range(1, len(parts)))
