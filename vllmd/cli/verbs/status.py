"""Show the daemon in a few lines, then the models; or the state of the models named.

Exit status 69 where a model that is named has failed or can never fit, or the
devices or the launcher do not answer, 78 where the daemon runs with an invalid configuration.
"""

from __future__ import annotations

import argparse

from vllmd.api.answers import Status
from vllmd.cli import downloads, models, nothing, show, standing
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_CONFIG, EX_UNAVAILABLE
from vllmd.cli.terminal import wrapped
from vllmd.cli.verbs import info, ps

FACTS = (
    *("version", "process", "event loop", "devices", "requests", "configuration", "configuration error"),
    *("launcher", "not in force", "not written"),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, optional=True)


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    status = admin.status(broken=not arguments.models)
    named = [models.find(status, name) for name in arguments.models]
    if arguments.json:
        print(show.as_json(named if named else status))
    elif named:
        for line in named:
            show.say(standing.now(line, made=True))
    else:
        print(overview(status, admin.url or admin.path))
    if status.configuration.error:
        return EX_CONFIG
    return EX_UNAVAILABLE if status.trouble or status.launcher_trouble or any(map(standing.is_broken, named)) else 0


def overview(status: Status, where: str) -> str:
    """The daemon, then its models."""
    facts = info.facts(status, where)
    parts = [show.pairs({name: facts[name] for name in FACTS if name in facts})]
    if status.trouble:
        parts[0] += f"\nthe devices do not answer: {status.trouble}"
    if status.models:
        parts.append(ps.table(status.models))
    elif not status.configuration.error:
        parts.append("\n".join(wrapped(text, show.columns()) for text in nothing.advice(status)))
    if fetching := downloads.under_way(status):
        parts.append("\n".join(wrapped(text, show.columns()) for text in fetching))
    return "\n\n".join(parts)
