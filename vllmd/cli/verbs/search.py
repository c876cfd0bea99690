"""Search the hub for models, the most downloaded first. pull and run take the names that it shows."""

from __future__ import annotations

import argparse
import http.client
import os
import urllib.error
import urllib.request
from urllib.parse import urlencode

from vllmd.api.json_types import ForeignJson
from vllmd.cli import show
from vllmd.cli.admin import Admin, decoded
from vllmd.cli.failures import EX_UNAVAILABLE, Failure

HUB = "https://huggingface.co"
HEAD = ("MODEL", "FETCHED", "LIKES", "FOR")
LIMIT_SECONDS = 15.0
LARGEST_ANSWER_BYTES = 4 << 20


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="+", metavar="WORD", help="in the model's name")
    parser.add_argument("--gguf", action="store_true", help="only repositories with GGUF files, for llama.cpp")
    parser.add_argument("-n", "--number", type=int, default=20, metavar="N", help="at most so many (default: 20)")


def run(arguments: argparse.Namespace) -> int:
    hub = os.environ.get("HF_ENDPOINT") or configured_hub(arguments) or HUB
    repositories = ask(hub.rstrip("/"), " ".join(arguments.words), arguments.number, gguf=arguments.gguf)
    if arguments.json:
        print(show.as_json(repositories))
    elif repositories:
        rows = [row(one) for one in repositories]
        print(show.table(HEAD, rows, ("FETCHED", "LIKES"), names=("MODEL",), beneath=()))
    else:
        show.say(f"{hub} has no model with {' '.join(arguments.words)!r} in its name")
    return 0


def configured_hub(arguments: argparse.Namespace) -> str:
    """The hub in the daemon's configuration; "" where there is none, or no daemon."""
    try:
        return str(Admin(arguments).get("/admin/store").get("hub") or "")
    except Failure:
        return ""


def ask(hub: str, words: str, number: int, *, gguf: bool) -> list[ForeignJson]:
    """The hub's repositories with these words in their names. Raises Failure where it cannot be reached."""
    query = {"search": words, "sort": "downloads", "direction": -1, "limit": max(1, min(100, number))}
    target = f"{hub}/api/models?{urlencode({**query, **({'filter': 'gguf'} if gguf else {})})}"
    try:
        with urllib.request.urlopen(target, timeout=LIMIT_SECONDS) as answer:
            found = decoded(answer.read(LARGEST_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        raise Failure(f"{hub} answered {error.code}; try again later", EX_UNAVAILABLE) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        raise Failure(f"{hub} cannot be reached from here: {why}. {without_hub()}", EX_UNAVAILABLE) from None
    return [one for one in found if isinstance(one, dict) and one.get("id")] if isinstance(found, list) else []


def without_hub() -> str:
    """A sentence on models that can be had without a hub."""
    from vllmd.store.known import KNOWN

    names = ", ".join(name for name, known in KNOWN.items() if known.wheel)
    return f"Without a hub there are {names}, from the Python index, and vllmctl add for files that are here"


def row(one: ForeignJson) -> tuple[str, ...]:
    """A line of the table."""
    return str(one["id"]), _short(one.get("downloads")), _short(one.get("likes")), str(one.get("pipeline_tag") or "-")


def _short(number: object) -> str:
    if not isinstance(number, int):
        return show.EMPTY
    for power, unit in ((6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.3g}{unit}"
    return str(number)
