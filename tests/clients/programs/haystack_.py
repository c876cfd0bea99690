"""Haystack, with its components for OpenAI."""

import os

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "false"

from common import BASE, CHAT, EMBED, QUESTION, TEXTS, about_paris, alike, refused, run
from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from openai import NotFoundError

AT = {"api_base_url": f"{BASE}/v1", "api_key": Secret.from_token("none"), "max_retries": 0}
FEW = {"max_tokens": 24, "temperature": 0}
MESSAGES = [ChatMessage.from_user(QUESTION)]


def chat() -> None:
    about_paris(OpenAIChatGenerator(model=CHAT, generation_kwargs=FEW, **AT).run(MESSAGES)["replies"][0].text)


def stream() -> None:
    parts: list[str] = []
    one = OpenAIChatGenerator(model=CHAT, generation_kwargs=FEW, **AT)
    one.run(MESSAGES, streaming_callback=lambda chunk: parts.append(chunk.content))
    about_paris("".join(parts))


def embeddings() -> None:
    one = OpenAITextEmbedder(model=EMBED, **AT)
    alike([one.run(text)["embedding"] for text in TEXTS])


def errors() -> str:
    return refused(lambda: OpenAIChatGenerator(model="nobody", **AT).run(MESSAGES), NotFoundError, "nobody")


run("haystack-ai", {"chat": chat, "stream": stream, "embeddings": embeddings, "errors": errors})
