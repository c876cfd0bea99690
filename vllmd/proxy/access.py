"""Authorisation: a route needs a scope, a caller has scopes, and nothing else decides.

Three questions, each answered in one place:

1. Who is the caller? The ``Authenticator`` (``gate``) returns a ``Caller``. It does not refuse routes.
2. What does the route need? Its row in the route table (``routing.Route``) has a scope, and whether it concerns one
   model, each model by itself, or the machine as a whole.
3. May this caller use this route? ``authorise`` compares the two before the body is read. The model's name is known
   only from the body or the answer; handlers check it with ``Caller.check`` and ``Caller.may_use``.

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

from vllmd.errors import Forbidden, Unauthorized, VllmdError
from vllmd.frozen import frozen

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
    """The models that a route concerns, for callers that may use only some."""

    NOTHING = "no model"
    ONE = "one model, which the request names: the handler checks the name"
    EACH = "each model by itself: the handler leaves out those that the caller may not use"
    MACHINE = "the machine, or all models together: only for callers that may use every model"


@frozen
class Caller:
    """The sender of a request, and its permissions.

    ``name`` is the API key's, "" without one. ``models``: those that it may use, by their configured names; None: all.
    ``refusal`` makes the error for a scope that the caller lacks; None: Forbidden, naming the key. ``page``: signed in
    to the page; ``name`` is then that of the user or the key that signed in. A session never has the scope models.
    ``digest``: of the API key, "" without one.
    """

    name: str = ""
    scopes: frozenset[str] = frozenset({OPEN})
    models: frozenset[str] | None = None
    refusal: Callable[[], VllmdError] | None = None
    page: bool = False
    digest: str = ""

    def may_use(self, model: str) -> bool:
        """Whether the caller may use ``model``, a configured name."""
        return self.models is None or model in self.models

    def check(self, model: str, requested: str = "") -> None:
        """Raise Forbidden unless the caller may use ``model``, which it called ``requested``."""
        if not self.may_use(model):
            raise Forbidden(f"the key {self.name!r} may not use the model {requested or model!r}", param="model")

    def may_see_key(self, name: str) -> bool:
        """Whether the caller may see what the key ``name`` did: its own key, or any with the scope read."""
        return name == self.name or (READ in self.scopes and self.models is None)


ANYBODY = Caller(scopes=EVERYTHING)  # for requests without authentication: tests, and the daemon's own
NOBODY = Caller(models=frozenset(), refusal=lambda: Unauthorized("no API key was given"))


def granted(scopes: Iterable[str]) -> frozenset[str]:
    """The routes' scopes that a key with ``scopes`` may use."""
    return frozenset({OPEN}) | PUBLIC | {scope for given in scopes for scope in GRANTS[given]}


def authorise(caller: Caller, scope: str, reach: Reach) -> None:
    """Raise Forbidden, or the caller's own refusal, if it may not use a route of this scope and reach."""
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
