"""Whom an engine runs as, and where its home is: the shared user's, a named user's, or one of its model's own.

The daemon only names the user; the launcher decides (``--user``, ``--own-users``), and makes what is needed.
"""

from __future__ import annotations

import hashlib
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vllmd.config.names import readable
from vllmd.config.types import OWN_USER, ModelConfig
from vllmd.engines.facts import argument
from vllmd.hub import PLACES, cache_of


def own_name(model: ModelConfig) -> str:
    """What the user of this model, and of its replicas, is called: no other model has the same."""
    name = model.replica_of or model.name
    return f"{readable(name)}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def ordered_user(model: ModelConfig) -> str:
    """The value of ``StartOrder.user`` for a model's engine."""
    return f"{OWN_USER}:{own_name(model)}" if model.user == OWN_USER else model.user


def unknown_user(model: ModelConfig) -> str:
    """Why its user cannot be; "" if there is nothing to say."""
    if model.user in ("", OWN_USER):
        return ""
    try:
        entry = pwd.getpwnam(model.user)
    except KeyError:
        where = f"{model.where}: " if model.where else ""
        return f"{where}models.{model.name}.user: there is no user {model.user!r}; sysusers.d(5) makes one"
    return "" if entry.pw_uid else f"models.{model.name}.user: engines are never run as root"


@dataclass(frozen=True)
class Homes:
    """Home directories. ``shared``: of models without a user; None: the daemon's. ``own``: holds those of own users."""

    shared: Path | None = None
    own: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def of(self, model: ModelConfig) -> Path | None:
        """The home of a model's engine, as far as the daemon can tell."""
        if not model.user:
            return self.shared
        if model.user == OWN_USER:
            return self.own and self.own / own_name(model)
        try:
            return Path(pwd.getpwnam(model.user).pw_dir)
        except KeyError:
            return None

    def at(self, model: ModelConfig) -> Path | None:
        """The home that its engine will see, as far as the daemon can tell."""
        if home := model.env.get("HOME"):
            return Path(home)
        known, ours = self.of(model), self.environment.get("HOME")
        return Path(ours) if known is None and ours and not model.user else known

    @cached_property
    def _shared_hub(self) -> Path:
        return cache_of(self.environment, self.shared)

    def hub(self, model: ModelConfig) -> Path:
        """The cache in which its engine looks for repositories: by its own settings, else as everybody's."""
        if folder := argument(model, "download-dir"):
            return Path(folder)
        if not (model.user or model.env):
            return self._shared_hub
        home = Path(model.env["HOME"]) if model.env.get("HOME") else self.of(model)
        shared = {} if model.user and home else self.environment
        own = {} if any(model.env.get(name) for name in PLACES) else {name: shared.get(name, "") for name in PLACES}
        rest = {name: value for name, value in shared.items() if name not in PLACES}
        return cache_of({**rest, **own, **model.env}, home)

    def variables(self, model: ModelConfig) -> dict[str, str]:
        """The variables by which an engine uses the caches that vllmd reads; a model's own user has none."""
        if model.user:
            return {}
        places = {name: self.environment[name] for name in PLACES if self.environment.get(name)}
        # A variable of the daemon's could win over one that the model sets under another name.
        if any(model.env.get(name) for name in PLACES):
            places = {}
        return {**({"HOME": str(self.shared)} if self.shared else {}), **places}
