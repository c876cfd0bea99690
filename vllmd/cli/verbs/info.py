"""Show the daemon: version, process, policy, devices, memory, configuration."""

from __future__ import annotations

import argparse
from collections import Counter

from vllmd.api.answers import Status
from vllmd.cli import show
from vllmd.cli.admin import Admin


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    status = admin.status(broken=True)
    if arguments.json:
        print(show.as_json({key: value for key, value in vars(status).items() if key != "models"}))
    else:
        print(show.pairs(facts(status, admin.url or admin.path)))
    return 0


def facts(status: Status, where: str) -> dict[str, object]:
    """The daemon's state as names and values. ``where``: the address of its admin API."""
    host, config = status.host_memory, status.configuration
    promised = show.size(host.promised) if host.promised else 0
    states = Counter(line.state for line in status.models)
    shown: dict[str, object] = {
        "version": status.version,
        "process": f"{status.pid}, for {show.age(status.uptime)}",
        "admin API": where,
        "engines run by": status.backend or "(still opening)",
        **({"event loop": status.event_loop} if status.event_loop else {}),  # an older daemon tells none
        "policy": status.policy,
        "devices": f"{len(status.devices)}" + (f", from {status.source}" if status.source else ""),
        "host memory": f"{promised} of {show.size(host.budget)} for sleeping models",
        "models": ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none",
        "requests": f"{status.requests} on {show.counted(status.connections, 'connection')}",
        "configuration": ", ".join(config.files) or "no files; the defaults",
    }
    if status.launcher_trouble:
        shown["launcher"] = f"no engine starts or ends: {status.launcher_trouble}"
    if status.unwritten:
        shown["not written"] = f"{status.unwritten} (df; vllmctl doctor)"
    if config.error:
        shown["configuration error"] = config.error
    elif config.refused:
        shown["not in force"] = f"the files as they are now; a restart would serve no model: {config.refused}"
    return shown
