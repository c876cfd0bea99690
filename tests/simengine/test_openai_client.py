"""The official openai client, unchanged, against the stand-in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.simengine.rig import HELLO, rig

openai = pytest.importorskip("openai", reason="the openai client is not installed (pip install openai)")

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@asynccontextmanager
async def _client(tmp_path: Path) -> AsyncIterator[openai.AsyncOpenAI]:
    async with rig(tmp_path, served_model_name=("m",)) as sim:
        transport = httpx.AsyncHTTPTransport(uds=str(sim.path))
        async with openai.AsyncOpenAI(
            api_key="none", base_url="http://engine/v1", http_client=httpx.AsyncClient(transport=transport)
        ) as client:
            yield client


def _run(tmp_path: Path, script: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
    async def main() -> None:
        async with _client(tmp_path) as client:
            await script(client)

    asyncio.run(main())


def test_chat_streamed(tmp_path: Path) -> None:
    """The commonest use of all."""

    async def script(client: openai.AsyncOpenAI) -> None:
        stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "hello big world"

    _run(tmp_path, script)


def test_tool_calls(tmp_path: Path) -> None:
    """Arguments arrive as JSON."""

    async def script(client: openai.AsyncOpenAI) -> None:
        answer = await client.chat.completions.create(model="m", messages=HELLO, tools=TOOLS)
        call = answer.choices[0].message.tool_calls[0]
        assert json.loads(call.function.arguments) == {"text": "hello big world"}

    _run(tmp_path, script)


def test_responses_streamed(tmp_path: Path) -> None:
    """The newer API, whose client accumulates events and checks them."""

    async def script(client: openai.AsyncOpenAI) -> None:
        async with client.responses.stream(model="m", input="hello big world") as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_response()
        assert (final.output_text, final.status) == ("hello big world", "completed")

    _run(tmp_path, script)


def test_embeddings(tmp_path: Path) -> None:
    """The client asks for base64 by itself."""

    async def script(client: openai.AsyncOpenAI) -> None:
        answer = await client.embeddings.create(model="m", input=["a", "b"])
        assert [len(item.embedding) for item in answer.data] == [8, 8]

    _run(tmp_path, script)


def test_an_unknown_model_is_its_error(tmp_path: Path) -> None:
    """The client's own exception, with vLLM's message."""

    async def script(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.completions.create(model="other", prompt="a")

    _run(tmp_path, script)


def test_models_and_audio(tmp_path: Path) -> None:
    """A list and a multipart body, both typed by the client."""

    async def script(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["m"]
        heard = await client.audio.transcriptions.create(model="m", file=("a.wav", b"RIFF"))
        assert heard.text == "heard 4 bytes of a.wav"

    _run(tmp_path, script)
