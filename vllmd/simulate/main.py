"""``vllmctl simulate``: what would this configuration do with that trace?"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from vllmd.core.costs import CostBook
from vllmd.errors import ConfigError, VllmdError
from vllmd.simulate.baselines import ALL
from vllmd.simulate.physics import Physics
from vllmd.simulate.planned import machine_of, names_of, read_config
from vllmd.simulate.plot import plot
from vllmd.simulate.report import Report
from vllmd.simulate.show import as_json, text
from vllmd.simulate.trace import TraceError, load_trace, of_these
from vllmd.simulate.world import Warm, freezing, simulate

EX_USAGE, EX_DATAERR, EX_UNAVAILABLE, EX_CONFIG = 64, 65, 69, 78
FREEZE = "+freeze"

EPILOG = f"""
A trace is CSV (its first line names the columns) or JSON lines with time
(seconds), model, prompt and output (tokens) and, if wanted, key (the API key).
With --recorded it is the daemon's own traffic (records.usage).
Policies: {", ".join(ALL)}. With {FREEZE} appended, running requests may be
frozen (preempt: true for all that can sleep). Times of starts, wakes and sleeps
are a fit to vLLM on an A100 by the size of the weights.
"""


Recorded = Callable[[argparse.Namespace], AbstractContextManager[str]]


def run_cli(
    argv: Sequence[str],
    working: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    recorded: Recorded | None = None,
) -> int:
    """Run, and print; returns an exit status of sysexits(3). ``working``: entered, with a word, for what takes time.

    ``recorded`` fetches the daemon's own traffic for these options: a trace's path, for as long as it is entered.
    """
    parser = _parser()
    try:
        options = parser.parse_args(argv)
        if (options.trace is None) == (options.recorded is None):
            parser.error("one of --trace and --recorded is needed")
    except SystemExit as exit_:
        return EX_USAGE if exit_.code else 0
    try:
        if options.recorded is not None and recorded is not None:
            with recorded(options) as path, working("simulating"):
                reports = _run(options, path)
        else:
            with working("simulating"):
                reports = _run(options, options.trace)
        print(as_json(reports) if options.json else text(reports, options.models, _columns()))
        if options.plot:
            plot(reports, options.plot)
    except VllmdError as error:
        print(f"vllmctl simulate: {error.message}", file=sys.stderr)
        if isinstance(error, ConfigError):
            return EX_CONFIG
        return EX_DATAERR if isinstance(error, TraceError) else EX_UNAVAILABLE
    return 0


def _columns() -> int | None:
    """How wide a line may be; None where no terminal is."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None if sys.stdout.isatty() else None
    except (OSError, ValueError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllmctl simulate",
        description="Replay a trace through the scheduler under a virtual clock.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="the configuration (default: the daemon's)")
    add("-t", "--trace", metavar="FILE", help="the requests")
    add("-r", "--recorded", metavar="TIME", help="the requests that the daemon has had in that time, such as 7d")
    add("--socket", metavar="PATH", help="the daemon's admin socket, for --recorded")
    add("--user", action="store_true", help="the vllmd of systemctl --user")
    add("--url", help="the daemon over HTTP, such as http://gpu1:33258; needs a key with the scope read")
    add("--key", help="API key for --url (default: $VLLMD_API_KEY)")
    add("-p", "--policy", metavar="NAMES", help="one or more, separated by commas (default: the configured one)")
    add("--devices", metavar="SIZES", default="", help="what if: these devices, such as 80GiB,80GiB")
    add("--host-memory", metavar="SIZE", default="", help="what if: so much host memory for level-1 sleepers")
    add("--warm", choices=[each.value for each in Warm], default=Warm.STOPPED.value, help="how engines are at first")
    add("--seed", type=int, default=0, help="of the noise on the times of starts, wakes and sleeps (default: 0)")
    add("--no-models", dest="models", action="store_false", help="only the comparison, without a table per policy")
    add("--json", action="store_true", help="everything as JSON, the memory over time included")
    add("--plot", metavar="FILE", help="draw memory, queues and waits; the name says the format (.png, .svg, .pdf)")
    return parser


def _run(options: argparse.Namespace, path: str) -> list[Report]:
    config = read_config(options.config, [size for size in options.devices.split(",") if size], options.host_memory)
    policies = _policies(options.policy or config.policy)
    machine = machine_of(config, Physics(seed=options.seed), Warm(options.warm))
    names = names_of(config)
    if options.recorded is None:
        trace = load_trace(path, names)
    else:  # a model that was asked for then may be gone by now, or is not in this configuration yet
        trace, gone = of_these(load_trace(path), names)
        if gone:
            print(f"left out, for this configuration does not have them: {', '.join(gone)}", file=sys.stderr)
        if not trace:
            raise TraceError("nothing was recorded in that time of the models of this configuration")
    reports = []
    for name in policies:
        specs = freezing(machine.specs) if name.endswith(FREEZE) else machine.specs
        machine = replace(machine, costs=CostBook())  # each policy learns for itself
        reports.append(simulate(replace(machine, specs=specs), trace, ALL[name.removesuffix(FREEZE)], name))
    return reports


def _policies(names: str) -> list[str]:
    policies = [name.strip() for name in names.split(",") if name.strip()]
    for name in policies:
        if name.removesuffix(FREEZE) not in ALL:
            near = difflib.get_close_matches(name, ALL, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ALL)}"
            raise ConfigError(f"--policy: there is no policy {name!r}; {hint}")
    return policies
