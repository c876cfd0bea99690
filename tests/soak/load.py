"""Clients in the machine: ask random models in random ways until /run/enough is there; print how each request ended.

usage: load.py SEED CLIENTS MODEL...
"""

from __future__ import annotations

import collections
import http.client
import json
import os
import random
import sys
import threading
import time

seed, clients, models = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
outcomes: collections.Counter[str] = collections.Counter()
WORDS = "one two three four five six seven eight"


def client(number: int) -> None:
    """One after another, on a kept connection or on new ones."""
    dice, kept = random.Random(seed * 1000 + number), number % 2 == 0
    connection = http.client.HTTPConnection("127.0.0.1", 33258, timeout=90)
    while not os.path.exists("/run/enough"):
        stream = dice.random() < 0.4
        body = {"model": dice.choice(models), "stream": stream, "messages": [{"role": "user", "content": WORDS}]}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = answer.read()
            whole = not stream or answer.status != 200 or told.rstrip().endswith(b"data: [DONE]") or b'"error"' in told
            outcomes[f"{answer.status}{'' if whole else ' cut'}"] += 1
            if answer.status >= 500 and answer.status != 503:
                outcomes[told[:160].decode(errors="replace")] += 1
        except TimeoutError:
            outcomes["lost"] += 1  # nobody ever answered: the one thing that must not be
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            outcomes[type(error).__name__] += 1
            connection.close()
        if not kept:
            connection.close()
        time.sleep(dice.uniform(0, 0.3))


threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(outcomes))
