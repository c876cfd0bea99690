"""Record bodies of requests and answers for a time, or show the recordings.

Those of a model's requests, or a key's; in memory only, without files and
secrets. Each recorded answer has the field x-vllmd-recorded. Only
administrators see the bodies, by vllmctl requests show. The end of the last
recording removes all of them.
"""

from __future__ import annotations

import argparse

from vllmd.api.answers import Recordings
from vllmd.api.verbs import verb
from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_USAGE, Failure
from vllmd.cli.values import duration, parse


def body_size(text: str) -> int:
    """Bytes from 64KiB, as in the configuration; for argparse."""
    from vllmd.config.value_types import SMALL_SIZE

    return int(parse(SMALL_SIZE, text))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="those of this model")
    parser.add_argument("-k", "--of-key", metavar="NAME", help="those of the key with this name")
    parser.add_argument("--for", dest="seconds", type=duration, metavar="TIME", help="for how long (default: 10m)")
    parser.add_argument("--most", type=body_size, metavar="SIZE", help="how much of each body (default: 64KiB)")
    parser.add_argument("--stop", metavar="N", help="end the recording N, or all")


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    options = {"model": arguments.model, "key": arguments.of_key, "seconds": arguments.seconds,
               "most_bytes": arguments.most}  # fmt: skip
    given = {name: value for name, value in options.items() if value is not None}
    if arguments.stop is not None:
        if given:
            raise Failure("--stop ends one: it takes no other options", EX_USAGE)
        name, given = "stop-recording", {"number": None if arguments.stop == "all" else arguments.stop}
    else:
        name = "record" if given else "recordings"
    answer = admin.perform(verb(name), Recordings, given)
    print(show.as_json(answer)) if arguments.json else show.say(in_words(answer))
    return 0


def in_words(answer: Recordings) -> str:
    """A line for each recording, and one for the bodies that are kept."""
    lines = []
    for each in answer.recordings:
        parts = (("model", each.model), ("key", each.key))
        whose = " and ".join(f"the {what} {name}" for what, name in parts if name)
        size, left = show.size(each.most_bytes), show.age(each.seconds_left)
        lines.append(f"{each.number}: bodies of {whose}, {size} of each, for {left} yet")
    lines = lines or ["no bodies are recorded"]
    if answer.requests:
        lines.append(f"{show.counted(answer.requests, 'request')} with bodies, {show.size(answer.bytes)}")
    return "\n".join(lines)
