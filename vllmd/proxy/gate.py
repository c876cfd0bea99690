"""What the proxy asks of the daemon: who is asked for, may the request go, and where to.

The proxy knows nothing of models, memory or keys. It hands every model request to a
``Gate`` and tells it, exactly once, when the request is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllmd.errors import VllmdError
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.http import Request
from vllmd.proxy.tokens import Tokens


class Address(Protocol):
    """Where an upstream listens: a Unix socket path, or (when that is "") a host and port.

    ``tls``: "" for plain HTTP, ``system`` or the path of a file with the certificates to trust.
    ``prefix``: what stands before every path. ``owner``: the user id of whoever must be found listening there,
    None where that is nobody's to say (a server elsewhere). ``key``: what it wants as a bearer token; "" for nothing.
    ``vllmd.engines.base.Listen`` is one.
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


class Rules(Protocol):
    """What becomes of the top-level members of a JSON request: first ``strip``, then ``set``, then ``default``.

    ``system``: the system prompt of one that has none; "" for nothing.
    ``vllmd.config.types.RequestRules`` is one.
    """

    @property
    def strip(self) -> Sequence[str]: ...
    @property
    def set(self) -> Mapping[str, object]: ...
    @property
    def default(self) -> Mapping[str, object]: ...
    @property
    def system(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What a client's model name means.

    ``served_name``: what the engine knows the model by; written into the request in place of the
    client's name, and back into the answer. ``routes``: the public paths it serves, None for any.
    ``headers``: fields added to the upstream's request (a remote's own key, for one). ``rules``: what becomes of
    the members of a JSON request, None for nothing. ``own_api``: what of the engine's own API is passed on, see
    ``engine_api``. ``names``: what the configuration calls the model; a client that called it something else is told
    which one it got. Empty where that is not known. ``offer``: the name of an adapter or a variant of the model, by
    which it is permitted and counted; "" for the model itself. ``nature``: what the model is, where its files
    tell, such as "an embedding model".
    """

    model: str
    served_name: str
    routes: frozenset[str] | None = None
    headers: Sequence[tuple[str, str]] = field(default=())
    rules: Rules | None = None
    own_api: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    offer: str = ""
    nature: str = ""

    @property
    def called(self) -> str:
        """What permits and counters know it by."""
        return self.offer or self.model


class Permit(Protocol):
    """The leave to send one request to ``upstream``. It is given back by ``release``, exactly once."""

    @property
    def upstream(self) -> Address:
        """The engine to which the request is to be sent."""

    @property
    def target(self) -> Target | None:
        """What the client's model name means there, where one of several replicas was chosen; else None."""

    def answered(self, streamed: bool) -> None:
        """The head of a replica's answer came, ``streamed`` or whole. Only owed where ``target`` is not None."""

    def release(self, tokens: Tokens | None = None, size: int = 0, failed: str = "") -> None:
        """The request is over, however it went; counts once, though it may be called again.

        ``tokens``: what it took, where that is known. ``size``: bytes of the answer that came. ``failed``: why the
        engine gave no answer, or broke it off; "" if it is not to blame.
        """

    async def retry(self, error: VllmdError) -> Permit:
        """The leave to send it once more, to another replica if there are several. ``release`` comes before it.

        Only before the client has had a byte of the answer. Raises ``error``, by which it failed, where there is
        nothing more to be tried, and what ``acquire`` raises.
        """

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """Have ``callback(reason)`` called if the daemon breaks the request off; ``release`` is still owed then."""


def silent() -> None:
    """For a request of which the client is not told that it waits."""


class Gate(Protocol):
    """The daemon's side, called in its own event loop."""

    def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
        """What ``name`` ("" if the request named none) means to the caller, who may not be allowed to use it.

        Raises UnknownModel, or BadRequest if it is ambiguous or missing; neither names a model that is not its own.
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
        """Wait until the request may go. Cancelled when the client leaves.

        ``key``: the name of the caller's API key, whose limits hold. ``only``: the replica that alone can serve it
        (``Target.model`` of an earlier permit). ``body`` is looked at only to tell how much the request asks for.
        ``offer``: ``Target.offer``; an adapter is loaded first. ``route``: the public path that is asked for, "" for
        any; what the model serves may have been found out only after it was resolved. ``waits`` is called if the
        request does not go at once, also at a later ``retry``. Raises a VllmdError when the request is refused. A
        cancelled or failed ``acquire`` owes no ``release``.
        """

    def serves(self, model: str) -> bool:
        """Whether an engine of the model is awake, so that nothing has to be loaded for a request."""

    def loading(self, model: str) -> str:
        """What a waiting client may be told of the model's progress, such as ``weights``; "" for nothing."""

    def keep_alive(self, model: str, key: str, seconds: float) -> None:
        """The client of a request that is over will use the model again within ``seconds``; 0.0: it lets it go.

        Infinite: for as long as may be. The gate may have limits.
        """


class Authenticator(Protocol):
    """Looks at every request's head before its body is read."""

    def identify(self, request: Request) -> Caller:
        """The sender of a request; without a key, or with a wrong one, a caller with few scopes and a ``refusal``.

        Raises Misdirected, Unavailable for what is not to be answered whatever the route.
        """


class AllowAll:
    """The authenticator where there are no keys to be shown: every caller may use every route."""

    def identify(self, request: Request) -> Caller:
        """``ANYBODY``, whatever the request shows."""
        return ANYBODY
