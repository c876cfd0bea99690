"""What the Python programs share: each function is called in turn, and a line of JSON says how it went.

A function that the client does not have is left out. A program runs in its client's own environment, and knows
nothing of vllmd but where it is and what its models are called.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

BASE = os.environ["BASE"]  # without /v1
CHAT, EMBED, TOOLS, IMAGES = (os.environ[f"{name}_MODEL"] for name in ("CHAT", "EMBED", "TOOLS", "IMAGES"))
NODE_MODULES = Path(os.environ["NODE_MODULES"])
HOME = Path(os.environ["HOME"])  # an empty folder, for this program alone
QUESTION = "What is the capital of France? Answer in one sentence."
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PICTURE = "data:image/png;base64," + PIXEL
WEATHER = {
    "name": "weather",
    "strict": True,  # engines hold a model to the parameters of such functions only
    "description": "The weather of a place",
    "parameters": {"type": "object", "properties": {"place": {"enum": ["Paris"]}}, "required": ["place"]},
}
SEEN = "[image]"  # what the stand-in engine says of a picture
TEXTS = ["a cat", "a kitten", "the annual report of a bank"]
AGENT_LIMIT = 900.0  # seconds for an agent's answer: thousands of tokens of prompt are read first; idle cores need 30
ENDED = 30.0  # seconds in which the engine must have ended what nobody wants any more


def run(package: str, functions: Mapping[str, Callable[[], object]], version: str = "") -> None:
    """Call each; a function returns what is to be said of it, and raises what is wrong. ``version``: if no package."""
    print(json.dumps({"version": version or metadata.version(package)}), flush=True)
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


def sees(text: str | None) -> None:
    """The picture has reached the engine."""
    true(SEEN in (text or ""), f"the engine has not seen it: {text!r}")


def alike(vectors: Sequence[Sequence[float]]) -> None:
    """Those of TEXTS: a real model of embeddings was asked, and the order is right."""
    true(len(vectors) == len(TEXTS), f"{len(vectors)} embeddings")
    cat, kitten, report = vectors
    true(math.dist(cat, kitten) < 0.8 * math.dist(cat, report), "a cat is no more like a kitten than like a report")


def node_version(package: str) -> str:
    """Of a package that npm installed; ends the program where it did not."""
    file = NODE_MODULES / package / "package.json"
    if not file.exists():
        sys.exit(f"no {package} here")
    return str(json.loads(file.read_text())["version"])


def agent(*argv: object, wanted: int | None = 0, **environment: str) -> str:
    """What an agent's program prints in an empty folder; ``wanted``: its exit status, None for any but 0."""
    place = HOME / "work"
    place.mkdir(exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(HOME), "TERM": "dumb", **environment}
    done = subprocess.run(
        list(map(str, argv)), env=env, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=AGENT_LIMIT,
    )  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    right = done.returncode != 0 if wanted is None else done.returncode == wanted
    true(right, f"exit status {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]!r}")
    return done.stdout + (done.stderr if wanted is None else "")


def interrupted(*argv: object, model: str = CHAT, **environment: str) -> None:
    """An agent that is interrupted while the engine works for it takes its request along."""
    place = HOME / "work"
    place.mkdir(exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(HOME), "TERM": "dumb", **environment}
    one = subprocess.Popen(
        list(map(str, argv)), env=env, cwd=place, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        _until(model, lambda number: number > 0, one)
        os.killpg(one.pid, signal.SIGINT)
        ended(model)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(one.pid, signal.SIGKILL)
        one.wait()


def _until(model: str, right: Callable[[int], bool], one: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + (ENDED if one is None else AGENT_LIMIT)
    while True:
        with urllib.request.urlopen(f"{BASE}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        if right(int(float(text.partition(f'vllmd_model_running_requests{{model="{model}"}} ')[2].split()[0]))):
            return
        true(time.monotonic() < deadline, "the engine still works on it" if one is None else "the engine was not asked")
        true(one is None or one.poll() is None, "the agent ended by itself")
        time.sleep(0.1)


def ended(model: str = CHAT) -> None:
    """Wait until the engine has nothing to do: a client that left took its request along."""
    _until(model, lambda number: number == 0)


def refused(ask: Callable[[], object], kind: type[Exception], words: str) -> str:
    """``ask`` raises this, with these words in it; says which."""
    try:
        ask()
    except kind as error:
        true(words in str(error), f"the error does not say {words!r}: {error}")
        return type(error).__name__
    raise AssertionError("nothing was raised")
