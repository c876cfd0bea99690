"""What clients of Ollama's API send, and what an engine is asked: a table."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from vllmd.errors import BadRequest
from vllmd.ollama.context import MOST, decoded, encoded
from vllmd.ollama.endpoints import openai_body
from vllmd.ollama.fields import read
from vllmd.ollama.requests import Translated, chat, embed, embeddings, generate, model_of
from vllmd.proxy.gate import Target

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
HELLO = {"role": "user", "content": "hello"}
USAGE = {"stream_options": {"include_usage": True}}


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def chatted(**members: Any) -> Translated:
    return chat({"model": "m", "messages": [HELLO], "stream": False, **members})


# What is added to a chat, and what of it the engine gets beside the messages.
CHAT = [
    ({}, {}),
    ({"stream": True}, USAGE),
    ({"stream": None}, USAGE),
    ({"format": ""}, {}),
    ({"format": "json"}, {"response_format": {"type": "json_object"}}),
    (
        {"format": {"type": "object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}},
    ),
    ({"think": True}, {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}),
    ({"think": False}, {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}),
    (
        {"think": "max"},
        {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}, "reasoning_effort": "high"},
    ),
    ({"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"logprobs": False, "top_logprobs": 3}, {}),
    ({"truncate": True, "shift": False, "keep_alive": "5m", "unknown": 1}, {}),
    ({"tools": []}, {}),
    ({"tools": [{"function": {"name": "f"}}]}, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    (
        {"options": {"num_predict": 5, "temperature": 0, "top_k": 40.0}},
        {"max_tokens": 5, "temperature": 0, "top_k": 40},
    ),
    ({"options": {"num_predict": -1, "seed": -1, "stop": []}}, {}),
    ({"options": {"seed": 7, "stop": "a", "min_p": 0.1}}, {"seed": 7, "stop": ["a"], "min_p": 0.1}),
    ({"options": {"repeat_penalty": 1.1}}, {"repetition_penalty": 1.1, "repeat_penalty": 1.1}),
    ({"options": {"temperature": None}}, {}),
    ({"options": {"num_ctx": 4096, "num_gpu": 1}}, {}),
]


@pytest.mark.parametrize(("added", "asked"), CHAT, ids=lambda each: json.dumps(each)[:60])
def test_chat(added: dict[str, Any], asked: dict[str, Any]) -> None:
    """Each member by itself; what says nothing adds nothing, for engines elsewhere refuse what they do not know."""
    assert chatted(**added).body == {"messages": [HELLO], **asked}


MESSAGES = [
    ([{"role": "USER", "content": None}], [{"role": "user", "content": ""}]),
    (
        [{"role": "user", "content": "see", "images": [PNG]}],
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
                ],
            }
        ],
    ),
    (
        [{"role": "assistant", "content": "4", "thinking": "2+2"}],
        [{"role": "assistant", "content": "4", "reasoning": "2+2", "reasoning_content": "2+2"}],
    ),
]


@pytest.mark.parametrize(("sent", "asked"), MESSAGES)
def test_messages(sent: list[Any], asked: list[Any]) -> None:
    """Content, files and thinking."""
    assert chatted(messages=sent).body["messages"] == asked


def test_results_of_tools_find_their_calls() -> None:
    """Ollama's go by name and order, OpenAI's by id: ids are given where there are none, each but once."""
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"id": "own", "function": {"name": "g", "arguments": '{"y": 2}'}}
    sent = [
        {"role": "assistant", "tool_calls": [call, other]},
        {"role": "tool", "tool_name": "g", "content": "of g"},
        {"role": "tool", "content": "of f"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "mine", "content": "by id"},
    ]
    asked = chatted(messages=sent).body["messages"]
    assert [each["id"] for each in asked[0]["tool_calls"] + asked[3]["tool_calls"]] == ["call_0", "own", "call_2"]
    assert [each["function"]["arguments"] for each in asked[0]["tool_calls"]] == ['{"x": 1}', '{"y": 2}']
    assert [each.get("tool_call_id") for each in asked] == [None, "own", "call_0", None, "mine"]
    assert (asked[1]["name"], "name" in asked[2]) == ("g", False)


FILES = [
    (b"\x89PNG\r\n\x1a\n", "data:image/png"),
    (b"\xff\xd8\xff\xe0 JFIF", "data:image/jpeg"),
    (b"GIF89a........", "data:image/gif"),
    (b"RIFF\0\0\0\0WEBPVP8 ", "data:image/webp"),
    (b"BM............", "data:image/bmp"),
]


@pytest.mark.parametrize(("data", "url"), FILES)
def test_images_get_their_type(data: bytes, url: str) -> None:
    """By their first bytes, in either alphabet of base64, and with the escapes of some writers of JSON."""
    for text in (base64_of(data), base64.urlsafe_b64encode(data).decode(), base64_of(data).replace("/", "\\/")):
        part = chatted(messages=[{"role": "user", "images": [text]}]).body["messages"][0]["content"][0]
        assert part["image_url"]["url"].startswith(url + ";base64,")


def test_sounds_and_urls_are_files_as_well() -> None:
    """Ollama's clients send whatever the model hears or sees as images."""
    wave = base64_of(b"RIFF\0\0\0\0WAVEfmt ")
    parts = chatted(messages=[{"role": "user", "images": [wave, "data:image/png;base64,AA"]}]).body["messages"][0]
    assert parts["content"] == [
        {"type": "input_audio", "input_audio": {"data": wave, "format": "wav"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}},
    ]


def test_generate_is_a_chat_of_one_message() -> None:
    """The engine has the template; the system prompt is a message."""
    asked = generate({"model": "m", "prompt": "p", "system": "s", "stream": False})
    assert (asked.path, asked.body) == (
        "/v1/chat/completions",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]},
    )


def test_raw_and_suffix_are_completions() -> None:
    """Without a template; text between two goes to llama.cpp's own route where there is one."""
    raw = generate({"model": "m", "prompt": "p", "raw": True, "stream": False, "logprobs": True, "top_logprobs": 2})
    assert (raw.path, raw.body) == ("/v1/completions", {"prompt": "p", "logprobs": 2})
    assert raw.turns is None  # and no context
    between = {"model": "m", "prompt": "p", "suffix": "s", "stream": False, "options": {"num_predict": 3}}
    assert generate(between).body == {"prompt": "p", "suffix": "s", "max_tokens": 3}
    infill = generate(between, infill=True)
    assert (infill.path, infill.body) == ("/infill", {"input_prefix": "p", "input_suffix": "s", "n_predict": 3})


def test_context_goes_on_with_the_conversation() -> None:
    """What the last answer gave is what was said; a new system prompt replaces the old one."""
    numbers = encoded([("system", "old"), ("user", "a"), ("assistant", "b")])
    asked = generate({"model": "m", "prompt": "c", "system": "new", "context": numbers})
    assert asked.turns == (("system", "new"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert asked.body["messages"][-1] == {"role": "user", "content": "c"}
    assert all(0 <= number < 1 << 24 for number in numbers or [])


def test_a_context_that_is_too_long_is_not_given() -> None:
    """Rather than one that is cut, or numbers without end."""
    assert encoded([("user", "x" * MOST)]) is None


@pytest.mark.parametrize(
    "numbers",
    [
        [1, 2, 3],
        [0x764C4D],
        [0x764C4D, 3, 1],
        [0x764C4D, 9, 1 << 24],
        [0x764C4D, 3, -1],
        "abc",
        {},
        7,
        [None],
        [0x764C4D, 3.5, 1],
    ],
    ids=repr,
)
def test_a_context_of_another_server_is_refused(numbers: Any) -> None:
    """By its name, whatever is in it; tokens of Ollama's mean nothing here."""
    with pytest.raises(BadRequest, match="'context' must be the numbers") as refused:
        decoded(numbers)
    assert refused.value.param == "context"


def test_a_context_that_unpacks_without_end_is_refused() -> None:
    """A few numbers that stand for gigabytes cost nothing."""
    import zlib

    packed = zlib.compress(b"[" + b" " * (10 * MOST) + b"]")
    padded = packed + b"\0" * (-len(packed) % 3)
    numbers = [int.from_bytes(padded[i : i + 3]) for i in range(0, len(padded), 3)]
    with pytest.raises(BadRequest):
        decoded([0x764C4D, len(packed), *numbers])


LOADS: list[tuple[Callable[[dict[str, Any]], Translated], dict[str, Any]]] = [
    (chat, {}),
    (chat, {"messages": []}),
    (generate, {}),
    (generate, {"prompt": ""}),
    (generate, {"prompt": "", "raw": True}),
    (embed, {}),
    (embed, {"input": ""}),
    (embed, {"input": []}),
    (embeddings, {"prompt": ""}),
]


@pytest.mark.parametrize(("translate", "members"), LOADS)
def test_a_request_that_asks_nothing_loads_the_model(
    translate: Callable[[dict[str, Any]], Translated], members: dict[str, Any]
) -> None:
    """So clients have a model loaded, or with keep_alive 0 unloaded."""
    assert translate({"model": "m", **members}).load


def test_embeddings_in_both_forms() -> None:
    """One text or several; floats, whatever the engine's default is."""
    asked = embed({"model": "m", "input": ["a", ""], "dimensions": 8, "truncate": True, "options": {"num_ctx": 1}})
    assert asked.body == {"input": ["a", ""], "encoding_format": "float", "dimensions": 8, "truncate_prompt_tokens": -1}
    assert (asked.inputs, asked.ignored) == (2, ("num_ctx",))
    assert embed({"model": "m", "input": "a"}).body["input"] == ["a"]
    assert embeddings({"model": "m", "prompt": "a"}).body == {"input": ["a"], "encoding_format": "float"}


def test_options_without_effect_are_named() -> None:
    """How an engine is started is the configuration's."""
    assert chatted(options={"num_ctx": 1, "temperature": 0, "made_up": "x"}).ignored == ("num_ctx", "made_up")


# A member of the wrong type -> how it is called. Each in a request that is good without it.
WRONG: list[tuple[Callable[..., Translated], dict[str, Any], str]] = [
    (chat, {"messages": {}}, "messages"),
    (chat, {"messages": ["x"]}, "messages[0]"),
    (chat, {"messages": [{"role": 1}]}, "messages[0].role"),
    (chat, {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    (chat, {"messages": [{"role": "user", "images": [1]}]}, "messages[0].images"),
    (chat, {"messages": [{"role": "user", "images": "!"}]}, "messages[0].images[0]"),
    (chat, {"messages": [HELLO, {"role": "user", "images": [PNG, "AAAA"]}]}, "messages[1].images[1]"),
    (chat, {"messages": [{"role": "user", "thinking": 1}]}, "messages[0].thinking"),
    (chat, {"messages": [{"role": "assistant", "tool_calls": 1}]}, "messages[0].tool_calls"),
    (
        chat,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": 1}]}]},
        "messages[0].tool_calls[0].function",
    ),
    (
        chat,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": []}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    (chat, {"messages": [{"content": "x"}]}, "messages[0].role"),
    (chat, {"tools": {}}, "tools"),
    (chat, {"tools": [{"function": "f"}]}, "tools[0].function"),
    (chat, {"tools": [{"function": {"parameters": []}}]}, "tools[0].function.parameters"),
    (chat, {"format": "yaml"}, "format"),
    (chat, {"format": 1}, "format"),
    (chat, {"think": "much"}, "think"),
    (chat, {"think": 1}, "think"),
    (chat, {"stream": "yes"}, "stream"),
    (chat, {"logprobs": 1}, "logprobs"),
    (chat, {"top_logprobs": 21}, "top_logprobs"),
    (chat, {"top_logprobs": 1.5}, "top_logprobs"),
    (chat, {"truncate": 1}, "truncate"),
    (chat, {"shift": "x"}, "shift"),
    (chat, {"options": []}, "options"),
    (chat, {"options": {"temperature": "hot"}}, "options.temperature"),
    (chat, {"options": {"temperature": True}}, "options.temperature"),
    (chat, {"options": {"temperature": float("inf")}}, "options.temperature"),
    (chat, {"options": {"num_predict": 1.5}}, "options.num_predict"),
    (chat, {"options": {"num_predict": float("nan")}}, "options.num_predict"),
    (chat, {"options": {"top_k": []}}, "options.top_k"),
    (chat, {"options": {"stop": [1]}}, "options.stop"),
    (generate, {"prompt": 1}, "prompt"),
    (generate, {"suffix": []}, "suffix"),
    (generate, {"system": {}}, "system"),
    (generate, {"template": 1}, "template"),
    (generate, {"template": "{{ .Prompt }}"}, "template"),
    (generate, {"raw": "true"}, "raw"),
    (generate, {"raw": True, "system": "s"}, "system"),
    (generate, {"raw": True, "context": [1]}, "context"),
    (generate, {"raw": True, "template": "t"}, "template"),
    (generate, {"images": {}}, "images"),
    (generate, {"images": ["AAAA"]}, "images[0]"),
    (embed, {"input": 1}, "input"),
    (embed, {"input": ["a", 1]}, "input"),
    (embed, {"dimensions": "8"}, "dimensions"),
    (embed, {"truncate": "no"}, "truncate"),
    (embeddings, {"prompt": ["a"]}, "prompt"),
    (embeddings, {"options": 1}, "options"),
]


@pytest.mark.parametrize(
    ("translate", "members", "name"), WRONG, ids=lambda each: each if isinstance(each, str) else ""
)
def test_a_wrong_member_is_refused_by_its_name(
    translate: Callable[..., Translated], members: dict[str, Any], name: str
) -> None:
    """And with what would be right."""
    good = {"model": "m", "messages": [HELLO], "prompt": "p", "input": "i"}
    with pytest.raises(BadRequest) as refused:
        translate({**good, **members})
    assert refused.value.param == name
    assert f"'{name}'" in refused.value.message


@pytest.mark.parametrize("members", [{}, {"model": 1}, {"model": ""}, {"model": "x\n"}, {"model": "m" * 300}], ids=repr)
def test_a_model_is_named(members: dict[str, Any]) -> None:
    """Or the request is refused."""
    with pytest.raises(BadRequest) as refused:
        model_of(members)
    assert refused.value.param == "model"


@pytest.mark.parametrize(
    "body", [b"", b"  ", b"[]", b"1", b"{", b'{"a":}', b"\xff", b"[" * 100_000], ids=lambda body: repr(body[:8])
)
def test_what_is_no_object_is_refused(body: bytes) -> None:
    """Also what would break the reader of JSON."""
    with pytest.raises(BadRequest):
        read(body)


def test_the_engine_gets_its_own_name_for_the_model() -> None:
    """As from a client that speaks OpenAI; the place of the name is known, for a replica may have another."""
    sent = openai_body(chatted(options={"top_p": 0.9}, stream=True), Target("m", 'served "ä"'))
    assert json.loads(sent.raw) == {
        "model": 'served "ä"',
        "stream": True,
        "messages": [HELLO],
        "top_p": 0.9,
        **USAGE,
    }
    assert json.loads(b"".join(sent.with_model("other")))["model"] == "other"
