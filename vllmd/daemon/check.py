"""``vllmd --check``: the configuration, and whether each of its models, and its engine's program, can work here."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from vllmd.config.replicas import engines_of, is_this_host, of_this_host
from vllmd.config.types import Config
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.expectations import find_devices
from vllmd.daemon.homes import Homes
from vllmd.daemon.preflight import Machine, doubtful, look, wrong
from vllmd.engines.programs import system_daemon_is_meant, troubles
from vllmd.sizes import in_words as size

EX_CONFIG = 78
# As vllmd.service says.
SYSTEM_HOME, SYSTEM_RUN_DIR = Path("/var/lib/vllmd-engine"), Path("/run/vllmd-engine")
SYSTEM_HOMES = Path("/var/lib/vllmd-engines")


def check(config: Config, environment: Mapping[str, str]) -> int:
    """Print what is wrong, what is doubtful and what each model will take; returns an exit status."""
    machine = _machine(config, environment)
    config, elsewhere = of_this_host(config, is_this_host)
    for name in elsewhere:
        print(f"{name} is left out: it is meant for another machine", file=sys.stderr)
    prospects = look(engines_of(config.models).values(), machine, EngineResolver(quiet=True))
    for warning in [*config.warnings, *doubtful(prospects, machine)]:
        print(f"warning: {warning}", file=sys.stderr)
    absent = troubles(engines_of(config.models).values(), system=system_daemon_is_meant())
    mistakes = [*wrong(prospects), *map(str, absent)]
    for mistake in mistakes:
        print(mistake, file=sys.stderr)
    if mistakes:
        return EX_CONFIG
    files = ", ".join(map(str, config.files)) or "no files"
    print(f"valid: {len(config.models)} models ({', '.join(config.models) or 'none'}), read from {files}")
    for each in prospects:
        if machine.devices:
            print(f"{each.model.name}: {size(each.estimate.footprint.awake)} per device: {each.estimate.why}")
    return 0


def _machine(config: Config, environment: Mapping[str, str]) -> Machine:
    """The machine as the daemon will find it; root without options means the system's own daemon."""
    root = os.geteuid() == 0
    home = environment.get("VLLMD_ENGINE_HOME") or (SYSTEM_HOME if root and SYSTEM_HOME.is_dir() else None)
    own = environment.get("VLLMD_ENGINE_HOMES") or (SYSTEM_HOMES if root else None)
    shared = config.engines.home or (Path(home) if home else None)
    homes = Homes(shared, Path(own) if own else None, environment)
    run_dir = config.engines.run_dir or Path(environment.get("VLLMD_ENGINE_RUN_DIR") or SYSTEM_RUN_DIR)
    devices = asyncio.run(find_devices(config, environment))
    return Machine(devices.inventory(), homes, run_dir)
