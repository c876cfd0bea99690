"""What clients meet: listeners, authentication, quotas, the admission gate. There at once, before any device is found.

``front_end`` builds it, whole; ``startup.back_end`` builds what is behind it, and ``FrontEnd.open`` lets requests
through to that. Clients who come earlier wait at the gate.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllmd.admin.control import Control
from vllmd.admin.counters import Counters
from vllmd.api.answers import Reloaded
from vllmd.config.types import Config
from vllmd.daemon.admission_gate import AdmissionGate, Fetching
from vllmd.daemon.changes import Changes
from vllmd.daemon.current import ApplyConfiguration, Current, Later, RuntimeEnvironment
from vllmd.daemon.disabled import Disabled
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.failure_text import places
from vllmd.daemon.following import Following
from vllmd.daemon.instances import Instances
from vllmd.daemon.key_store import KeyStore
from vllmd.daemon.learnt import Learnt
from vllmd.daemon.listeners import Listeners
from vllmd.daemon.operator_commands import OperatorCommands
from vllmd.daemon.plans import Plans
from vllmd.daemon.previews import Previews
from vllmd.daemon.quotas import Quotas
from vllmd.daemon.records import Records
from vllmd.daemon.runtime_adapters import RuntimeAdapters
from vllmd.daemon.runtime_models import RuntimeModels, addresses
from vllmd.daemon.status import Status
from vllmd.daemon.store import ModelStore
from vllmd.errors import Unavailable
from vllmd.proxy.forward import Relay
from vllmd.proxy.limits import Limits

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd

log = logging.getLogger("vllmd")

SHUTTING_DOWN = "vllmd is shutting down; try again in a few seconds"


@dataclass(frozen=True)
class FrontEnd:
    """All that serves before, and while, there is a back end."""

    runtime: RuntimeEnvironment
    current: Current
    resolver: EngineResolver
    counters: Counters
    gate: AdmissionGate
    changes: Changes
    learnt: Learnt
    status: Status
    instances: Instances
    runtime_models: RuntimeModels
    store: ModelStore
    changing: asyncio.Lock  # one change of the configuration at a time
    listeners: Listeners
    records: Records
    key_store: KeyStore
    disabled: Disabled
    quotas: Quotas
    back: Later[BackEnd]

    def open(self, back: BackEnd) -> None:
        """Let requests through to the back end."""
        self.back.set(back)
        self.gate.open(back)

    def accept(self, config: Config) -> None:
        """Serve by this configuration from now on."""
        logging.getLogger().setLevel(config.log_level.upper())
        self.current.apply(config)
        self.gate.refusal = None
        self.gate.configure(config.models, self.current.engines, config.server.keep_alive_limit, config.pools)
        self.records.configure(config.records)
        self.key_store.load()
        self.disabled.load()
        self.listeners.configure(self.key_store.added_to(config))

    def refuse_waiting(self) -> None:
        """Refuse the requests that wait, and those that come, with 503; answers that have begun go on."""
        self.gate.refusal = Unavailable(SHUTTING_DOWN, retry_after=5)
        self.gate.reject_waiting(SHUTTING_DOWN)


def front_end(
    config: Config,
    broken: str,
    runtime: RuntimeEnvironment,
    sockets: Mapping[str, Sequence[socket.socket]],
    take: ApplyConfiguration,
    reload: Callable[[], Awaitable[Reloaded]],
) -> FrontEnd:
    """Everything but the first accept(). ``broken``: why the configuration cannot be used, "" if it can."""
    current, back, changing = Current(config, broken), Later["BackEnd"](), asyncio.Lock()
    key_store = KeyStore(runtime.keys)
    key_store.load()
    key_store.configured = lambda: current.config.auth
    with_keys = key_store.added_to(config)
    resolver, counters, quotas = EngineResolver(), Counters(), Quotas(with_keys.auth.keys)
    fetching = Fetching(
        lambda name: store.may_fetch(name), lambda name: store.fetch(name), lambda name: store.how_far(name)
    )
    gate = AdmissionGate(resolver, quotas, counters, fetching)
    gate.configure(config.models, current.engines, config.server.keep_alive_limit, config.pools)
    if broken:  # what is wrong there is for those who may read it: operators, and the log
        what = f"vllmd's configuration is invalid, tell its administrator: {places(broken)}"
        gate.refusal = Unavailable(what)
    limits = Limits(config.server)
    relay = Relay(gate, limits)
    learnt = Learnt(runtime.learnt)
    records = Records(config.records, runtime.usage)
    relay.recorder, relay.tracer = records.recordings, records
    changes = Changes(current, counters, learnt, relay.forget, records.engine_up)
    instances = Instances(current, back, take, changing)
    runtime_models = RuntimeModels(current, back, take, changing, instances.plain, addresses(sockets.get("http", ())))
    store = ModelStore(current, runtime, back, changes, reload)
    status = Status(current, runtime, resolver, gate, learnt, back, lambda: listeners.connections, store.lines,
                    lambda: records.trouble, lambda: listeners.unanswered())  # fmt: skip
    disabled = Disabled(runtime.disabled)
    disabled.load()
    adapters = RuntimeAdapters(current, gate, back)
    commands = OperatorCommands(back, instances, disabled, current.engines_of, reload)
    following = Following(current, status, changes, back)
    previews = Previews(back, lambda: current.config)
    plans = Plans(current, back, records.arrivals, status.cache)
    control = Control(
        counters, status, commands, previews, plans, following, runtime_models, store, records, key_store, adapters
    )

    def outcome(model: str, answered: int, failed: bool) -> None:
        """Tell the scheduler how a request ended at a model's only engine; several replicas it judges by its events."""
        known = current.config.models.get(model)
        if back.now is not None and known and not known.replicas:
            back.now.engines.answered(model, answered, failed=failed)

    def spend(key: str, tokens: float, device: float) -> None:
        """A key's models have held devices for so many seconds more."""
        quotas.spent(key, tokens, device)
        counters.held(key, device)

    listeners = Listeners(
        with_keys, gate, quotas, control, relay, limits, sockets, outcome, records.ended, runtime.sessions
    )
    records.live = listeners.exchanges
    records.spend = spend
    key_store.changed = lambda: listeners.configure(key_store.added_to(current.config))
    records.base_of = lambda name: offer.model if (offer := gate.offers.get(name)) else name
    return FrontEnd(
        runtime=runtime,
        current=current,
        resolver=resolver,
        counters=counters,
        gate=gate,
        changes=changes,
        learnt=learnt,
        status=status,
        instances=instances,
        runtime_models=runtime_models,
        store=store,
        changing=changing,
        listeners=listeners,
        records=records,
        key_store=key_store,
        disabled=disabled,
        quotas=quotas,
        back=back,
    )
