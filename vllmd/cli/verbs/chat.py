"""Talk with a model in the terminal.

A line is a message; /clear forgets the conversation, /exit or Ctrl-D ends it,
Ctrl-C breaks off an answer. Without a terminal the standard input is the one
message.
"""

from __future__ import annotations

import argparse
import sys

from vllmd.api.json_types import ForeignJson
from vllmd.cli import openai, show
from vllmd.cli.admin import Admin


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the model's name")
    parser.add_argument("message", nargs="*", metavar="MESSAGE", help="ask this, print the answer, and end")
    options(parser)


def options(parser: argparse.ArgumentParser) -> None:
    """How a model is talked with, by whichever verb."""
    parser.add_argument("-s", "--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="randomness")


def run(arguments: argparse.Namespace) -> int:
    talk = Conversation(openai.client(arguments), arguments)
    if arguments.message or not sys.stdin.isatty():
        talk.ask(" ".join(arguments.message) or sys.stdin.read())
    else:
        converse(talk)
    return 0


def converse(talk: Conversation) -> None:
    """Lines from the terminal until its end."""
    import readline  # noqa: F401 - input() gains editing and history by its import

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line in ("/exit", "/quit", "/bye"):
            return
        if line == "/clear":
            talk.forget()
        elif line:
            try:
                talk.ask(line)
            except KeyboardInterrupt:
                print()


class Conversation:
    """A conversation: what was said, and with what settings."""

    def __init__(self, http: Admin, arguments: argparse.Namespace) -> None:
        self.http = http
        self.settings = {"model": arguments.model, "max_tokens": arguments.max_tokens}
        self.settings["temperature"] = arguments.temperature
        self.system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        self.messages: list[ForeignJson] = []

    def forget(self) -> None:
        """Begin a new conversation, without what was said."""
        self.messages = []

    def ask(self, text: str) -> None:
        """Send a message, print the answer as it comes, remember both."""
        asked = [*self.messages, {"role": "user", "content": text}]
        settings = {key: value for key, value in self.settings.items() if value is not None}
        answer, waiting = "", show.Working(f"waiting for {self.settings['model']}")
        with waiting:
            for chunk in openai.stream(self.http, {**settings, "messages": self.system + asked}, waiting.say):
                content, reasoning = openai.delta(chunk)
                answer += content
                if content or reasoning:
                    waiting.clear()
                print(show.paint(reasoning, "grey") if reasoning else "", content, sep="", end="", flush=True)
        print()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
