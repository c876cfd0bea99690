"""Find what is wrong with this machine, and say what helps.

Looks at Python's packages, systemd, the units, users and directories, the
driver and its device nodes, free space, the configuration and the daemon.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator

from vllmd.api.answers import ModelLine, Status
from vllmd.cli import show, standing
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_UNAVAILABLE, Failure

Finding = tuple[str, str, str]
COLOURS = {"ok": "green", "warning": "yellow", "bad": "red"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    from vllmd.cli.examine import examine
    from vllmd.cli.examined import Host

    host = Host(user=arguments.user)
    of_machine = examine(host)
    known, unfit = "\n".join(what for _, what, _ in of_machine), host.reading.config.unfit
    findings = [*of_machine, *daemon(arguments, known, unfit)]
    if arguments.json:
        keys = ("verdict", "what", "advice")
        print(show.as_json([dict(zip(keys, finding, strict=True)) for finding in findings]))
    else:
        for verdict, what, advice in findings:
            show.say(
                f"{show.paint(f'{verdict:7}', COLOURS[verdict])}  {what}" + (f"; {advice}" if advice else ""), indent=9
            )
    return EX_UNAVAILABLE if any(verdict == "bad" for verdict, _, _ in findings) else 0


def daemon(arguments: argparse.Namespace, known: str, unfit: Collection[str]) -> list[Finding]:
    """Whether the daemon answers, whether its configuration is valid, and which devices and models are not well.

    ``known``: the text of the findings so far, which are not repeated; ``unfit``: the models of which one of them says
    that they can never be loaded.
    """
    try:
        status = Admin(arguments).status(broken=True)
    except Failure as failure:
        return [("bad", failure.message, "")]
    broken = status.configuration.error
    if broken:
        why = "" if all(line in known for line in broken.splitlines()) else f": {broken}"
        return [("bad", f"the daemon runs with an invalid configuration{why}", "repair it, then vllmctl reload")]
    answers = f"the daemon answers; engines are run by {status.backend or '(still opening)'}"
    if status.event_loop:
        answers += f"; its event loop is {status.event_loop}"
    launcher = [("bad", f"the launcher starts and ends no engine: {status.launcher_trouble}", "")]
    failed = (each for each in models(status, unfit) if not is_known(each, known))
    return [("ok", answers, ""), *(launcher if status.launcher_trouble else ()), *devices(status, known), *failed]


def devices(status: Status, known: str = "") -> Iterator[Finding]:
    """Devices that do not answer, or that are avoided and not drained by an operator."""
    if status.trouble and status.trouble.partition(";")[0] not in known:
        yield "bad", f"the devices do not answer: {status.trouble}", ""
    for device in status.devices:
        if device.wedged and not device.drained:
            yield "bad", f"device {device.index} is avoided: {device.wedged}", "vllmctl gpus"


def is_known(finding: Finding, known: str) -> bool:
    """Whether another finding says already that a program is missing."""
    _, what, _ = finding
    name, failed, why = what.partition(" has failed: there is no command ")
    return bool(failed) and f"{name}: there is no command {why.partition(':')[0]}" in known


def models(status: Status, unfit: Collection[str] = ()) -> Iterator[Finding]:
    """Models that have failed, can never be loaded (but for ``unfit``, of which that is known), or miss a replica."""
    for line in status.models:
        name, why = line.name, show.first_line(line.failure)
        if line.state == "error":
            yield "bad", f"{name} has failed: {why}", f"vllmctl why {name}; vllmctl logs {name}"
        elif line.degraded:
            yield "warning", troubles(line), f"vllmctl why {name}"
        elif quiet := standing.silence(line):
            yield (
                "warning",
                f"{name} is {line.state}: {quiet}",
                f"vllmctl logs {name}; vllmctl restart {name} --force",
            )
        elif line.never:
            if name in unfit:
                continue
            yield (
                "bad",
                f"{name} can never be loaded: {line.never}",
                f"vllmctl assign {name} changes its devices and memory",
            )
        elif line.state == "stopped" and why:
            yield "bad", f"{name} cannot be loaded: {why}", ""


def troubles(line: ModelLine) -> str:
    """A sentence with what is wrong with the replicas of a model."""
    failures = [f"{each.name}: {show.first_line(each.failure)}" for each in line.replicas if each.failure]
    return f"{line.name} is degraded, {standing.replicas_of(line).partition(',')[0]}: {'; '.join(failures)}"
