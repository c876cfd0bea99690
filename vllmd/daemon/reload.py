"""How a daemon that runs goes on with another configuration.

What a reload does with each setting is the column ``reload`` of ``config/settings.py``; here that is made true. The
order matters: the devices come first, because what models will take is reckoned for them, and nothing may be put on a
device that is about to be another one; engines that are adopted come last.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

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
    expected = await expect(config, front.runtime, inventory, front.resolver)
    engines = expected.engines
    was, repaired = current.config.models, bool(current.broken)
    known = {**{name: name for name in before}, **_renamed_engines(engines, before)}
    kept = {name: known[name] for name in engines if name in known}
    others = [(name, old) for name, old in kept.items() if engines[name] != before[old]]
    changed = {name for name, old in others if fingerprint(engines[name]) != fingerprint(before[old])}
    running = {name: back.engines.processes[old] for name, old in kept.items() if old in back.engines.processes}
    changed |= {name for name, process in running.items() if is_outdated(process, engines[name])}
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
        warnings=(*config.warnings, *_unmentioned(expected.problems, config.warnings)),
    )
    _say(done, config.warnings)
    return done


async def _renewed(front: FrontEnd, back: BackEnd, config: Config) -> Devices | None:
    """The devices as this configuration wants them; None if it wants them as before, or they do not answer now."""
    before = front.current.config
    if (config.devices, config.reserve) == (before.devices, before.reserve):
        return None
    return await back.devices.renew(opener(config, front.runtime.environment))


def _unmentioned(problems: Mapping[str, str], warnings: Sequence[str]) -> list[str]:
    """The problems of models of which the warnings, which name their line, have none."""
    return [why for model, why in problems.items() if not any(f": models.{model}." in told for told in warnings)]


def _say(done: Reloaded, warnings: Iterable[str]) -> None:
    """Into the log what ``vllmctl reload`` prints; what can never be loaded is there already."""
    log.info(
        *("configuration reloaded: %d models, added %s, removed %s, changed %s", done.models),
        *(", ".join(names) or "none" for names in (done.added, done.removed, done.changed)),
    )
    for warning in warnings:
        log.warning("%s", warning)
    for path, what in done.later.items():
        log.log(logging.WARNING if what == LATER else logging.INFO, "%s %s", path, what)


def _renamed_engines(engines: Mapping[str, ModelConfig], before: Mapping[str, ModelConfig]) -> dict[str, str]:
    """The new and the old id of each engine that goes on by another one, as the core has it."""
    now, was = _ids(engines), _ids(before)
    pairs = (renamed(was[name], now[name]) for name in now if name in was)
    return {pair[1]: pair[0] for pair in pairs if pair}


def _ids(engines: Mapping[str, ModelConfig]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, engine in engines.items():
        found.setdefault(engine.replica_of or name, []).append(name)
    return found
