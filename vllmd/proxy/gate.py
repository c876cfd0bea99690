"""The interface between the proxy and the daemon.

The proxy knows nothing of models, memory or keys. The ``Gate`` tells it what a model's name means (``resolve``), and
admits each request (``acquire``) with a ``Permit`` that says where to send it and is given back exactly once.
``daemon.admission_gate`` is the gate, ``daemon.keys`` the authenticator; tests have their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Protocol

from vllmd.config.types import RequestRules
from vllmd.errors import VllmdError
from vllmd.frozen import frozen
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.http import Request
from vllmd.proxy.tokens import Tokens


class Address(Protocol):
    """Where an upstream listens: a Unix socket path, or (when that is "") a host and port.

    ``tls``: "" for plain HTTP, ``system`` or the path of a file with the certificates to trust.
    ``prefix``: put before every path. ``owner``: the user id that the listening process must have, None for a server
    on another machine, where that cannot be checked. ``key``: the bearer token that it wants, "" for none.
    ``vllmd.engines.base.Listen`` implements it.
    """

    @property
    def uds(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def tls(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def owner(self) -> int | None: ...
    @property
    def key(self) -> str: ...


@frozen
class Target:
    """What a client's model name means.

    ``served_name``: the engine's name for the model; it replaces the client's name in the request, and is replaced by
    it in the answer. ``routes``: the public paths that the model serves, None for any. ``headers``: fields added to the
    request for the engine (a remote's own key, for one). ``rules``: changes to the members of a JSON request, None for
    none. ``own_api``: the part of the engine's own API that is passed on, see ``engine_api``. ``names``: the model's
    names in the configuration, empty if they are not known; a client that used another name is told which model it
    got. ``offer``: the name of an adapter or a variant of the model, by which it is permitted and counted; "" for the
    model itself. ``nature``: the kind of model, where its files tell, such as "an embedding model".
    """

    model: str
    served_name: str
    routes: frozenset[str] | None = None
    headers: Sequence[tuple[str, str]] = field(default=())
    rules: RequestRules | None = None
    own_api: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    offer: str = ""
    nature: str = ""

    @property
    def permit_name(self) -> str:
        """The name by which keys are allowed to use it and requests are counted: the offer's, or else the model's."""
        return self.offer or self.model


class Permit(Protocol):
    """The admission of one request to the engine at ``upstream``. ``release`` gives it back, exactly once."""

    @property
    def upstream(self) -> Address:
        """The engine to which the request is to be sent."""

    @property
    def target(self) -> Target | None:
        """What the client's model name means there, if one of several replicas was chosen; else None."""

    def answered(self, streamed: bool) -> None:
        """The head of a replica's answer came, ``streamed`` or whole. To be called where ``target`` is not None."""

    def release(self, tokens: Tokens | None = None, size: int = 0, failed: str = "") -> None:
        """The request is over, however it went. Calling it again changes nothing.

        ``tokens``: the request's, where they are known. ``size``: bytes of the answer that came. ``failed``: why the
        engine gave no answer, or broke it off; "" if that was not the engine's fault.
        """

    async def retry(self, error: VllmdError) -> Permit:
        """Acquire another permit for a request that failed with ``error``, for another replica if there are several.

        Allowed before the client has had a byte of the answer, and awaited after ``release``. Raises ``error`` if
        nothing more can be tried, and what ``acquire`` raises.
        """

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """Have ``callback(reason)`` called if the daemon breaks the request off; ``release`` must follow even then."""


def silent() -> None:
    """The ``waits`` of a request whose client is not told that it waits."""


class Gate(Protocol):
    """The daemon's side, called in its own event loop."""

    def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
        """What ``name`` ("" if the request named none) means to the caller. Whether the caller may use it is not asked.

        Raises UnknownModel, or BadRequest if it is ambiguous or missing; neither names a model of another key.
        """

    def try_acquire(
        self,
        model: str,
        key: str,
        only: str = "",
        body: bytes = b"",
        waits: Callable[[], None] = silent,
        offer: str = "",
    ) -> Permit | None:
        """The permit, where the request may be sent without waiting; None, nothing changed: await ``acquire``.

        The parameters are those of ``acquire``. Raises VllmdError if the request is refused.
        """

    async def acquire(
        self,
        model: str,
        key: str,
        only: str = "",
        body: bytes = b"",
        waits: Callable[[], None] = silent,
        offer: str = "",
        route: str = "",
    ) -> Permit:
        """Wait until the request may be sent. Cancelled when the client disconnects.

        ``key``: the name of the caller's API key, whose limits hold. ``only``: the replica that alone can serve it
        (``Target.model`` of an earlier permit). ``body``: used to estimate its tokens. ``offer``: ``Target.offer``; an
        adapter is loaded first. ``route``: the public path of the request, "" for any; checked again, since the
        model's routes may become known only when its engine runs. ``waits`` is called if the request has to wait, also
        at a later ``retry``. Raises VllmdError if the request is refused. After a cancelled or failed ``acquire`` there
        is nothing to release.
        """

    def serves(self, model: str) -> bool:
        """Whether an engine of the model is awake, so that nothing has to be loaded for a request."""

    def loading(self, model: str) -> str:
        """The model's progress for a client that waits, such as ``weights``; "" for none."""

    def keep_alive(self, model: str, key: str, seconds: float) -> None:
        """The client will use the model again within ``seconds``; 0.0: the model may go; infinite: as long as allowed.

        Called after the request. The gate may shorten it.
        """


class Authenticator(Protocol):
    """Identifies the sender of every request by its head, before the body is read."""

    def identify(self, request: Request) -> Caller:
        """The sender of a request; without a key, or with a wrong one, a caller with few scopes and a ``refusal``.

        Raises Misdirected or Unavailable for a request that is refused on any route.
        """


class AllowAll:
    """The authenticator of a server without keys: every caller may use every route."""

    def identify(self, request: Request) -> Caller:
        """``ANYBODY``, whatever the request shows."""
        return ANYBODY
