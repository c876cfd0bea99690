"""Fetch models into the engines' cache, without serving them yet.

MODEL is a well-known name (smollm2, qwen3:0.6b), a repository of the hub
(ORG/NAME), of one with GGUF files a quantisation (ORG/NAME:Q4_K_M) or a file
(ORG/NAME/FILE.gguf). What was broken off goes on where it was; Ctrl-C breaks
off, unless somebody else waits for the same model.
"""

from __future__ import annotations

import argparse

from vllmd.api.answers import Answer, Download, Pulled
from vllmd.api.verbs import verb
from vllmd.cli import downloads, show
from vllmd.cli.admin import Admin, understood


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a well-known name, or ORG/NAME[:QUANT]")
    parser.add_argument("--no-wait", action="store_true", help="begin it and return; it goes on by itself")
    parser.add_argument("--stop", action="store_true", help="end a download that is under way")


def run(arguments: argparse.Namespace) -> int:
    admin, answers = Admin(arguments), list[Answer]()
    for model in arguments.models:
        if arguments.stop:
            answers.append(admin.told(verb("stop-download"), Download, {"model": model}))
            said = f"{model}: ended; what has come is kept"
        elif arguments.no_wait:
            answers.append(understood(Pulled, admin.post("/admin/store/pull", {"model": model, "detach": True})))
            said = f"{model}: begun; vllmctl ps shows how far it is"
        else:
            last = downloads.follow(admin, model, add=False, quiet=arguments.json)
            answers.append(last)
            name = last.model
            known = any(name == line.name for line in admin.status().models)
            said = f"{name} is here after {show.age(last.seconds)}, {show.size(last.total)}"
            said += "" if known else f"; vllmctl run {name} serves it"
        if not arguments.json:
            show.say(said)
    if arguments.json:
        print(show.as_json(answers))
    return 0
