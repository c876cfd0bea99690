"""ollama, Ollama's Python library."""

from common import (
    BASE,
    CHAT,
    EMBED,
    IMAGES,
    PIXEL,
    QUESTION,
    TEXTS,
    WEATHER,
    about_paris,
    alike,
    ended,
    refused,
    run,
    sees,
    true,
)
from ollama import Client, ResponseError

client = Client(host=BASE)
MESSAGES = [{"role": "user", "content": QUESTION}]
FEW = {"num_predict": 24, "temperature": 0}


def listed() -> None:
    true(f"{CHAT}:latest" in [model.model for model in client.list().models], "the model is not in the list")
    true("completion" in client.show(CHAT).capabilities, "it is not told what the model can")


def chat() -> None:
    answer = client.chat(CHAT, MESSAGES, options=FEW)
    about_paris(answer.message.content)
    true(answer.eval_count and answer.total_duration, "no counts")


def stream() -> None:
    parts = list(client.chat(CHAT, MESSAGES, options=FEW, stream=True))
    about_paris("".join(part.message.content or "" for part in parts))
    true(parts[-1].done and parts[-1].eval_count, "no end")


def tools() -> None:
    tool = {"type": "function", "function": {name: value for name, value in WEATHER.items() if name != "strict"}}
    answer = client.chat(IMAGES, [{"role": "user", "content": "Weather in Paris?"}], tools=[tool])
    true(answer.message.tool_calls[0].function.name == "weather", "no call of the tool")


def images() -> None:
    sees(client.chat(IMAGES, [{"role": "user", "content": "What is it?", "images": [PIXEL]}]).message.content)


def embeddings() -> None:
    alike(client.embed(EMBED, TEXTS).embeddings)


def cancel() -> None:
    events = client.chat(CHAT, MESSAGES, options={"num_predict": 4000}, stream=True)
    next(events)
    events.close()
    ended()


def errors() -> str:
    return refused(lambda: client.chat("nobody", MESSAGES), ResponseError, "nobody")


run("ollama", {"list": listed, "chat": chat, "stream": stream, "tools": tools, "images": images,
               "embeddings": embeddings, "cancel": cancel, "errors": errors})  # fmt: skip
