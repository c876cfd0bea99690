"""Take the configuration anew; models that did not change keep running."""

from __future__ import annotations

import argparse

from vllmd.cli import show
from vllmd.cli.admin import Admin


def arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    answer = Admin(arguments).post("/admin/reload")
    if arguments.json:
        print(show.as_json(answer))
        return 0
    told = [f"{kind}: {', '.join(answer[kind])}" for kind in ("changed", "added", "removed") if answer.get(kind)]
    print(
        "\n".join(["the configuration is loaded", *told]) if told else "the configuration is loaded; no model changed"
    )
    for warning in answer.get("warnings", ()):
        print(f"warning: {warning}")
    return 0
