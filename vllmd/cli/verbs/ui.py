"""Print a link that signs in to the page, once, within five minutes.

The page, /ui at the address where vllmd listens, shows the memory, the models, the decisions and their reasons, and
the logs, and does what vllmctl does. The link opens there what the admin socket opens here, for a day, but for the
models: to try one where keys are set, the page asks for a key. Through the read-only socket the link opens what changes
nothing.
"""

from __future__ import annotations

import argparse
import socket
import sys

from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_UNAVAILABLE, Failure


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


def run(arguments: argparse.Namespace) -> int:
    admin = Admin(arguments)
    link = admin.post("/admin/ui/links")
    if not admin.url and not link["listen"]:
        raise Failure("vllmd listens at no address that a browser could open", EX_UNAVAILABLE)
    port = link["listen"][0].rpartition(":")[2] if link["listen"] else ""
    own = f"vllmd.localhost:{port}"  # browsers take it for this machine; engines' own pages have another origin
    here = admin.url.rstrip("/") if "//" in admin.url else f"http://{admin.url or own}"
    if arguments.json:
        print(show.as_json({"url": here + link["path"], "expires_in": link["expires_in"]}))
        return 0
    print(here + link["path"])
    if not admin.url and sys.stdout.isatty():
        show.say(f"From another machine: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}")
    return 0
