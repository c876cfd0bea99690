"""What the Python programs share: each function is called in turn, and a line of JSON says how it went.

A function that the client does not have is left out. A program runs in its client's own environment, and knows
nothing of vllmd but where it is and what its models are called.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping
from importlib import metadata

BASE = os.environ["BASE"]  # without /v1
CHAT, EMBED, TOOLS = (os.environ[f"{name}_MODEL"] for name in ("CHAT", "EMBED", "TOOLS"))
QUESTION = "What is the capital of France? Answer in one sentence."
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PICTURE = "data:image/png;base64," + PIXEL
WEATHER = {
    "name": "weather",
    "description": "The weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"enum": ["Paris"]}}, "required": ["place"]},
}
ENDED = 30.0  # seconds in which the engine must have ended what nobody wants any more


def run(package: str, functions: Mapping[str, Callable[[], object]]) -> None:
    """Call each; a function returns what is to be said of it, and raises what is wrong."""
    print(json.dumps({"version": metadata.version(package)}), flush=True)
    for name, function in functions.items():
        try:
            told, ok = str(function() or ""), True
        except Exception as error:  # whatever the client raises is the answer
            told, ok = f"{type(error).__name__}: {error}".splitlines()[0][:300], False
            traceback.print_exc(file=sys.stderr)
        print(json.dumps({"function": name, "ok": ok, "told": told}), flush=True)


def true(condition: object, what: str) -> None:
    """Raise unless it is so."""
    if not condition:
        raise AssertionError(what)


def about_paris(text: str | None) -> None:
    """A true answer: the real model was asked."""
    true("Paris" in (text or ""), f"no true answer: {text!r}")


def ended() -> None:
    """Wait until the engine has nothing to do: a client that left took its request along."""
    line = f'vllmd_model_running_requests{{model="{CHAT}"}} 0'
    deadline = time.monotonic() + ENDED
    while True:
        with urllib.request.urlopen(f"{BASE}/metrics", timeout=10) as answer:
            if line in answer.read().decode():
                return
        true(time.monotonic() < deadline, "the engine still works on it")
        time.sleep(0.1)


def refused(ask: Callable[[], object], kind: type[Exception], words: str) -> str:
    """``ask`` raises this, with these words in it; says which."""
    try:
        ask()
    except kind as error:
        true(words in str(error), f"the error does not say {words!r}: {error}")
        return type(error).__name__
    raise AssertionError("nothing was raised")
