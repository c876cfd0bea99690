"""Have bodies of requests and answers kept for a time, or see whose are.

Of a model's requests, or a key's; in memory only, files and secrets cut out.
Clients are told by a field of each answer (x-vllmd-recorded). Only
administrators see them, by vllmctl requests show.
With the last recording what is kept goes.
"""

from __future__ import annotations

import argparse

from vllmd.api.answers import Recording, Recordings
from vllmd.api.verbs import verb
from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_USAGE, Failure
from vllmd.cli.values import duration, parse


def _size(text: str) -> int:
    from vllmd.config.value_types import SMALL_SIZE

    return int(parse(SMALL_SIZE, text))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="those of this model")
    parser.add_argument("-k", "--of-key", metavar="NAME", help="those of the key with this name")
    parser.add_argument("--for", dest="seconds", type=duration, metavar="TIME", help="for how long (default: 10m)")
    parser.add_argument("--most", type=_size, metavar="SIZE", help="how much of each body (default: 64KiB)")
    parser.add_argument("--stop", metavar="N", help="end the recording N, or all")


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    wanted = {"model": arguments.model, "key": arguments.of_key, "seconds": arguments.seconds,
              "most_bytes": arguments.most}  # fmt: skip
    given = {name: value for name, value in wanted.items() if value is not None}
    if arguments.stop is not None:
        if given:
            raise Failure("--stop ends one: it takes no other options", EX_USAGE)
        asked = "stop-recording", {"number": None if arguments.stop == "all" else arguments.stop}
    else:
        asked = ("record", given) if given else ("recordings", {})
    told = admin.told(verb(asked[0]), Recordings, asked[1])
    print(show.as_json(told)) if arguments.json else show.say(in_words(told))
    return 0


def in_words(told: Recordings) -> str:
    """Whose bodies are recorded, and what there is."""
    lines = [_line(each) for each in told.recordings] or ["no bodies are recorded"]
    if told.requests:
        lines.append(f"{show.counted(told.requests, 'request')} with bodies, {show.size(told.bytes)}")
    return "\n".join(lines)


def _line(each: Recording) -> str:
    whose = " and ".join(f"the {what} {name}" for what, name in (("model", each.model), ("key", each.key)) if name)
    left = show.age(each.seconds_left)
    return f"{each.number}: bodies of {whose}, {show.size(each.most_bytes)} of each, for {left} yet"
