"""Show the models: state, devices, memory, requests, and why one waits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from vllmd.api.answers import ModelLine, Status
from vllmd.cli import downloads, nothing, show, standing
from vllmd.cli.admin import Admin
from vllmd.text import shortened

HEAD = ("MODEL", "STATE", "DEVICES", "MEMORY", "ACTIVE", "QUEUED", "IDLE", "NOTE")
CAUSE = 240  # columns of a failure that are shown; vllmctl why has all of it
RIGHT = ("MEMORY", "ACTIVE", "QUEUED", "IDLE")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p",
        "--power",
        action="store_true",
        help="show watts, each one's share of its devices', and what it has drawn since its last request",
    )
    parser.add_argument(
        "-s", "--starts", action="store_true", help="show where the time of each one's start goes or went"
    )
    parser.add_argument("-r", "--running", action="store_true", help="leave out models that are stopped")


def run(arguments: argparse.Namespace) -> int:
    status = Admin(arguments).status()
    models: Sequence[ModelLine] = status.models
    if arguments.running:
        models = [line for line in models if line.state != "stopped"]
    if arguments.json:
        print(show.as_json(models))
    elif models:
        print(starts(models) if arguments.starts else table(models, power=arguments.power))
    elif arguments.running:
        print("no model is loaded")
    else:
        for text in nothing.advice(status):
            show.say(text)
    for text in [] if arguments.json else [*downloads.under_way(status), *standbys(status)]:
        show.say(text)
    return 0


def standbys(status: Status) -> list[str]:
    """A line for each engine that is kept ready."""
    return [f"standby of {one.program}: {one.state}, {show.size(one.memory)}" for one in status.standbys or ()]


def table(models: Sequence[ModelLine], *, power: bool = False) -> str:
    """A row for each model, and below it one for each of its replicas; ``power``: what they draw, not their queues."""
    lines = [line for model in models for line in (model, *replicas(model))]
    if not power:
        return show.table(HEAD, [row(line) for line in lines], RIGHT, names=("MODEL",))
    head = (*HEAD[:4], "IDLE", "POWER", "UNUSED", "NOTE")  # all of them do not fit on a terminal
    rows = [
        (*cells[:4], show.age(line.idle), _watts(line), _unused(line), cells[-1])
        for line in lines
        for cells in (row(line),)
    ]
    return show.table(head, rows, ("MEMORY", "IDLE", "POWER", "UNUSED"), names=("MODEL",))


def starts(models: Sequence[ModelLine]) -> str:
    """A row for each engine: how long its last start took, and where its time goes or went."""
    lines = [line for model in models for line in (replicas(model) and (model, *replicas(model))) or (model,)]
    rows = [(line.name, show.state(line.state), show.age(line.last_start_seconds), show.phases(line) or show.EMPTY)
            for line in lines]  # fmt: skip
    return show.table(("MODEL", "STATE", "LAST START", "OF WHICH"), rows, ("LAST START",), names=("MODEL",))


def _watts(line: ModelLine) -> str:
    """Of a model with replicas their sum."""
    told = [each.power for each in line.replicas or (line,) if each.power is not None]
    return f"{sum(told):.0f}W" if told else show.EMPTY


def _unused(line: ModelLine) -> str:
    """Watt-hours that it has drawn since its last request; of a model with replicas their sum."""
    told = [each.unused_energy for each in line.replicas or (line,) if each.unused_energy]
    return f"{sum(told) / 3600:.1f}Wh" if told else show.EMPTY


def replicas(model: ModelLine) -> list[ModelLine]:
    """The lines of its replicas, called by what stands behind the model's name."""
    return [replace(line, name=f"  {line.name.removeprefix(model.name)}") for line in model.replicas]


def row(line: ModelLine) -> tuple[str, ...]:
    """A model, or a replica of one, as a row of the table."""
    return (
        line.name,
        show.state(line.state),
        show.numbers(line.devices),
        show.size(line.memory),
        str(line.in_flight),
        _queue(line),
        show.age(line.idle),
        note(line),
    )


def _excess(line: ModelLine) -> str:
    """That an engine, measured, takes more memory than its settings or its files made us expect."""
    more = line.state == "running" and line.expected and line.memory > 1.01 * line.expected
    return f"measured, more than the {show.size(line.expected)} expected" if more else ""


def _pin(line: ModelLine) -> str:
    """That it is pinned; of one that is down, as after a drain, what brings it back: no rule does."""
    down = line.state == "stopped" and not (line.disabled or line.never or line.waiting_for)
    back = ", and not loaded before its next request or vllmctl start" if down else ""
    return f"pinned{back}" if line.pinned else ""


def _queue(line: ModelLine) -> str:
    oldest = line.oldest_wait
    return f"{line.queued} ({show.age(oldest)})" if line.queued and oldest is not None else str(line.queued)


def note(line: ModelLine) -> str:
    """What is remarkable about it: phase of a start, pin, leases, why its requests wait, why it failed."""
    parts = [show.phase(line)]
    parts.append(standing.replicas_of(line))
    parts.append(standing.silence(line))
    parts.append(_excess(line))
    parts.append(f"disabled: {line.disabled}" if line.disabled else "")
    parts.append(_pin(line))
    parts.append(f"leased to {', '.join(line.leases)}" if line.leases else "")
    parts.append(line.waiting_for)
    parts.append("" if line.replicas or not line.never else f"can never be loaded: {line.never}")
    parts.append("" if line.replicas else shortened(show.first_line(line.failure), CAUSE))  # else its replicas have it
    return "; ".join(part for part in parts if part)
