"""vLLM's HTTP surface: what goes in, what comes out."""

from __future__ import annotations

import asyncio
import base64
import struct
from pathlib import Path

import pytest

from tests.simengine.rig import HELLO, Rig, rig
from vllmd.simengine.options import Options

MODEL = {"served_model_name": ("m",)}


async def _one(tmp_path: Path, path: str, body: object, **options: object) -> object:
    async with rig(tmp_path, **options) as sim:
        return (await sim.post(path, body)).json


def test_chat_answers_the_last_messages_words(tmp_path: Path) -> None:
    """The answer is known beforehand, so that a test behind a proxy can compare it."""
    answer = asyncio.run(_one(tmp_path, "/v1/chat/completions", {"model": "m", "messages": HELLO}, **MODEL))
    assert answer["choices"][0]["message"]["content"] == "hello big world"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


def test_a_stream_ends_with_usage_and_done(tmp_path: Path) -> None:
    """Clients that count tokens rely on the usage chunk before [DONE]."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            reply = await sim.chat(stream=True, stream_options={"include_usage": True})
        *chunks, usage, done = reply.events
        assert done == "[DONE]"
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == 6
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "hello big world"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    asyncio.run(script())


def test_a_cut_streams_last_token_says_so(tmp_path: Path) -> None:
    """As seen of a real vLLM: at the limit the last text and the reason share a chunk; an own end has one more."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            cut = (await sim.chat(stream=True, max_tokens=2)).events
            ended = (await sim.chat(stream=True)).events
        last = [events[-2]["choices"][0] for events in (cut, ended)]
        said = [(each["delta"]["content"], each["finish_reason"]) for each in last]
        assert said == [(" big", "length"), ("", "stop")]

    asyncio.run(script())


def test_max_tokens_cuts_and_ignore_eos_fills(tmp_path: Path) -> None:
    """A load generator asks for exact lengths."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            cut = (await sim.chat(max_tokens=2)).json["choices"][0]
            full = (await sim.chat(max_tokens=5, ignore_eos=True)).json
        assert (cut["message"]["content"], cut["finish_reason"]) == ("hello big", "length")
        assert full["choices"][0]["message"]["content"] == "hello big world hello big"
        assert full["usage"]["completion_tokens"] == 5

    asyncio.run(script())


def test_given_tools_the_first_is_called(tmp_path: Path) -> None:
    """Tool calls pass a proxy as any other answer, streamed or not."""
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]

    async def script() -> None:
        async with rig(tmp_path) as sim:
            whole = (await sim.chat(tools=tools)).json["choices"][0]
            parts = (await sim.chat(tools=tools, stream=True)).events[:-1]
        call = whole["message"]["tool_calls"][0]["function"]
        assert whole["finish_reason"] == "tool_calls"
        assert call == {"name": "look", "arguments": '{"text":"hello big world"}'}
        deltas = [part["choices"][0]["delta"].get("tool_calls") for part in parts]
        assert "".join(delta[0]["function"]["arguments"] for delta in deltas if delta) == call["arguments"]

    asyncio.run(script())


def test_a_tools_result_is_answered_in_words(tmp_path: Path) -> None:
    """The second turn of a tool call must not call again, or a client loops."""
    messages = [*HELLO, {"role": "tool", "tool_call_id": "1", "content": "it is there"}]
    body = {"messages": messages, "tools": [{"type": "function", "function": {"name": "look"}}]}
    answer = asyncio.run(_one(tmp_path, "/v1/chat/completions", body))
    assert answer["choices"][0]["message"]["content"] == "it is there"


@pytest.mark.parametrize(
    ("prompt", "texts"), [("a b", ["a b"]), (["a", "b c"], ["a", "b c"]), ([[353], [354]], ["a", "b"])]
)
def test_completions_take_texts_and_token_numbers(tmp_path: Path, prompt: object, texts: list[str]) -> None:
    """All of OpenAI's forms of a prompt."""
    answer = asyncio.run(_one(tmp_path, "/v1/completions", {"prompt": prompt}))
    assert [choice["text"] for choice in answer["choices"]] == texts


def test_a_response_can_be_fetched_and_a_background_one_cancelled(tmp_path: Path) -> None:
    """The id in the path is all that these two routes have; a proxy must know whose it is."""

    async def script() -> None:
        async with rig(tmp_path, tokens_per_second=0.01) as sim:
            made = (await sim.post("/v1/responses", {"input": "a b", "background": True})).json
            got = (await sim.call("GET", f"/v1/responses/{made['id']}")).json
            gone = (await sim.post(f"/v1/responses/{made['id']}/cancel")).json
            unknown = await sim.call("GET", "/v1/responses/resp-none")
        assert (made["status"], got["id"], gone["status"]) == ("queued", made["id"], "cancelled")
        assert unknown.status == 404

    asyncio.run(script())


def test_responses_stream_their_events_in_order(tmp_path: Path) -> None:
    """The official client checks the order and the sequence numbers."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            events = (await sim.post("/v1/responses", {"input": "a b", "stream": True})).events
        kinds = [event["type"].removeprefix("response.") for event in events]
        assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
        assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "a b"

    asyncio.run(script())


def test_messages_stream_as_anthropics_do(tmp_path: Path) -> None:
    """Ends with message_stop and without [DONE]."""

    async def script() -> None:
        body = {"model": "m", "max_tokens": 2, "messages": HELLO, "stream": True}
        async with rig(tmp_path, **MODEL) as sim:
            events = (await sim.post("/v1/messages", body)).events
            nameless = await sim.post("/v1/messages", {"messages": HELLO})
            counted = (await sim.post("/v1/messages/count_tokens", body)).json
        assert [event["type"] for event in events][0::6] == ["message_start", "message_stop"]
        assert events[-2]["delta"]["stop_reason"] == "max_tokens"
        assert nameless.status == 400
        assert counted == {"input_tokens": 3}

    asyncio.run(script())


def test_embeddings_are_the_same_as_floats_and_base64(tmp_path: Path) -> None:
    """The official client asks for base64 and expects the same numbers."""

    async def script() -> None:
        async with rig(tmp_path, dimensions=40) as sim:
            floats = (await sim.post("/v1/embeddings", {"input": "a"})).json["data"][0]["embedding"]
            coded = await sim.post("/v1/embeddings", {"input": ["b", "a"], "encoding_format": "base64"})
        numbers = struct.unpack("<40f", base64.b64decode(coded.json["data"][1]["embedding"]))
        assert numbers == pytest.approx(floats)

    asyncio.run(script())


def test_rerank_orders_by_common_words(tmp_path: Path) -> None:
    """The best document comes first, ``top_n`` cuts."""
    body = {"query": "a b", "documents": ["c", "a b", "a"], "top_n": 2}
    answer = asyncio.run(_one(tmp_path, "/v1/rerank", body))
    assert [result["index"] for result in answer["results"]] == [1, 2]


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/score", {"text_1": "a", "text_2": ["a", "b"]}, "score"),
        ("/classify", {"input": ["a", "bb"]}, "label"),
        ("/pooling", {"input": ["a", "b"]}, "data"),
    ],
)
def test_the_other_pooling_routes_answer_each_input(tmp_path: Path, path: str, body: object, key: str) -> None:
    """One item per input, in order."""
    answer = asyncio.run(_one(tmp_path, path, body))
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert answer["data"][0][key] != answer["data"][1][key]


def test_audio_is_told_by_name_and_length(tmp_path: Path) -> None:
    """The model's name is a field of a multipart body there."""
    head = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n'
    parts = [head.format("model", "") + "m", head.format("file", '; filename="a.wav"') + "RIFFdata"]
    body = "".join(f"--x\r\n{part}\r\n" for part in parts) + "--x--\r\n"

    kind = "multipart/form-data; boundary=x"
    path = "/v1/audio/transcriptions"

    async def script() -> None:
        async with rig(tmp_path, **MODEL) as sim:
            reply = await sim.post(path, body.encode(), content_type=kind)
            other = await sim.post(path, body.replace("\r\n\r\nm", "\r\n\r\nx").encode(), content_type=kind)
        assert reply.json["text"] == "heard 8 bytes of a.wav"
        assert other.status == 404

    asyncio.run(script())


@pytest.mark.parametrize("text", ["", "plain words", "  spaces\tand\nlines ", "größe ☃ " + "x" * 100])
def test_detokenize_gives_back_what_was_tokenized(tmp_path: Path, text: str) -> None:
    """Byte for byte, for any text."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            numbers = (await sim.post("/tokenize", {"prompt": text})).json
            again = (await sim.post("/detokenize", {"tokens": numbers["tokens"]})).json
        assert again == {"prompt": text}
        assert numbers["count"] == len(numbers["tokens"])

    asyncio.run(script())


def test_the_request_id_becomes_part_of_the_answers(tmp_path: Path) -> None:
    """``X-Request-Id`` finds a request again in both logs; it is echoed only if told to."""

    async def script() -> None:
        async with rig(tmp_path, enable_request_id_headers=True) as sim:
            reply = await sim.post("/v1/chat/completions", {"messages": HELLO}, x_request_id="abc")
        assert reply.json["id"] == "chatcmpl-abc"
        assert reply.headers["x-request-id"] == "abc"

    asyncio.run(script())


async def _refusals(sim: Rig) -> list[tuple[int, str]]:
    replies = [
        await sim.post("/v1/chat/completions", {"messages": HELLO, "model": "other"}),
        await sim.post("/v1/chat/completions", b"{}", content_type="text/plain"),
        await sim.post("/v1/chat/completions", b"{"),
        await sim.post("/v1/chat/completions", {}),
        await sim.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 0}),
        await sim.post("/v1/completions", {"prompt": "w " * 200}),
        await sim.call("GET", "/v1/completions"),
        await sim.call("GET", "/nowhere"),
    ]
    contents = [(reply.status, reply.json) for reply in replies]
    return [(status, content.get("detail") or content["error"]["message"]) for status, content in contents]


def test_what_is_wrong_is_refused_as_vllm_does(tmp_path: Path) -> None:
    """A proxy in front passes these on, so they must look right."""

    async def script() -> None:
        async with rig(tmp_path, max_model_len=100, **MODEL) as sim:
            refusals = await _refusals(sim)
        assert [status for status, _ in refusals] == [404, 400, 400, 400, 400, 400, 405, 404]
        assert [message for _, message in refusals[-2:]] == ["Method Not Allowed", "Not Found"]
        assert refusals[3][1].startswith("1 validation error:\n  {'type': 'missing', 'loc': 'body.messages'")
        assert refusals[0][1] == "The model `other` does not exist. Valid aliases: m."
        assert "Only 'application/json' is allowed" in refusals[1][1]
        assert "maximum context length is 100 tokens" in refusals[5][1]

    asyncio.run(script())


def test_models_version_health_and_metrics(tmp_path: Path) -> None:
    """What a manager asks an engine about."""

    async def script() -> None:
        async with rig(tmp_path, **MODEL) as sim:
            await sim.chat()
            models = (await sim.call("GET", "/v1/models")).json
            version = (await sim.call("GET", "/version")).json
            health = await sim.call("GET", "/health")
            metrics = (await sim.call("GET", "/metrics")).body.decode()
        assert models["data"][0]["id"] == "m"
        assert version == {"version": "0.32.0"}
        assert (health.status, health.body) == (200, b"")
        assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 3.0' in metrics
        assert 'sleep_state="awake"} 1.0' in metrics

    asyncio.run(script())


def test_invocations_dispatch_by_the_bodys_shape(tmp_path: Path) -> None:
    """SageMaker's one route for all."""
    answer = asyncio.run(_one(tmp_path, "/invocations", {"prompt": "a b"}))
    assert answer["object"] == "text_completion"


def test_development_routes_need_development_mode(tmp_path: Path) -> None:
    """Without it there is no /sleep, as in vLLM."""

    async def script() -> None:
        async with rig(tmp_path, dev_mode=False) as sim:
            assert (await sim.post("/sleep")).status == 404

    asyncio.run(script())


def test_created_can_be_fixed(tmp_path: Path) -> None:
    """Two runs then give the same bytes."""
    answer = asyncio.run(_one(tmp_path, "/v1/chat/completions", {"messages": HELLO}, created=7))
    assert answer["created"] == 7


def test_defaults_are_those_of_vllm() -> None:
    """Port, slots and the keep-alive time that a connection pool must stay under."""
    assert (Options().port, Options().max_num_seqs, Options().keep_alive) == (8000, 256, 5.0)
