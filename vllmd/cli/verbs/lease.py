"""Keep a model for a time, or until the lease is given back.

A model with a lease is not evicted and does not sleep. After the lease its idle
rules apply again. A lease of the same name replaces the earlier one.
"""

from __future__ import annotations

import argparse
import getpass

from vllmd.api.verbs import verb
from vllmd.cli import models, show
from vllmd.cli.admin import Admin
from vllmd.cli.values import duration


def arguments(parser: argparse.ArgumentParser) -> None:
    models.argument(parser, many=False)
    parser.add_argument("--name", default=getpass.getuser(), help="name of the lease (default: your user name)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--for", dest="time", type=duration, metavar="TIME", help="such as 30m (default: until released)")
    what.add_argument("--release", action="store_true", help="give it back")
    parser.add_argument("--stop", action="store_true", help="with --release: the last lease to go stops the model")


def run(arguments: argparse.Namespace) -> int:
    admin, which = Admin(arguments), {"model": arguments.model, "lease": arguments.name}
    if arguments.release:
        line = admin.ask(verb("release"), {**which, "stop": arguments.stop})
        text = f"{arguments.model}: lease {arguments.name} is given back"
    else:
        line = admin.ask(verb("lease"), {**which, "seconds": arguments.time})
        until = f"for {show.age(arguments.time)}" if arguments.time is not None else "until it is given back"
        text = f"{arguments.model}: lease {arguments.name} holds {until}"
    if arguments.json:
        print(show.as_json(line))
    else:
        show.say(text)
    return 0
