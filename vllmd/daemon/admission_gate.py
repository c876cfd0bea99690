"""Admission: every request for a model passes here on its way to the core, and back.

Theory of operation. To the core a request is simple: it arrives, it is admitted or refused, it ends. To the proxy it
is not: its client leaves, the daemon shuts down, an engine dies, all of it at any moment. The core must hear of each
request exactly twice, of its arrival and of its end. A request whose end is not told takes a place at its engine for
ever; one whose end is told twice frees the place of another.

So one object, the ``Permit``, is the request from its arrival to its end::

    new ──arrived──► waiting ──admit──► admitted ──release──► over       tells the core: RequestFinished
                        ├──reject──► over                                the core knows
                        └──client left, shutdown──► over                 tells the core: RequestGone

``_permits`` has the requests that the core knows of and that are not over. Only ``_leave``, ``reject`` and
``Permit.release`` take one out, so whichever comes first is the only one that counts. Where a model serves and nothing
else is under way the core admits without an event (``admit_at_once``), and ``try_acquire`` has the permit without a
coroutine. Else the core may admit within the very call that told it of the arrival, and then ``acquire`` waits for
nothing; or at any time later, and then ``acquire`` waits for the future ``Permit.decided``. That future may have been
cancelled, because the client has left, in the same turn of the event loop in which the core admits: the permit is
released then (``_leave``), not dropped.

Before the back end is there (``open``) requests wait in ``_opening``, unknown to the core, and only then arrive.

What a client's name means (``resolve``) is worked out once per configuration and kept, for this is done for every
request: a ``Target`` by engine and offer in ``_targets``, and by the client's spelling in ``_resolved``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from typing import Protocol

from vllmd import errors
from vllmd.admin.counters import Counters
from vllmd.api.names import Names
from vllmd.config.offers import adapters_of as named_adapters
from vllmd.config.types import ModelConfig, PoolConfig, RequestRules
from vllmd.core import commands, events
from vllmd.daemon.failure_text import for_clients
from vllmd.daemon.fitness import unfit
from vllmd.daemon.offers import Offer, Offers
from vllmd.daemon.quotas import Quotas, Use
from vllmd.engines.base import Adapter, Call, Engine, Listen
from vllmd.frozen import frozen
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.gate import Target, silent
from vllmd.proxy.model_requests import unserved
from vllmd.proxy.tokens import Tokens
from vllmd.proxy.upstream import OutOfFiles, Unreached

ERRORS: Mapping[commands.RejectReason, type[errors.VllmdError]] = {
    commands.RejectReason.ENGINE_FAILED: errors.EngineFailed,
    commands.RejectReason.UNAVAILABLE: errors.Unavailable,
    commands.RejectReason.UNKNOWN_MODEL: errors.UnknownModel,
    commands.RejectReason.TOO_MANY_REQUESTS: errors.TooManyRequests,
    commands.RejectReason.MODEL_TOO_LARGE: errors.ModelTooLarge,
    commands.RejectReason.BAD_REQUEST: errors.BadRequest,
    commands.RejectReason.CONFLICT: errors.Conflict,
    commands.RejectReason.DISABLED: errors.ModelDisabled,
    commands.RejectReason.DEFECT: errors.InternalError,
}


async def _nothing(name: str) -> None:
    """The stand-in for fetching models, where none may be fetched."""


NOWHERE = Listen()  # the address of a request that has not been admitted
REACH_TRIES, REACH_PAUSE = 20, 0.1  # attempts of a request whose engine does not listen, and seconds between them


class BackEnd(Protocol):
    """What the gate needs of the core and the engines, once they are there."""

    def post(self, event: events.Event) -> None:
        """Hand an event to the core."""

    def admit_at_once(self, request: str, model: str) -> str | None:
        """Tell the core of a request: the replica that has it now, or None: its arrival is to be posted."""

    def finish_at_once(self, request: str) -> bool:
        """Tell the core that a request has ended well; False: its end is to be posted."""

    def address_of(self, replica: str) -> Listen | None:
        """Where the replica's engine listens; None if there is none."""

    def phase_of(self, model: str) -> str:
        """The phase that clients who wait for the model are told; "" while nothing is under way."""

    def serves(self, model: str) -> bool:
        """Whether an engine of the model is awake."""

    def unreached(self, replica: str) -> None:
        """Note that no process listens where the replica's engine should."""

    async def provide(self, replica: str, adapter: str, waits: Callable[[], None], load: Call | None = None) -> None:
        """Have the replica's engine load the adapter, unless it has it; ``waits`` is called if that takes its time.

        ``load``: the call that loads an adapter which is not of the configuration. Raises EngineFailed.
        """

    def ask(self, event: events.Asking, answered: Callable[[commands.Answer], None]) -> None:
        """Hand an event to the core, and have ``answered`` called with the core's answer."""


def _unheard(event: events.Event) -> None:
    """Drop an event: before the back end is there, no request has reached the core, so none has anything to tell it."""


@frozen
class Fetching:
    """Models that are not here and may be fetched on request.

    ``may_fetch``: whether a name means such a model. ``fetch`` returns when the model is served, however long that
    takes; raises VllmdError. ``progress``: what clients who wait are told, such as ``fetching 35 %``; "" for none.
    """

    may_fetch: Callable[[str], bool] = lambda name: False
    fetch: Callable[[str], Awaitable[None]] = field(default=_nothing)
    progress: Callable[[str], str] = lambda name: ""


NOTHING_TO_FETCH = Fetching()


class AdmissionGate:
    """Implements ``vllmd.proxy.gate.Gate`` over the core."""

    def __init__(
        self,
        engine_of: Callable[[ModelConfig], Engine],
        quotas: Quotas,
        counters: Counters,
        fetching: Fetching = NOTHING_TO_FETCH,
    ) -> None:
        """``engine_of`` gives the engine kind of a model's settings."""
        self._fetching = fetching
        self.refusal: errors.VllmdError | None = None  # while set, the answer to every request
        self._engine_of = engine_of
        self._quotas = quotas
        self._counters = counters
        self._back: BackEnd | None = None
        # The back end's, once it is there:
        self._post: Callable[[events.Event], None] = _unheard
        self._admit_at_once: Callable[[str, str], str | None] = lambda request, model: None
        self._finish_at_once: Callable[[str], bool] = lambda request: False
        self._opening: set[asyncio.Future[None]] = set()  # requests that the core does not know yet
        self._permits: dict[str, Permit] = {}  # by the core's name for a request
        self._number = 1  # of the next request that the core is told of, which names it
        self._runtime_adapters: dict[str, Mapping[str, str]] = {}  # model -> adapter -> path
        self._kinds: Mapping[str, str] = {}  # by engine, once their files have been read
        self.configure({}, {})

    def open(self, back: BackEnd) -> None:
        """Let requests through to the core and the engines, which are there now."""
        self._back, self._post = back, back.post
        self._admit_at_once, self._finish_at_once = back.admit_at_once, back.finish_at_once
        for waiting in self._opening:
            if not waiting.done():
                waiting.set_result(None)

    def learn_kinds(self, kinds: Mapping[str, str]) -> None:
        """Take in what each engine's model is for, as its files tell (``hub.kind_at``)."""
        self._kinds = kinds
        self._targets.clear()
        self._resolved.clear()

    def configure(
        self,
        models: Mapping[str, ModelConfig],
        engines: Mapping[str, ModelConfig],
        keep_alive_limit: float | None = None,
        pools: Mapping[str, PoolConfig] | None = None,
    ) -> None:
        """Serve the models of a new configuration from now on.

        ``engines``: the settings of each model's engine, or of each of its replicas, by id. ``pools`` by name.
        ``keep_alive_limit`` is in seconds, None for none; 0.0: no client's word counts.
        """
        self.keep_alive_limit = keep_alive_limit
        self._models, self._engines = models, engines
        self._firsts: dict[str, str] = {}  # the first engine of models that have several
        for name, engine in engines.items():
            if engine.replica_of:
                self._firsts.setdefault(engine.replica_of, name)
        self._pools = pools or {}
        # An adapter that was loaded at run time goes on under its name, unless the configuration has taken that.
        before, self._runtime_adapters = self._runtime_adapters, {}
        self._update_offers()
        for name, adapters in before.items():
            if name in models and models[name].runtime_adapters:
                free = {adapter: path for adapter, path in adapters.items() if adapter not in self._names}
                self.offer_adapters(name, free)

    def offer_adapters(self, model: str, adapters: Mapping[str, str]) -> None:
        """Offer these run-time adapters of the model, name -> path, and no others beside the configuration's."""
        self._runtime_adapters = {**self._runtime_adapters, model: adapters}
        self._update_offers()

    def runtime_adapters(self, model: str) -> Mapping[str, str]:
        """The run-time adapters of the model, name -> path."""
        return self._runtime_adapters.get(model, {})

    def base_of(self, name: str) -> str:
        """The model that an adapter or a variant belongs to; any other name as it is."""
        offer = self._offers.get(name)
        return offer.model if offer else name

    def has(self, name: str) -> bool:
        """Whether a model, an alias or another offer is called that."""
        return name in self._names

    def would_fetch(self, name: str) -> bool:
        """Whether a request for this name may have a model fetched that is not here yet."""
        return self._fetching.may_fetch(name)

    def _update_offers(self) -> None:
        """List what is offered beside the models, and forget what names meant before."""
        self._offers = Offers(self._models, self._pools, self._adapters)
        self._names = Names([(model.name, model.aliases) for model in self._models.values()], self._offers)
        self._targets: dict[tuple[str, str], Target] = {}  # by engine (or its model), and adapter or variant
        self._resolved: dict[str, Target] = {}  # by names that clients use and that mean the same to everybody

    @property
    def requests(self) -> int:
        """The number of requests that have arrived and not ended."""
        return len(self._permits) + len(self._opening)

    def running(self) -> Counter[tuple[str, str]]:
        """The number of admitted requests, by model and key."""
        return Counter([(permit.model, permit.key) for permit in self._permits.values() if permit.admitted])

    # -- names -----------------------------------------------------------------------------

    def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
        """What the client's name for a model means. Raises UnknownModel or BadRequest (ambiguous)."""
        if self.refusal:
            raise self.refusal.with_traceback(None)  # or each raise would add to the one that is kept
        if name in self._resolved:
            return self._resolved[name]
        try:
            configured = self._names.resolve(name, caller.may_use)
        except errors.UnknownModel:
            # A key that names its models has no others fetched.
            if caller.models is not None or not self._fetching.may_fetch(name):
                raise
            return Target(name, name, names=frozenset({name}))
        if (pool := self._offers.pool(configured)) is not None:
            return self._target_of(self._choose_member(configured, pool, caller))
        target = self._target_of(configured)
        if name in target.names:  # any other name was a guess, among the models that this caller may use
            self._resolved[name] = target
        return target

    def resolve_engine(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model, or the id of a replica. Raises as ``resolve`` does."""
        if self.refusal and not self._is_replica(name):
            raise self.refusal.with_traceback(None)
        configured = self._names.with_replica(name, self._is_replica, caller.may_use)
        if (pool := self._offers.pool(configured)) is not None:
            models = ", ".join(pool)
            raise errors.BadRequest(f"{configured!r} is a pool, name one of its models: {models}", param="model")
        return self.base_of(configured)

    def _is_replica(self, name: str) -> bool:
        return name in self._engines and bool(self._engines[name].replica_of)

    def opens(self, name: str) -> frozenset[str]:
        """The models and offers that a key may use which has this name among its models. Raises as ``resolve`` does."""
        if self.refusal:
            raise self.refusal.with_traceback(None)
        return self._offers.opened_by(self._names.resolve(name))

    @property
    def offers(self) -> Offers:
        """What is offered beside the models."""
        return self._offers

    def called(self, name: str, caller: Caller = ANYBODY) -> str:
        """The configured name of a model or another offer. Raises as ``resolve`` does."""
        return self._names.resolve(name, caller.may_use)

    def _choose_member(self, name: str, pool: Sequence[str], caller: Caller) -> str:
        """The member of a pool that gets this request; the core chooses, and expects the request to arrive."""
        members = [member for member in pool if caller.may_use(member)]
        if not members:
            caller.check(name)
            raise errors.UnknownModel(f"none of the models of the pool {name!r} is here", param="model")
        models = [self.base_of(member) for member in members]
        answers: list[commands.Answer] = []
        if self._back:
            self._back.ask(events.PoolAsked(tuple(models)), answers.append)
        return members[models.index(answers[0].chosen) if answers and answers[0].chosen else 0]

    def _target_of(self, configured: str) -> Target:
        """The target of a model, an adapter or a variant. What is alike in all replicas is the first one's."""
        model = self.base_of(configured)
        return self._target(model, self._first(model), self._offers.get(configured))

    def _first(self, model: str) -> str:
        """The first engine of a model, or the only one."""
        return self._firsts.get(model, model)

    def _adapters(self, model: ModelConfig) -> Mapping[str, Adapter]:
        """The adapters of a model, as its first engine has them."""
        # Without adapters the engine's kind is not imported, which would take the first client's time.
        has_named = bool(model.adapters or model.extra_args) and bool(named_adapters(model))
        if not has_named and model.name not in self._runtime_adapters:
            return {}
        config = self._engines[self._first(model.name)]
        return self._adapters_at(config, self._engine_of(config))

    def _adapters_at(self, config: ModelConfig, kind: Engine) -> Mapping[str, Adapter]:
        """The adapters of one engine: those of its kind and settings, and those of run time."""
        more = self.runtime_adapters(config.replica_of or config.name)
        return {**kind.adapters(config), **{name: Adapter(name, path, name) for name, path in more.items()}}

    def _target(self, name: str, engine: str, offer: Offer | None = None) -> Target:
        """The target called ``name``, a model or one replica, whose settings are those of ``engine``."""
        key = (name, offer.name if offer else "")
        if key not in self._targets:
            config = self._engines[engine]
            kind = self._engine_of(config)
            served_name = kind.served_name(config)
            nature, unfit_routes = unfit(config, self._kinds.get(engine, ""))
            adapters = self._adapters_at(config, kind)
            rules = config.request
            if "" in adapters:  # an engine that applies adapters of its own accord is told which to leave out
                rules = RequestRules(set=adapters[""].members).over(rules)
            if offer is not None:
                rules = offer.rules.over(rules)
                served_name = adapters[offer.name].served_name if offer.is_adapter else served_name
            model = config.replica_of or config.name
            names = (offer.name,) if offer else (model, *self._models.get(model, config).aliases)
            self._targets[key] = Target(
                name, served_name, kind.routes(config) - unfit_routes, kind.headers(),
                None if rules == RequestRules() else rules, frozenset(kind.own_api(config)), frozenset(names),
                offer.name if offer else "", nature,
            )  # fmt: skip
        return self._targets[key]

    # -- a request's way -------------------------------------------------------------------

    def try_acquire(
        self,
        model: str,
        key: str,
        only: str = "",
        body: bytes = b"",
        waits: Callable[[], None] = silent,
        offer: str = "",
    ) -> Permit | None:
        """Admit the request if nothing is to be waited for or loaded, else None: ``acquire`` is to be awaited then.

        Nothing has changed where it is not admitted. Raises VllmdError as ``acquire`` does.
        """
        quota = self._quotas.by_key.get(key)
        if quota is not None:
            quota.check(self._quotas.clock())
        if offer:  # perhaps an adapter, which the engine may have to load
            return None
        permit = Permit(self, model, key, only, waits)
        if not self._arrive_at_once(permit):
            return None
        if quota is not None:
            permit.use = quota.take(body)
        self._counters.waited(model, 0.0)
        return permit

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
        """Wait until the request is admitted. Raises VllmdError; cancelled when the client leaves.

        ``only``: the one replica that may serve it. ``offer``: the adapter or variant that it named. ``route``: the
        public path that it came by. ``waits`` is called if it is not admitted at once.
        """
        # 1. The key's quota: a key over its limit takes no place in a queue.
        use = self._quotas.begin(key, body)
        began: float | None = None  # when it began to wait, if it did
        permit = Permit(self, model, key, only, waits, offer)
        try:
            # 2. Devices and engines must have been found.
            if self._back is None:
                began = self._quotas.clock()
                waits()
                opened = asyncio.get_running_loop().create_future()
                self._opening.add(opened)
                try:
                    await opened
                finally:
                    self._opening.discard(opened)
                self._check_served(model, route)
            # A model that is not here is fetched first; what its name means is known only then.
            if model not in self._models and self._fetching.may_fetch(model):
                began = began or self._quotas.clock()
                await self._fetch(permit, route)
            # 3. The core admits it, now or when the model is awake and it is its turn.
            self._arrive(permit)
            if not permit.admitted:
                began = began or self._quotas.clock()
                await self._decision(permit)
            # 4. An adapter is loaded, unless the engine has it.
            if offer:
                began = began or self._quotas.clock()
                await self._load_adapter(permit)
        except BaseException:
            if use is not None:
                use.abandon()
            raise
        permit.use = use
        self._counters.waited(offer or model, 0.0 if began is None else self._quotas.clock() - began)
        return permit

    def _check_served(self, model: str, route: str) -> None:
        """Check that the model serves a public path ("" is any), once its files are known. Raises NotFound."""
        if route and self._first(model) in self._engines:
            target = self._target(model, self._first(model))
            if target.routes is not None and route not in target.routes:
                raise unserved(target, route)

    async def _fetch(self, permit: Permit, route: str) -> None:
        """Wait until the model has been fetched and is served. Raises VllmdError; at a shutdown Unavailable."""
        permit.waits()
        shutdown = asyncio.get_running_loop().create_future()
        fetching = asyncio.ensure_future(self._fetching.fetch(permit.model))
        self._opening.add(shutdown)
        try:
            await asyncio.wait({shutdown, fetching}, return_when=asyncio.FIRST_COMPLETED)
            if shutdown.done():
                shutdown.result()
            fetching.result()
        finally:
            self._opening.discard(shutdown)
            fetching.cancel()
        target = self.resolve(permit.model)
        permit.model, permit.fetched = target.model, target
        self._check_served(permit.model, route)

    def _arrive(self, permit: Permit) -> None:
        """Tell the core of the request, which may admit it at once. Raises VllmdError if it is refused at once."""
        if self._arrive_at_once(permit):
            return
        self._enter(permit, str(self._number))
        tried, rank = frozenset(permit.tried), self._quotas.rank(permit.key)
        self._post(events.RequestArrived(permit.request, permit.model, permit.key, tried, permit.only, rank))
        if permit.refusal is not None:
            raise permit.refusal

    def _arrive_at_once(self, permit: Permit) -> bool:
        """Have the core admit the request without an event; False: the core knows nothing of it. Raises VllmdError."""
        request = str(self._number)
        replica = self._admit_at_once(request, permit.model)
        if replica is None:
            return False
        self._enter(permit, request)
        self._let_in(permit, replica)
        if permit.refusal is not None:
            raise permit.refusal
        return True

    def _enter(self, permit: Permit, request: str) -> None:
        """Know the permit from now on by this name, which is the core's for it."""
        self._number += 1
        permit.request = request
        self._permits[request] = permit

    async def _decision(self, permit: Permit) -> None:
        """Wait until a request that has arrived is admitted. Raises VllmdError if it is refused."""
        permit.waits()
        permit.decided = asyncio.get_running_loop().create_future()
        try:
            await permit.decided
        except asyncio.CancelledError:
            self._leave(permit)
            raise
        if permit.refusal is not None:
            raise permit.refusal

    async def _load_adapter(self, permit: Permit) -> None:
        """Wait until the engine has the adapter that the request is for, if it is for one. Raises VllmdError."""
        offer = self._offers.get(permit.offer)
        if self._back is None or offer is None or not offer.is_adapter:
            return
        try:
            load = None
            if (path := self.runtime_adapters(offer.model).get(offer.name)) is not None:
                from vllmd.engines.adapters import load_call  # imported by nobody's first request

                load = load_call(offer.name, path, inplace=True)
            await self._back.provide(permit.replica, offer.name, permit.waits, load)
        except BaseException:
            permit.release()
            raise

    async def retry(self, permit: Permit, error: errors.VllmdError) -> Permit:
        """Acquire another permit for a request that failed by ``error``, which is raised where that makes no sense.

        A model with replicas is retried at another replica. A model's only engine is retried only if nobody listened
        at its address: then it has just died, and the core will hear of that and start it again.
        """
        replicas = self._models[permit.model].replicas if permit.model in self._models else None
        if self._back is None or isinstance(error, OutOfFiles):  # to another one there is no way, either
            raise error
        if replicas is None and isinstance(error, Unreached) and len(permit.tried) < REACH_TRIES:
            self._back.unreached(permit.replica)
            permit.waits()
            await asyncio.sleep(REACH_PAUSE)
        elif replicas is None or permit.only or len(permit.tried) >= replicas.retries:
            raise error
        else:
            self._counters.retried(permit.model, permit.replica)
        again = Permit(self, permit.model, permit.key, permit.only, permit.waits, permit.offer)
        again.tried = (*permit.tried, permit.replica)
        self._arrive(again)
        if not again.admitted:
            await self._decision(again)
        if again.offer:
            await self._load_adapter(again)
        if permit.use is not None:
            permit.use.resume()
            again.use = permit.use
        return again

    def serves(self, model: str) -> bool:
        """Whether an engine of the model is awake."""
        return self._back is not None and self._back.serves(model)

    def loading(self, model: str) -> str:
        """What a waiting client may be told, such as ``loading weights``."""
        if model not in self._models and (progress := self._fetching.progress(model)):
            return progress
        return self._back.phase_of(model) if self._back else ""

    def keep_alive(self, model: str, key: str, seconds: float) -> None:
        """Tell the core that the model is wanted again, for as long as the configuration and the key allow."""
        allowed = self._quotas.keep_alive(key, seconds, self.keep_alive_limit)
        if allowed is not None and model in self._models:
            self._post(events.KeptAlive(model, key, allowed))

    # -- commands of the core --------------------------------------------------------------

    def admit(self, command: commands.Admit) -> None:
        """Let a request pass to its replica's engine; an engine that is no longer there ends the request at once."""
        permit = self._permits[command.request]
        self._let_in(permit, command.replica)
        if permit.decided is not None:
            permit.decide()

    def _let_in(self, permit: Permit, replica: str) -> None:
        """The core has admitted the request to this replica."""
        address = self._back.address_of(replica) if self._back else None
        permit.admitted, permit.replica, permit.target = True, replica, permit.fetched
        model = self._models.get(permit.model)
        if model is not None and model.replicas and replica in self._engines:  # replicas may differ in served names
            permit.target = self._target(replica, replica, self._offers.get(permit.offer))
        if address is None:
            permit.refusal = errors.UpstreamFailed(f"the engine of {replica} is gone")
            permit.release()
        else:
            permit.upstream = address

    def reject(self, command: commands.Reject) -> None:
        """Refuse a request, which the core has forgotten with this command."""
        permit = self._permits.pop(command.request, None)
        if permit is not None:
            kind = ERRORS[command.error]
            message = for_clients(command.message)
            if kind is errors.EngineFailed:
                message = f"{permit.model}: {message}"
            elif kind is errors.ModelDisabled:  # an operator's own words, for clients
                message = f"{permit.model} is disabled: {command.message}"
            permit.refusal = kind(message, retry_after=command.retry_after)
            permit.decide()

    def cut(self, command: commands.CutRequest) -> None:
        """Break off an admitted request, whose permit still ends by ``Permit.release``."""
        permit = self._permits.get(command.request)
        if permit is not None and permit.admitted:
            permit.cut(command.reason)

    def reject_waiting(self, why: str) -> None:
        """Refuse the requests that still wait, at a shutdown, with a time to come back."""
        for waiting in self._opening:
            if not waiting.done():
                waiting.set_exception(errors.Unavailable(why, retry_after=5))
                waiting.exception()  # read once: a client that just left must not make asyncio complain
        for permit in [permit for permit in self._permits.values() if not permit.admitted]:
            permit.refusal = errors.Unavailable(why, retry_after=5)
            permit.decide()
            self._leave(permit)

    def _leave(self, permit: Permit) -> None:
        """End a request that its client has left, or that a shutdown refuses, before its engine was asked."""
        if permit.admitted:
            permit.release()
        elif self._permits.pop(permit.request, None):
            self._post(events.RequestGone(permit.request))

    # -- events of permits -----------------------------------------------------------------

    def answered(self, permit: Permit, streamed: bool) -> None:
        """Tell the core that the head of a replica's answer came."""
        self._post(events.RequestAnswered(permit.request, streamed))

    def ended(self, permit: Permit, tokens: Tokens | None, failed: str) -> None:
        """Count an admitted request that is over, and tell the core."""
        self._permits.pop(permit.request, None)
        if tokens is not None:
            self._counters.used(permit.called, permit.key, tokens)
            if permit.use is None and permit.key:  # the key has no limits now, and may be given some today
                self._quotas.spent(permit.key, tokens.total, 0.0)
        if failed or not self._finish_at_once(permit.request):
            self._post(events.RequestFinished(permit.request, failed))


class Permit:
    """One request for a model, from its arrival to its end; once admitted, the leave to send it to ``upstream``."""

    __slots__ = (
        "_cut_reason",
        "_gate",
        "_on_cut",
        "_over",
        "admitted",
        "called",
        "decided",
        "fetched",
        "key",
        "model",
        "offer",
        "only",
        "refusal",
        "replica",
        "request",
        "target",
        "tried",
        "upstream",
        "use",
        "waits",
    )

    def __init__(
        self, gate: AdmissionGate, model: str, key: str, only: str, waits: Callable[[], None], offer: str = ""
    ) -> None:
        self.request = ""  # the core's name for it
        self.model = model
        self.key = key
        self.only = only
        self.offer = offer  # the adapter or variant of the model that it is for
        self.use: Use | None = None  # of its key's quota, once admitted; None without limits
        self.waits = waits
        self.tried: tuple[str, ...] = ()  # the replicas at which it has failed
        self.admitted = False
        self.refusal: errors.VllmdError | None = None
        self.decided: asyncio.Future[None] | None = None  # while ``acquire`` waits for the core
        self.replica = ""  # the one that it was admitted to
        self.upstream = NOWHERE
        self.target: Target | None = None  # where it differs from what the client's name meant before
        self.fetched: Target | None = None  # the target of a model that had to be fetched first
        self.called = offer or model  # what it is counted by
        self._gate = gate
        self._over = False
        self._on_cut: Callable[[str], None] | None = None
        self._cut_reason: str | None = None

    def decide(self) -> None:
        """Wake ``AdmissionGate.acquire``: the request was admitted or refused."""
        if self.decided is not None and not self.decided.done():
            self.decided.set_result(None)

    def answered(self, streamed: bool) -> None:
        """Note that the head of a replica's answer came."""
        self._gate.answered(self, streamed)

    def release(self, tokens: Tokens | None = None, size: int = 0, failed: str = "") -> None:
        """End the request, however it ended; a second call does nothing. ``size``: bytes of the answer."""
        if self._over:
            return
        self._over = True
        self._on_cut = None  # it leads to the request's body, which is to be freed now and not by a late collection
        if self.use is not None:
            self.use.end(tokens, size)
        self._gate.ended(self, tokens, failed)

    async def retry(self, error: errors.VllmdError) -> Permit:
        """Acquire a permit to send the request once more. Raises ``error`` where that makes no sense."""
        return await self._gate.retry(self, error)

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """Call ``callback(reason)`` when the daemon breaks the request off (at once if it has)."""
        if not self._over:
            self._on_cut = callback
        if self._cut_reason is not None:
            callback(self._cut_reason)

    def cut(self, reason: str) -> None:
        """Break the request off: the relay is told why."""
        self._cut_reason = reason
        if self._on_cut is not None:
            self._on_cut(reason)
