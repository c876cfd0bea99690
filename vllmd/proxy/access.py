"""Authorisation as a table: what a route needs, what a caller has, and nothing else decides.

Three questions, each answered in one place:

1. Who sent the request? An ``Authenticator`` (``gate``) says: a ``Caller``. It never says no to a route.
2. What does the route need? Its row in the route table says (``routing.Route``): a scope, and whether it concerns
   one model, each model by itself, or the machine as a whole.
3. May this caller use this route? ``authorise`` compares the two before the body is read. For what only the body or
   the answer tells, the model's name, handlers ask ``Caller.check`` and ``Caller.may_use``.

So a new way to sign in makes a ``Caller`` and needs no change in any handler, and a new route needs a row.

| scope | what its routes do | who has it |
|---|---|---|
| open | say that vllmd is there, and its documentation | everybody |
| health, metrics | tell how things stand | everybody, unless ``auth.public`` leaves it out; every key |
| models | use models | without keys everybody; else keys of this scope; the admin socket |
| read | show what operators see, change nothing | keys of the scopes read and admin; both operators' sockets |
| admin | change something | keys of this scope; the admin socket |
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from vllmd.errors import Forbidden, Unauthorized, VllmdError

OPEN, HEALTH, METRICS, MODELS, READ, ADMIN = "open", "health", "metrics", "models", "read", "admin"
PUBLIC = frozenset({HEALTH, METRICS})  # scopes that the configuration may open to everybody
EVERYTHING = frozenset({OPEN, HEALTH, METRICS, MODELS, READ, ADMIN})
# What a key's scope opens. Administering does not include using models: an operator's key is not one for chatting.
GRANTS: Mapping[str, frozenset[str]] = {
    MODELS: frozenset({MODELS}),
    READ: frozenset({READ}),
    ADMIN: frozenset({READ, ADMIN}),
}


class Reach(enum.Enum):
    """What a route concerns, for callers who may use some models only."""

    NOTHING = "no model: nothing of it has to be held back"
    ONE = "one model, which the request names: its handler checks the name"
    EACH = "each model by itself: its handler leaves out those that the caller may not use"
    MACHINE = "the machine, or all models together: only for callers who may use every model"


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of a request, and what the sender may do.

    ``name`` is the API key's, "" without one. ``models``: the only ones it may use, by their configured names;
    None: all. ``refusal`` makes what the caller is told of a scope that it lacks; None: that its key does not open it.
    ``page``: signed in to the page, and ``name`` is the user's or the key's that did so; a session never opens models.
    ``digest``: of the API key that it came by, "" without one.
    """

    name: str = ""
    scopes: frozenset[str] = frozenset({OPEN})
    models: frozenset[str] | None = None
    refusal: Callable[[], VllmdError] | None = None
    page: bool = False
    digest: str = ""

    def may_use(self, model: str) -> bool:
        """Whether the configured model is among its own."""
        return self.models is None or model in self.models

    def check(self, model: str, asked: str = "") -> None:
        """Raise Forbidden unless it may use ``model``, which it called ``asked``."""
        if not self.may_use(model):
            raise Forbidden(f"the key {self.name!r} may not use the model {asked or model!r}", param="model")

    def may_see_key(self, name: str) -> bool:
        """Whether it is told what the key called ``name`` did: its own, or all if it sees what operators see."""
        return name == self.name or (READ in self.scopes and self.models is None)


ANYBODY = Caller(scopes=EVERYTHING)  # where nobody is asked: tests, and what the daemon does by itself
NOBODY = Caller(models=frozenset(), refusal=lambda: Unauthorized("no API key was given"))


def granted(scopes: Iterable[str]) -> frozenset[str]:
    """What a key with these scopes opens."""
    return frozenset({OPEN}) | PUBLIC | {scope for given in scopes for scope in GRANTS[given]}


def authorise(caller: Caller, scope: str, reach: Reach) -> None:
    """Raise what the caller is to be told if it may not use a route of this scope and reach."""
    if scope not in caller.scopes:
        if caller.refusal is not None:
            raise caller.refusal()
        if caller.page and scope == MODELS:
            raise Forbidden("a session of the page opens no models: send an API key of the scope models")
        opens = [name for name in (MODELS, READ, ADMIN) if name in caller.scopes]
        scopes = f"the scope{'s' * (len(opens) > 1)} {' and '.join(opens)}" if opens else "no scope"
        whose = f"the session of {caller.name!r}" if caller.page else f"the key {caller.name!r}"
        raise Forbidden(f"{whose} has {scopes}; this needs the scope {scope}")
    if reach is Reach.MACHINE and caller.models is not None:
        raise Forbidden(f"the key {caller.name!r} is for {', '.join(sorted(caller.models))} only; this concerns all")
