"""Clients in the machine: ask random models in random ways until /run/enough is there; print how each request ended.

Some keep their connections, some read slowly, some leave in the middle of their request or of the answer.

usage: load.py SEED CLIENTS MODEL...
"""

from __future__ import annotations

import collections
import http.client
import json
import os
import random
import socket
import sys
import threading
import time

seed, clients, models = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
outcomes: collections.Counter[str] = collections.Counter()
WORDS = "one two three four five six seven eight"
PATIENCE = 150.0


def read(answer: http.client.HTTPResponse, slowly: bool) -> bytes:
    """All of it, at once or in small pieces with pauses."""
    if not slowly:
        return answer.read()
    told = b""
    while piece := answer.read(64):
        told += piece
        time.sleep(0.02)
    return told


def vanish(dice: random.Random, body: bytes) -> None:
    """Send a part of a request, or all of it, wait a little, and be gone without a word."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
    whole = head.encode() + b"\r\n\r\n" + body
    with socket.create_connection(("127.0.0.1", 33258), timeout=PATIENCE) as connection:
        connection.sendall(whole[: dice.choice([10, len(head) + 20, len(whole)])])
        time.sleep(dice.uniform(0, 0.5))
        if dice.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    outcomes["vanished"] += 1


def client(number: int) -> None:
    """One after another, on a kept connection or on new ones."""
    dice, kept, slowly = random.Random(seed * 1000 + number), number % 2 == 0, number % 3 == 2
    connection = http.client.HTTPConnection("127.0.0.1", 33258, timeout=PATIENCE)
    while not os.path.exists("/run/enough"):
        stream = dice.random() < 0.4
        body = {"model": dice.choice(models), "stream": stream, "messages": [{"role": "user", "content": WORDS}]}
        try:
            if dice.random() < 0.1:
                vanish(dice, json.dumps(body).encode())
                continue
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = read(answer, slowly)
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
