"""Applies another configuration to a running daemon.

What a reload does with each setting is the column ``reload`` of ``config/settings.py``; here that is carried out. The
order matters. The devices come first, because the models' footprints are estimated for them, and nothing may be put on
a device that is about to be another one. The core decides whether the configuration is taken at all; only then does
every other part take it, before the core's commands start engines by it. Engines that are adopted come last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable, Mapping

from vllmd.api.answers import Reloaded
from vllmd.config.reload import LATER, in_force
from vllmd.config.types import Config, ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import renamed
from vllmd.daemon.back_end import BackEnd
from vllmd.daemon.device_readings import devices_found
from vllmd.daemon.engine_process import EngineProcess, fingerprint, is_outdated
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

    ``unless_used``: models, or replicas by id. Raises Conflict, nothing changed, if the core finds one of them in use.
    The answer has what changed of the models, and in ``later`` the settings that are not in force, and why.
    """
    # 1. What is to be in force: the settings that a running daemon can take, the devices, each model's footprint.
    current = front.current
    config, later = in_force(current.config, read, activated=front.runtime.activated)
    devices, devices_changed = await _renewed_devices(front, back, config), None
    inventory = back.memory.inventory
    if devices:
        inventory = devices.inventory()
        devices_changed = devices_found(devices)
    expected = await expect(config, front.runtime, inventory, front.resolver, back.dispatcher.scheduler.specs)
    # 2. What that changes.
    engines, engines_before, models_before = expected.engines, current.engines, current.config.models
    # In a thread: with ten thousand models this takes up to half a second, in which streams would stand still.
    changed = await asyncio.to_thread(_outdated, engines, engines_before, dict(back.engines.processes))
    was_broken = bool(current.broken)

    def answered(answer: commands.Answer) -> None:
        if answer.refused:
            raise Conflict(answer.refused)
        front.accept(config, adopting=was_broken)
        back.engines.relocate(expected.paths, config.engines.port_start, config.engines.port_end)
        back.engines.configure(engines, expected.estimates)
        back.engines.standbys.configure(config.engines.standby, engines.values())
        front.gate.learn_kinds(expected.kinds)
        if devices:
            old = back.memory.devices
            back.memory.use_devices(devices, files_of(config))
            old.close()
            log_devices(back.memory)

    # 3. The core takes it, and with the core everything else (``answered``); then the core's commands are executed.
    settings = settings_of(config, inventory)
    back.ask(events.ModelsChanged(expected.specs, frozenset(changed), devices_changed, settings, unless_used), answered)
    # 4. What operators have disabled, in the same turn of the loop, so that no request comes before: a model may be new
    #    here, or its file may have been mended.
    names = {*config.models, *engines}
    if not was_broken:
        for order in front.disabled.orders(names):
            back.post(order)
    # It is in force, wholly. What follows takes turns of the loop of its own: streams go on between.
    await asyncio.sleep(0)
    if not was_broken:
        await front.disabled.remove(*({*models_before, *engines_before} - names))
    # 5. The devices' memory; and with a configuration that could not be used before, the engines that run already.
    if devices:
        await back.readings.look()
    if was_broken:
        await adopt_running(front, back)
    await asyncio.sleep(0)
    added, removed = sorted(config.models.keys() - models_before), sorted(models_before.keys() - config.models)
    warnings = (*config.warnings, *_unmentioned(expected.problems, config.unfit))
    done = Reloaded(len(config.models), tuple(added), tuple(removed), tuple(sorted(changed)), later, warnings)
    _log(done, config.warnings)
    return done


def _unmentioned(problems: Mapping[str, str], warned_of: Collection[str]) -> list[str]:
    """The problems of models, which are in the log already, without those of which a warning names the line."""
    return [why for model, why in problems.items() if model not in warned_of]


def _outdated(
    engines: Mapping[str, ModelConfig], before: Mapping[str, ModelConfig], processes: Mapping[str, EngineProcess]
) -> set[str]:
    """The ids of engines to be replaced: their settings differ, or another version of their program is in use."""
    # An engine whose model gets replicas, or loses them, goes on by another id.
    ids, ids_before = _ids_by_model(engines), _ids_by_model(before)
    pairs = [renamed(ids_before[model], ids[model]) for model in ids if model in ids_before]
    old_ids = {**{name: name for name in before}, **{pair[1]: pair[0] for pair in pairs if pair}}
    outdated = set()
    for name, engine in engines.items():
        if (old := old_ids.get(name)) is None:
            continue
        # Most are the same object (``config.reload.shared``).
        is_other = engine is not before[old] and fingerprint(engine) != fingerprint(before[old])
        if is_other or (old in processes and is_outdated(processes[old], engine)):
            outdated.add(name)
    return outdated


def _ids_by_model(engines: Mapping[str, ModelConfig]) -> dict[str, list[str]]:
    ids: dict[str, list[str]] = {}
    for name, engine in engines.items():
        ids.setdefault(engine.replica_of or name, []).append(name)
    return ids


async def _renewed_devices(front: FrontEnd, back: BackEnd, config: Config) -> Devices | None:
    """The devices as this configuration wants them; None if it wants them as before, or they do not answer now."""
    before = front.current.config
    if (config.devices, config.reserve) == (before.devices, before.reserve):
        return None
    return await back.devices.renew(opener(config, front.runtime.environment))


def _log(done: Reloaded, warnings: Iterable[str]) -> None:
    """Log what ``vllmctl reload`` prints; the problems of models are in the log already."""
    log.info(
        *("configuration reloaded: %d models, added %s, removed %s, changed %s", done.models),
        *(", ".join(names) or "none" for names in (done.added, done.removed, done.changed)),
    )
    for warning in warnings:
        log.warning("%s", warning)
    for path, what in done.later.items():
        log.log(logging.WARNING if what == LATER else logging.INFO, "%s %s", path, what)
