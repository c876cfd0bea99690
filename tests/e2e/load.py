"""Clients that run inside the machine, many at once, and what became of their requests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.e2e.site import Site

_CLIENTS = """
import http.client, json, random, sys, threading, time

plan = json.loads(%r)
outcomes, end = [], time.monotonic() + plan["seconds"]

def ask(model, words, tokens):
    began = time.monotonic()
    body = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": words}]}
    try:
        connection = http.client.HTTPConnection("127.0.0.1", 33258, timeout=plan["patience"])
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, answer = response.status, json.loads(response.read())
        connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        status, answer = 0, {"error": {"message": f"{type(error).__name__}: {error}"}}
    said = answer["choices"][0]["message"]["content"] if status == 200 else answer["error"]["message"]
    outcomes.append([model, status, began, time.monotonic() - began, said == words or said])

def client(number):
    chance = random.Random(number)
    while time.monotonic() < end:
        ask(chance.choice(plan["models"]), " ".join(f"w{n}" for n in range(plan["tokens"])), plan["tokens"])
        time.sleep(plan["pause"])

clients = [threading.Thread(target=client, args=(number,)) for number in range(plan["clients"])]
for each in clients: each.start()
for each in clients: each.join()
print(json.dumps(outcomes))
"""


@dataclass(frozen=True)
class Outcome:
    """One request: ``status`` 0 if its connection broke. ``said``: True if the whole answer came, else what did."""

    model: str
    status: int
    began: float
    took: float
    said: object


def load(
    site: Site,
    models: Sequence[str],
    *,
    clients: int,
    seconds: float,
    tokens: int = 10,
    pause: float = 0.0,
    patience: float = 60.0,
) -> list[Outcome]:
    """``clients`` at once, each asking one of ``models`` at random (but the same each time), again and again."""
    plan = {
        "models": list(models),
        "clients": clients,
        "seconds": seconds,
        "tokens": tokens,
        "pause": pause,
        "patience": patience,
    }
    outcomes: list[Any] = site.python(_CLIENTS % json.dumps(plan), timeout=seconds + patience + 30)
    return [Outcome(*outcome) for outcome in outcomes]


def failed(outcomes: Sequence[Outcome]) -> Counter[tuple[str, int, str]]:
    """What went wrong, and how often: nothing, if all got their whole answer."""
    return Counter((o.model, o.status, str(o.said)[:200]) for o in outcomes if o.status != 200 or o.said is not True)
