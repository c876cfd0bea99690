"""Fetch models into the engines' cache, without serving them yet.

MODEL is a well-known name (smollm2, qwen3:0.6b), a repository of the hub
(ORG/NAME), or of one with GGUF files a quantisation (ORG/NAME:Q4_K_M) or a file
(ORG/NAME/FILE.gguf). Ctrl-C breaks a download off, unless another one waits for
the same model; the next pull goes on where it was.
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
            answers.append(admin.perform(verb("stop-download"), Download, {"model": model}))
            text = f"{model}: ended; what has come is kept"
        elif arguments.no_wait:
            answers.append(understood(Pulled, admin.post("/admin/store/pull", {"model": model, "detach": True})))
            text = f"{model}: begun; vllmctl ps shows how far it is"
        else:
            last = downloads.follow(admin, model, add=False, quiet=arguments.json)
            answers.append(last)
            name = last.model
            is_served = any(name == line.name for line in admin.status().models)
            text = f"{name} is here after {show.age(last.seconds)}, {show.size(last.total)}"
            text += "" if is_served else f"; vllmctl run {name} serves it"
        if not arguments.json:
            show.say(text)
    if arguments.json:
        print(show.as_json(answers))
    return 0
