"""Open WebUI, which speaks Ollama's API: started, and asked as its own page asks it."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from common import BASE, CHAT, EMBED, HOME, QUESTION, TEXTS, about_paris, alike, ended, run, true

START = 300.0  # seconds: it makes its data base first
with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = free.getsockname()[1]
AT = {
    "OLLAMA_BASE_URL": BASE, "ENABLE_OPENAI_API": "False", "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "none",
    "DATA_DIR": str(HOME), "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1", "RAG_EMBEDDING_ENGINE": "ollama",
    "RAG_EMBEDDING_MODEL": f"{EMBED}:latest", "RAG_OLLAMA_BASE_URL": BASE, "ENABLE_VERSION_UPDATE_CHECK": "False",
    "SCARF_NO_ANALYTICS": "true", "DO_NOT_TRACK": "true", "ANONYMIZED_TELEMETRY": "false",
}  # fmt: skip
token = ""


def ask(path: str, body: object = None, limit: float = 120.0):
    data = None if body is None else json.dumps(body).encode()
    fields = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data, fields)
    return urllib.request.urlopen(request, timeout=limit)


def chatting(stream: bool, tokens: int = 24) -> dict:
    return {
        "model": f"{CHAT}:latest",
        "messages": [{"role": "user", "content": QUESTION}],
        "stream": stream,
        "params": {},
        "max_tokens": tokens,
        "temperature": 0,
        "options": {"num_predict": tokens, "temperature": 0},
    }


def listed() -> None:
    names = [model["id"] for model in json.load(ask("/api/models"))["data"]]
    true(f"{CHAT}:latest" in names, f"the model is not in the list: {names}")


def chat() -> None:
    about_paris(json.load(ask("/api/chat/completions", chatting(False)))["choices"][0]["message"]["content"])


def stream() -> None:
    text = ""
    for line in ask("/api/chat/completions", chatting(True)):
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            text += (event.get("choices") or [{}])[0].get("delta", {}).get("content") or ""
    about_paris(text)


def embeddings() -> None:
    alike(json.load(ask("/ollama/api/embed", {"model": f"{EMBED}:latest", "input": TEXTS}))["embeddings"])


def cancel() -> None:
    answer = ask("/ollama/api/chat", {**chatting(True, 4000), "options": {"num_predict": 4000}})
    answer.readline()
    answer.close()
    ended()


server = subprocess.Popen(
    [str(Path(sys.executable).with_name("open-webui")), "serve", "--host", "127.0.0.1", "--port", str(PORT)],
    env={**os.environ, **AT}, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True,
)  # fmt: skip
try:
    deadline = time.monotonic() + START
    while True:
        try:
            signed = json.load(ask("/api/v1/auths/signin", {"email": "", "password": ""}, 5.0))
            token = signed["token"]
            break
        except OSError:
            true(time.monotonic() < deadline and server.poll() is None, "it does not start")
            time.sleep(1)
    run("open-webui", {"list": listed, "chat": chat, "stream": stream, "embeddings": embeddings, "cancel": cancel})
finally:
    os.killpg(server.pid, 9)
    server.wait()
