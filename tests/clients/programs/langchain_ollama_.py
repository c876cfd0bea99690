"""LangChain's integration for Ollama."""

from common import (
    BASE,
    CHAT,
    EMBED,
    IMAGES,
    PICTURE,
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
from langchain_core.messages import HumanMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings
from ollama import ResponseError

model = ChatOllama(model=CHAT, base_url=BASE, temperature=0, num_predict=24)
seer = ChatOllama(model=IMAGES, base_url=BASE)


def chat() -> None:
    about_paris(str(model.invoke(QUESTION).content))


def stream() -> None:
    about_paris("".join(str(chunk.content) for chunk in model.stream(QUESTION)))


def tools() -> None:
    tool = {name: value for name, value in WEATHER.items() if name != "strict"}
    true(seer.bind_tools([tool]).invoke("Weather?").tool_calls[0]["name"] == "weather", "no call of the tool")


def images() -> None:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PICTURE}}]
    sees(str(seer.invoke([HumanMessage(content=parts)]).content))


def embeddings() -> None:
    alike(OllamaEmbeddings(model=EMBED, base_url=BASE).embed_documents(TEXTS))


def cancel() -> None:
    events = ChatOllama(model=CHAT, base_url=BASE, num_predict=4000).stream(QUESTION)
    next(events)
    events.close()
    ended()


def errors() -> str:
    return refused(lambda: ChatOllama(model="nobody", base_url=BASE).invoke(QUESTION), ResponseError, "nobody")


run("langchain-ollama", {"chat": chat, "stream": stream, "tools": tools, "images": images, "embeddings": embeddings,
                         "cancel": cancel, "errors": errors})  # fmt: skip
