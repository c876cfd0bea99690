"""What clients meet: listeners, authentication, quotas, the admission gate. There at once, before any device is found.

``front_end`` builds it, whole; ``startup.back_end`` builds what is behind it, and ``FrontEnd.open`` lets requests
through to that. Clients who come earlier wait at the gate.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
from vllmd.frozen import frozen
from vllmd.proxy.forward import Relay
from vllmd.proxy.limits import Limits

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd
    from vllmd.launcher.client import LauncherClient

log = logging.getLogger("vllmd")

SHUTTING_DOWN = "vllmd is shutting down; try again in a few seconds"
ADOPTING = "engines that run already are looked for; try again in a second"


@frozen
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
    launcher: Later[LauncherClient]  # before the back end, which waits for its answers
    back: Later[BackEnd]

    def open(self, back: BackEnd) -> None:
        """Let requests through to the back end."""
        self.back.set(back)
        self.gate.open(back)

    def accept(self, config: Config, *, adopting: bool = False) -> None:
        """Serve by this configuration from now on, or, where engines may run that are yet to be adopted, from then."""
        logging.getLogger().setLevel(config.log_level.upper())
        self.current.apply(config)
        if not self._refuses_with(SHUTTING_DOWN):
            self.gate.refusal = Unavailable(ADOPTING, retry_after=1) if adopting else None
        self.gate.configure(config.models, self.current.engines, config.server.keep_alive_limit, config.pools)
        self.records.configure(config.records)
        self.key_store.load()
        self.disabled.load()
        self.listeners.configure(self.key_store.added_to(config))

    def adopted(self) -> None:
        """Serve requests that were refused because an engine of theirs might run already."""
        if self._refuses_with(ADOPTING):
            self.gate.refusal = None

    def _refuses_with(self, message: str) -> bool:
        return self.gate.refusal is not None and self.gate.refusal.message == message

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
    """Build everything but the first accept(). ``broken``: why the configuration cannot be used, "" if it can."""
    current, back, changing = Current(config, broken), Later["BackEnd"](), asyncio.Lock()
    launcher = Later["LauncherClient"]()
    # 1. What two parts need of each other: these functions name parts that are made further down, and are called later.
    fetching = Fetching(
        lambda name: store.may_fetch(name), lambda name: store.fetch(name), lambda name: store.how_far(name)
    )

    def spend(key: str, device_seconds: float) -> None:
        quotas.spent(key, 0.0, device_seconds)
        counters.held(key, device_seconds)

    def note_outcome(model: str, status: int, failed: bool) -> None:
        if back.now is not None:
            back.now.engines.note_answer(model, status, failed=failed)

    # 2. Keys, which come before everything else that a request meets.
    key_store = KeyStore(
        runtime.keys, lambda: current.config.auth, lambda keys: listeners.configure(keys.added_to(current.config))
    )
    key_store.load()
    with_keys = key_store.added_to(config)
    # 3. The gate, and the relay behind it. What is wrong with a broken configuration is for operators, and the log.
    counters = Counters(lambda name: gate.has(name))
    resolver, quotas = EngineResolver(), Quotas(with_keys.auth.keys)
    gate = AdmissionGate(resolver, quotas, counters, fetching)
    gate.configure(config.models, current.engines, config.server.keep_alive_limit, config.pools)
    if broken:
        gate.refusal = Unavailable(f"vllmd's configuration is invalid, tell its administrator: {places(broken)}")
    limits, learnt = Limits(config.server), Learnt(runtime.learnt)
    records = Records(config.records, runtime.usage, gate.base_of, lambda: listeners.exchanges(), spend)
    relay = Relay(gate, limits, records.recordings, records)
    # 4. What operators see and do.
    changes = Changes(current, counters, learnt, relay.forget, records.engine_up)
    (disabled := Disabled(runtime.disabled)).load()
    instances = Instances(current, back, take, changing)
    runtime_models = RuntimeModels(current, back, take, changing, instances.plain, addresses(sockets.get("http", ())))
    store = ModelStore(current, runtime, back, changes, reload)
    status = Status(current, runtime, resolver, gate, learnt, back, lambda: listeners.connections, store.lines,
                    lambda: "; ".join(filter(None, (records.trouble, records.log_trouble, learnt.trouble))),
                    lambda: listeners.unanswered(),
                    lambda: launcher.now.trouble if launcher.now is not None else "")  # fmt: skip
    control = Control(
        counters, status, OperatorCommands(back, instances, disabled, current.engines_of, reload),
        Previews(back, lambda: current.config), Plans(current, back, records.arrivals, status.cache),
        Following(current, status, changes, back), runtime_models, store, records, key_store,
        RuntimeAdapters(current, gate, back),
    )  # fmt: skip
    # 5. The listeners, which nobody is let in by before ``Listeners.open``.
    listeners = Listeners(with_keys, gate, quotas, control, relay, limits, sockets, note_outcome, records.ended,
                          runtime.sessions)  # fmt: skip
    return FrontEnd(
        runtime, current, resolver, counters, gate, changes, learnt, status, instances, runtime_models, store,
        changing, listeners, records, key_store, disabled, quotas, launcher, back,
    )  # fmt: skip
