"""Pydantic AI, with its models of OpenAI's API."""

import asyncio
from typing import Literal

from common import BASE, CHAT, QUESTION, TOOLS, about_paris, ended, refused, run, true
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    place: Literal["Paris"]


def agent(model: str, *, tokens: int = 24, heat: float = 0.0, **more: object) -> Agent:
    provider = OpenAIProvider(base_url=f"{BASE}/v1", api_key="none")
    return Agent(
        OpenAIChatModel(model, provider=provider), model_settings={"temperature": heat, "max_tokens": tokens}, **more
    )


def chat() -> None:
    about_paris(agent(CHAT).run_sync(QUESTION).output)


def stream() -> None:
    async def play() -> str:
        async with agent(CHAT).run_stream(QUESTION) as result:
            return [text async for text in result.stream_text()][-1]

    about_paris(asyncio.run(play()))


def tools() -> None:
    one = agent(TOOLS, tokens=1500, heat=1.0, output_type=ToolOutput(Weather, name="weather", strict=True), retries=0)
    true(one.run_sync("Weather in Paris?").output.place == "Paris", "no call of the tool")


def cancel() -> None:
    async def play() -> None:
        async with agent(CHAT, tokens=4000).run_stream(QUESTION) as result:
            async for _ in result.stream_text():
                raise KeyError

    try:
        asyncio.run(play())
    except KeyError:
        ended()


def errors() -> str:
    return refused(lambda: agent("nobody").run_sync(QUESTION), ModelHTTPError, "nobody")


run("pydantic-ai-slim", {"chat": chat, "stream": stream, "tools": tools, "cancel": cancel, "errors": errors})
