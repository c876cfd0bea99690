"""How a daemon that runs goes on with another configuration.

What a reload does with each setting is the column ``reload`` of ``config/settings.py``; here that is made true. The
order matters: the devices come first, because what models will take is reckoned for them, and nothing may be put on a
device that is about to be another one; engines that are adopted come last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from vllmd.api.answers import Reloaded
from vllmd.config.reload import LATER, in_force
from vllmd.config.types import Config, ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import renamed
from vllmd.daemon.back_end import BackEnd
from vllmd.daemon.engine_process import fingerprint, is_outdated
from vllmd.daemon.expectations import expect, files_of, opener, settings_of
from vllmd.daemon.front_end import FrontEnd
from vllmd.daemon.startup import adopt_running, log_devices
from vllmd.errors import Conflict
from vllmd.gpu import Devices

log = logging.getLogger("vllmd")


async def apply_configuration(
    front: FrontEnd, back: BackEnd, read: Config, unless_used: frozenset[str] = frozenset()
) -> Reloaded:
    """Go on with another configuration; engines are stopped only where their own settings changed.

    ``unless_used``: models, or replicas by their id. Raises Conflict, nothing changed, if the core finds one of them in
    use when all is reckoned.

    The answer has what changed of the models, and in ``later`` each setting that is not in force, with what becomes of
    it.
    """
    current = front.current
    config, later = in_force(current.config, read, activated=front.runtime.activated)
    devices, before = await _renewed(front, back, config), current.engines
    inventory = devices.inventory() if devices else back.memory.inventory
    expected = await expect(config, front.runtime, inventory, front.resolver, back.dispatcher.scheduler.specs)
    engines = expected.engines
    was, repaired = current.config.models, bool(current.broken)
    # In a thread: of ten thousand models this takes half a second, in which no stream is to wait.
    now_called, changed = await asyncio.to_thread(_compared, engines, before)
    running = {now_called.get(old, old): process for old, process in back.engines.processes.items()}
    changed |= {name for name, process in running.items() if name in engines and is_outdated(process, engines[name])}
    added, removed = sorted(config.models.keys() - was.keys()), sorted(was.keys() - config.models.keys())

    def answered(answer: commands.Answer) -> None:
        """The core goes on with it, or not; if so, everybody else does, before any engine is started by it."""
        if answer.refused:
            raise Conflict(answer.refused)
        front.accept(config)
        back.engines.relocate(expected.paths, config.engines.port_start, config.engines.port_end)
        back.engines.configure(engines, expected.estimates)
        back.engines.standbys.configure(config.engines.standby, engines.values())
        front.gate.learn_kinds(expected.kinds)
        if devices:
            old = back.memory.devices
            back.memory.use_devices(devices, files_of(config))
            old.close()
            log_devices(back.memory)

    now = events.DevicesChanged(inventory, str(devices.trouble or ""), devices.asking) if devices else None
    settings = settings_of(config, inventory)
    back.ask(events.ModelsChanged(expected.specs, frozenset(changed), now, settings, unless_used), answered)
    there = {*config.models, *engines}
    if not repaired:
        for order in front.disabled.orders(there):  # of a model that is new here, or of a file that has been mended
            back.post(order)
        await front.disabled.remove(*({*was, *before} - there))
    if devices:
        await back.readings.look()
    if repaired:
        await adopt_running(front, back)
    done = Reloaded(
        models=len(config.models),
        added=tuple(added),
        removed=tuple(removed),
        changed=tuple(sorted(changed)),
        later=later,
        warnings=tuple(config.warnings),
    )
    _say(done)
    return done


async def _renewed(front: FrontEnd, back: BackEnd, config: Config) -> Devices | None:
    """The devices as this configuration wants them; None if it wants them as before, or they do not answer now."""
    before = front.current.config
    if (config.devices, config.reserve) == (before.devices, before.reserve):
        return None
    return await back.devices.renew(opener(config, front.runtime.environment))


def _say(done: Reloaded) -> None:
    """Into the log what ``vllmctl reload`` prints."""
    log.info(
        *("configuration reloaded: %d models, added %s, removed %s, changed %s", done.models),
        *(", ".join(names) or "none" for names in (done.added, done.removed, done.changed)),
    )
    for warning in done.warnings:
        log.warning("%s", warning)
    for path, what in done.later.items():
        log.log(logging.WARNING if what == LATER else logging.INFO, "%s %s", path, what)


def _compared(engines: Mapping[str, ModelConfig], before: Mapping[str, ModelConfig]) -> tuple[dict[str, str], set[str]]:
    """The new id, by the old one, of each engine that goes on by another, as the core has it; and which of those that
    go on are other engines by their settings now."""
    now, was = _ids(engines), _ids(before)
    pairs = [renamed(was[name], now[name]) for name in now if name in was]
    now_called = {pair[0]: pair[1] for pair in pairs if pair}
    old_id = {new: old for old, new in now_called.items()}
    changed = set()
    for name, engine in engines.items():
        old = before.get(old_id.get(name, name))
        if old is not None and old is not engine and fingerprint(engine) != fingerprint(old):
            changed.add(name)
    return now_called, changed


def _ids(engines: Mapping[str, ModelConfig]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, engine in engines.items():
        found.setdefault(engine.replica_of or name, []).append(name)
    return found
