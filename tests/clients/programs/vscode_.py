"""What VS Code's Copilot and Continue ask of an Ollama, by hand: their editors do not run without a screen."""

import json
import urllib.error
import urllib.request

from common import BASE, CHAT, IMAGES, QUESTION, about_paris, run, true


def ask(path: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(BASE + path, data, {"Content-Type": "application/json"})
    ) as answer:
        return json.load(answer)


def listed() -> None:
    version = tuple(map(int, ask("/api/version")["version"].split(".")[:3]))
    true(version >= (0, 6, 4), "too old for Copilot")
    names = [model["model"] for model in ask("/api/tags")["models"]]
    true(f"{CHAT}:latest" in names, "the model is not in the list")
    told = ask("/api/show", {"model": f"{CHAT}:latest"})
    true(told["model_info"][f"{told['model_info']['general.architecture']}.context_length"] > 1000, "no context length")
    true("completion" in told["capabilities"], "no capabilities")
    true("tools" in ask("/api/show", {"name": f"{IMAGES}:latest"})["capabilities"], "no tools")


def chat() -> None:
    body = {
        "model": f"{CHAT}:latest",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 24,
        "temperature": 0,
    }
    about_paris(ask("/v1/chat/completions", body)["choices"][0]["message"]["content"])


def errors() -> None:
    try:
        ask("/api/show", {"model": "nobody:latest"})
    except urllib.error.HTTPError as error:
        true(error.code == 404 and "nobody" in json.load(error)["error"], "another error")
    else:
        raise AssertionError("nothing was raised")


run("", {"list": listed, "chat": chat, "errors": errors}, "requests of 1.106")
