"""instructor, structured answers over OpenAI's library."""

from typing import Literal

import instructor
from common import BASE, CHAT, IMAGES, QUESTION, refused, run, true
from openai import OpenAI
from pydantic import BaseModel


class Capital(BaseModel):
    city: Literal["Paris", "London"]


class Said(BaseModel):
    text: str


raw = OpenAI(base_url=f"{BASE}/v1", api_key="none", max_retries=0, timeout=120)


def ask(mode: instructor.Mode, model: str, kind: type[BaseModel], **more: object) -> BaseModel:
    messages = [{"role": "user", "content": QUESTION}]
    client = instructor.from_openai(raw, mode=mode)
    return client.create(model=model, messages=messages, response_model=kind, max_retries=0, **more)


def chat() -> None:
    true(
        ask(instructor.Mode.JSON_SCHEMA, CHAT, Capital, max_tokens=60, temperature=0).city == "Paris", "no true answer"
    )


def tools() -> None:
    true(ask(instructor.Mode.TOOLS, IMAGES, Said).text == QUESTION, "no call of the tool")  # it sends no ``strict``


def errors() -> str:
    return refused(lambda: ask(instructor.Mode.JSON_SCHEMA, "nobody", Capital), Exception, "nobody")


run("instructor", {"chat": chat, "tools": tools, "errors": errors})
