"""Show the use by key or model: requests, tokens, seconds of engines and devices.

IN and OUT are tokens.
Days and hours are in UTC, not in local time.
DEVICE is the share of devices' memory that a model held, times seconds; while a
model is idle it counts for the key that used it last.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence

from vllmd.api.answers import Usage, UsageRow
from vllmd.api.codec import fields_of
from vllmd.api.verbs import verb
from vllmd.cli import show
from vllmd.cli.admin import Admin

HEADS = ("REQUESTS", "IN", "CACHED", "OUT", "ENGINE", "DEVICE")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by", default="key", metavar="WHAT", help="key, model, hour, day or month, or several: key,day (default: key)"
    )
    parser.add_argument("--since", default="30d", metavar="TIME", help="12h, 30d or Unix time (default: 30d)")
    parser.add_argument("--until", metavar="TIME", help="the same (default: now)")
    parser.add_argument("-k", "--of-key", metavar="NAME", help="of the key with this name only; - is nobody's")
    parser.add_argument("-m", "--model", help="of this model only")
    parser.add_argument("--csv", action="store_true", help="print CSV with all columns, for a spreadsheet")


def run(arguments: argparse.Namespace) -> int:
    query = {"since": arguments.since, "until": arguments.until, "key": arguments.of_key, "model": arguments.model}
    usage = Admin(arguments).perform(verb("usage"), Usage, {"by": arguments.by, **query})
    if arguments.json:
        print(show.as_json(usage))
        return 0
    if arguments.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        columns = [*usage.by, *(name for name in fields_of(UsageRow) if name not in UsageRow.sparse)]
        writer.writerows([columns, *([plain(row[name]) for name in columns] for row in usage.rows)])
        return 0
    if usage.rows:
        print(table(usage.by, usage.rows))
    else:
        show.say("nothing was used in that time")
    if usage.trouble:
        show.say(usage.trouble, sys.stderr)
    return 0


def table(by: Sequence[str], rows: Sequence[UsageRow]) -> str:
    """The table of use, the largest first, or in the order of time."""
    if not set(by) & {"day", "hour", "month"}:
        rows = sorted(rows, key=lambda row: -(row.prompt + row.answer))
    names = tuple(name.upper() for name in by)
    cells = []
    for row in rows:
        counts = [short(each) for each in (row.requests, row.prompt, row.cached, row.answer)]
        errors = f"{short(row.errors)} error{'s' * (row.errors != 1)}" if row.errors else ""
        estimated = f"{short(row.estimated)} tokens estimated from sizes" if row.estimated else ""
        note = ", ".join(filter(None, (errors, estimated)))
        seconds = (show.age(row.engine_seconds), show.age(row.device_seconds))
        cells.append((*(str(row[name]) or show.EMPTY for name in by), *counts, *seconds, note))
    return show.table((*names, *HEADS, "NOTE"), cells, HEADS, names=names)


def short(number: float) -> str:
    """A number in at most five characters: ``999``, ``12.3k``, ``4.5M``, ``1.2G``."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


def plain(value: object) -> object:
    """A cell of CSV: whole numbers without a point, others with three digits; a text is no formula to a spreadsheet."""
    if isinstance(value, str) and value[:1] in "=+-@\t\r" and value:
        return f"'{value}"
    if isinstance(value, float):
        return int(value) if value.is_integer() else round(value, 3)
    return value
