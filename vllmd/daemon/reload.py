"""How a daemon that runs goes on with another configuration.

What a reload does with each setting is the column ``reload`` of ``config/settings.py``; here that is made true. The
order matters: the devices come first, because what models will take is reckoned for them, and nothing may be put on a
device that is about to be another one; engines that are adopted come last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from vllmd.config.reload import LATER, in_force
from vllmd.config.replicas import engines_of
from vllmd.config.types import Config, ModelConfig
from vllmd.core import events
from vllmd.core.types import renamed
from vllmd.daemon import startup
from vllmd.daemon.engine_process import fingerprint
from vllmd.daemon.service import Daemon
from vllmd.errors import Conflict
from vllmd.gpu import Devices

log = logging.getLogger("vllmd")


async def take(daemon: Daemon, read: Config, still: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    """Go on with another configuration; engines are stopped only where their own settings changed.

    ``still``: whether that is right, asked when all is reckoned and nothing comes between its answer and the core's
    being told. Raises Conflict, nothing changed, if it is not.

    The answer has what changed of the models, and in ``later`` each setting that is not in force, with what becomes of
    it.
    """
    config, later = in_force(daemon.config, read, activated=daemon.runtime.activated)
    engines, before = engines_of(config.models), daemon.engines
    devices = await _renewed(daemon, config)
    inventory = devices.inventory() if devices else daemon.memory.inventory
    prospects = await asyncio.to_thread(startup.expect, daemon, engines, config, inventory)
    was, repaired = daemon.config.models, bool(daemon.broken)
    known = {**{name: name for name in before}, **_renamed_engines(engines, before)}
    kept = {name: known[name] for name in engines if name in known}
    changed = {name for name, old in kept.items() if fingerprint(engines[name]) != fingerprint(before[old])}
    added, removed = sorted(config.models.keys() - was.keys()), sorted(was.keys() - config.models.keys())
    if not still():
        raise Conflict("it is in use by now")
    daemon.accept(config)
    daemon.engine_manager.relocate(startup.paths_of(daemon, config), config.engines.port_start, config.engines.port_end)
    daemon.engine_manager.configure(engines, startup.estimates(prospects))
    if devices:
        _take_devices(daemon, config, devices)
    daemon.dispatcher.post(events.SettingsChanged(startup.settings_of(config)))
    specs = startup.specs_of(config.models, prospects)
    daemon.control.configure(specs)
    daemon.dispatcher.post(events.ModelsChanged(tuple(specs), frozenset(changed)))
    if devices:
        await daemon.look()
    if repaired:
        await startup.adopt_running(daemon)
    answer = {
        "models": len(config.models),
        "added": added,
        "removed": removed,
        "changed": sorted(changed),
        "later": later,
        "warnings": list(config.warnings),
    }
    _say(answer)
    return answer


async def _renewed(daemon: Daemon, config: Config) -> Devices | None:
    """The devices as this configuration wants them; None if it wants them as before, or they do not answer now."""
    if (config.devices, config.reserve) == (daemon.config.devices, daemon.config.reserve):
        return None
    return await daemon.watch.renew(startup.opener(config, daemon.runtime.environment))


def _take_devices(daemon: Daemon, config: Config, devices: Devices) -> None:
    before = daemon.memory.devices
    daemon.memory.take(devices, startup.files_of(config))
    before.close()
    startup.say_devices(daemon)
    unknown = str(devices.trouble or "")
    daemon.dispatcher.post(events.DevicesChanged(devices.inventory(), unknown, devices.asking))


def _say(answer: Mapping[str, Any]) -> None:
    """Into the log what ``vllmctl reload`` prints."""
    log.info(
        *("configuration reloaded: %d models, added %s, removed %s, changed %s", answer["models"]),
        *(", ".join(answer[kind]) or "none" for kind in ("added", "removed", "changed")),
    )
    for warning in answer["warnings"]:
        log.warning("%s", warning)
    for path, what in answer["later"].items():
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
