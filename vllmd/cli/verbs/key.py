"""Make, list, limit and revoke API keys; each change counts at once.

"key create NAME" prints the key, this once: only its SHA-256 is kept, in a file
of the daemon's own. From the first key on every request needs one.
"key limit NAME" changes what is named and nothing else; none takes a limit away.
Keys of the configuration are shown, and changed there.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping

from vllmd.api.answers import KeyLine, Keys, NewKey
from vllmd.api.verbs import verb
from vllmd.cli import show
from vllmd.cli.admin import Admin
from vllmd.cli.failures import EX_USAGE, Failure

WORDS = ("create", "list", "revoke", "limit")
LIMITS = {  # option -> setting, and what it says
    "concurrency": "requests at a time",
    "requests-per-minute": "requests per minute",
    "tokens-per-minute": "tokens in and out per minute",
    "tokens-per-day": "tokens per day (UTC)",
    "tokens-per-month": "tokens per month",
    "device-seconds-per-day": "seconds of devices per day, by the share of memory that is held",
    "device-seconds-per-month": "the same per month",
    "priority": "higher ones are served first where requests wait (default: 0)",
    "share": "turns to one of others of its priority (default: 1)",
}
FIRST = "this is the first key: from now on every request needs one, as 'Authorization: Bearer KEY'"
HEAD = ("NAME", "SCOPES", "MODELS", "LIMITS", "NOTE")


def count_or_none(text: str) -> int | None:
    """A limit on the command line: a whole number, or None for the words none and unlimited."""
    if text in ("none", "unlimited"):
        return None
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor none")
    return int(text)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("word", choices=WORDS, metavar="create|list|revoke|limit", help="what to do")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the key: whose it is")
    parser.add_argument(
        "--scopes", metavar="LIST", help="of models, read, admin, with commas between (default: models)"
    )
    parser.add_argument("--models", metavar="LIST", help="the only models that it may use, with commas between")
    for option, about in LIMITS.items():
        parser.add_argument(f"--{option}", type=count_or_none, default=argparse.SUPPRESS, metavar="N", help=about)


def run(arguments: argparse.Namespace) -> int:
    admin, word, name = Admin(arguments), arguments.word, arguments.name
    given = settings(arguments)
    if (word == "list") != (name is None):
        raise Failure("key list takes no name" if name else f"say whose: vllmctl key {word} NAME", EX_USAGE)
    if given and word not in ("create", "limit"):
        raise Failure(f"key {word} takes no limits", EX_USAGE)
    if word == "create":
        return create(admin, arguments, given)
    if word == "limit":
        if not given:
            raise Failure("say what to change, such as --tokens-per-day 1000000", EX_USAGE)
        answer = Keys((admin.perform(verb("limit_key"), KeyLine, {"name": name, "settings": given}),))
        warn_of_unknown_models(admin, given)
    elif word == "list":
        answer = admin.perform(verb("keys"), Keys, {})
    else:
        answer = admin.perform(verb("revoke_key"), Keys, {"name": name})
    if arguments.json:
        print(show.as_json(answer))
    elif word == "revoke":
        show.say(f"{name} opens nothing any more")
    elif answer.keys:
        rows = [row(each) for each in answer.keys]
        print(show.table(HEAD, rows, names=("NAME",), beneath=("MODELS", "LIMITS", "NOTE")))
    else:
        show.say(
            "there are no keys: every client that reaches vllmd may use the models; vllmctl key create NAME makes one"
        )
    return 0


def create(admin: Admin, arguments: argparse.Namespace, given: Mapping[str, object]) -> int:
    """Make a key and print its text; warn where the key changes more than its owner may think."""
    made = admin.perform(verb("create_key"), NewKey, {"name": arguments.name, "settings": given})
    print(show.as_json(made) if arguments.json else made.key, flush=True)
    # The first key locks out every client without one, the administrator's own programs included.
    if len(admin.perform(verb("keys"), Keys, {}).keys) == 1:
        show.say(FIRST, sys.stderr)
    warn_of_unknown_models(admin, given)
    return 0


def warn_of_unknown_models(admin: Admin, given: Mapping[str, object]) -> None:
    """Warn of names that no model has: such a model may be yet to come, but more often the name is misspelt."""
    names = given.get("models")
    if isinstance(names, list) and names:
        with contextlib.suppress(Failure):  # the key is made all the same
            known = {str(each["id"]) for each in admin.get("/v1/models")["data"]}
            for name in names:
                if name not in known:
                    show.say(f"there is no model {name!r} in the list of models (vllmctl models)", sys.stderr)


def settings(arguments: argparse.Namespace) -> dict[str, object]:
    """The key's settings on the command line, as the API takes them."""
    given: dict[str, object] = {}
    for name in ("scopes", "models"):
        text = getattr(arguments, name)
        if text is not None:
            given[name] = [part.strip() for part in text.split(",") if part.strip()]
    for option in LIMITS:
        name = option.replace("-", "_")
        if hasattr(arguments, name):
            given[name] = getattr(arguments, name)
    return given


def row(key: KeyLine) -> tuple[str, ...]:
    """A key as a row of the table."""
    limits = {name: value for name, value in key.settings.items() if name not in ("scopes", "models")}
    texts = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in limits.items())
    models = ", ".join(key.models) or "all"
    return key.name, ", ".join(key.scopes), models, texts, "configured" if key.configured else ""
