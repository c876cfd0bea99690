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
    if status.launcher_trouble and not arguments.json:
        show.say(f"no engine starts or ends, because of the launcher: {status.launcher_trouble}")
    for text in [] if arguments.json else [*downloads.under_way(status), *standbys(status)]:
        show.say(text)
    return 0


def standbys(status: Status) -> list[str]:
    """A line for each engine that is kept ready."""
    return [f"standby of {one.program}: {one.state}, {show.size(one.memory)}" for one in status.standbys or ()]


def table(models: Sequence[ModelLine], *, power: bool = False) -> str:
    """A row for each model and each of its replicas; with ``power`` what they draw in place of their queues."""
    lines = [line for model in models for line in (model, *replicas(model))]
    if not power:
        return show.table(HEAD, [row(line) for line in lines], RIGHT, names=("MODEL",))
    head = (*HEAD[:4], "IDLE", "POWER", "UNUSED", "NOTE")  # all columns together do not fit on a terminal
    rows = []
    for line in lines:
        engines, cells = line.replicas or (line,), row(line)  # a model with replicas has the sum of theirs
        watts = [each.power for each in engines if each.power is not None]
        joules = [each.unused_energy for each in engines if each.unused_energy]
        power_cell = f"{sum(watts):.0f}W" if watts else show.EMPTY
        unused = f"{sum(joules) / 3600:.1f}Wh" if joules else show.EMPTY
        rows.append((*cells[:4], show.age(line.idle), power_cell, unused, cells[-1]))
    return show.table(head, rows, ("MEMORY", "IDLE", "POWER", "UNUSED"), names=("MODEL",))


def starts(models: Sequence[ModelLine]) -> str:
    """A row for each engine: how long its last start took, and the phases of it or of the one under way."""
    lines = [line for model in models for line in (replicas(model) and (model, *replicas(model))) or (model,)]
    rows = [(line.name, show.state(line.state), show.age(line.last_start_seconds), show.phases(line) or show.EMPTY)
            for line in lines]  # fmt: skip
    return show.table(("MODEL", "STATE", "LAST START", "OF WHICH"), rows, ("LAST START",), names=("MODEL",))


def replicas(model: ModelLine) -> list[ModelLine]:
    """The lines of a model's replicas, each named by what stands behind the model's name."""
    return [replace(line, name=f"  {line.name.removeprefix(model.name)}") for line in model.replicas]


def row(line: ModelLine) -> tuple[str, ...]:
    """A model, or a replica of one, as a row of the table."""
    oldest = f" ({show.age(line.oldest_wait)})" if line.queued and line.oldest_wait is not None else ""
    return (
        line.name,
        show.state(line.state),
        show.numbers(line.devices),
        show.size(line.memory),
        str(line.in_flight),
        f"{line.queued}{oldest}",
        show.age(line.idle),
        note(line),
    )


def note(line: ModelLine) -> str:
    """The phase of a start, replicas, pin, leases, why requests wait, why the model failed."""
    parts = [show.phase(line)]
    parts.append(standing.replicas_of(line))
    parts.append(standing.silence(line))
    if line.state == "running" and line.expected and line.memory > 1.01 * line.expected:
        parts.append(f"measured, more than the {show.size(line.expected)} expected")
    parts.append(f"disabled: {line.disabled}" if line.disabled else "")
    # A pinned model that is down, as after a drain, is brought back by no rule.
    is_down = line.state == "stopped" and not (line.disabled or line.never or line.waiting_for)
    back = ", and not loaded before its next request or vllmctl start" if is_down else ""
    parts.append(f"pinned{back}" if line.pinned else "")
    parts.append(f"leased to {', '.join(line.leases)}" if line.leases else "")
    parts.append(line.waiting_for)
    parts.append("" if line.replicas or not line.never else f"can never be loaded: {line.never}")
    parts.append("" if line.replicas else shortened(show.first_line(line.failure), CAUSE))  # else its replicas have it
    return "; ".join(part for part in parts if part)
