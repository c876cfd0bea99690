"""What engines answer, and what Ollama's clients get: streams cut anywhere, and answers that come whole."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from vllmd.errors import UpstreamFailed
from vllmd.ollama.answers import Piece, Reply, Timing, chat_piece, error_text, generate_piece
from vllmd.ollama.context import decoded
from vllmd.ollama.embedding import embed_answer, embeddings_answer
from vllmd.ollama.lines import MAX_EVENT_BYTES, Lines, stamp

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "served"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class Clock:
    """Each look is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    """An event as vLLM writes it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return b"data: " + json.dumps({**HEAD, "choices": [choice], **more}, separators=(",", ":")).encode() + b"\n\n"


def usage(**more: Any) -> bytes:
    return b"data: " + json.dumps({**HEAD, "choices": [], "usage": USAGE, **more}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def lines_of(piece: Piece = chat_piece, **how: Any) -> Lines:
    return Lines("asked", Reply(piece, Timing(Clock()), **how), now=lambda: "NOW")


def told(lines: Lines, *pieces: bytes, at_once: bool = False) -> list[dict[str, Any]]:
    """What comes of a stream that arrives in these pieces, without the counts of the last line.

    ``at_once``: each of them is several of the engine's, with a NUL between.
    """
    fed = lines.feed if not at_once else lambda piece: lines.feed_pieces(piece.split(b"\0"))
    out = b"".join([*map(fed, pieces), lines.end()])
    return [json.loads(line) for line in out.splitlines()]


def text(content: str) -> dict[str, Any]:
    return {"model": "asked", "created_at": "NOW", "done": False, "message": {"role": "assistant", "content": content}}


TEXTS = ["", "a", " b", '"quoted"', "back\\slash", "line\nend", "ä€😀", "\x7f", '","content":"trap', "}]}", "\u2028"]


@pytest.mark.parametrize("number", [1, 2, 3, 30])
@pytest.mark.parametrize("odd", [None, 0, 5, -1])
@pytest.mark.parametrize("shift", [0, 10])
def test_pieces_mean_what_they_mean_together(number: int, odd: int | None, shift: int) -> None:
    """However many come at once, whether each is an event or none is, and wherever one looks different."""
    events = [*(chunk({"content": each}) for each in TEXTS[1:]), chunk({}, "stop"), usage(), DONE]
    if odd is not None:
        events.insert(odd, chunk({"content": "odd"}, created=2))
    stream = b"".join(events)
    cuts = [0, *(len(b"".join(events[:at])) - shift for at in range(1, len(events))), len(stream)]
    pieces = [stream[start:end] for start, end in itertools.pairwise(cuts)]
    together = [b"\0".join(pieces[at : at + number]) for at in range(0, len(pieces), number)]
    assert told(lines_of(), *together, at_once=True) == told(lines_of(), stream)


@pytest.mark.parametrize("size", [1, 7, 100, 2_900, 10_000])
@pytest.mark.parametrize("escaped", [True, False])
def test_texts_go_on_whatever_is_in_them_and_however_they_are_cut(size: int, escaped: bool) -> None:
    """Most are moved without being read: what comes out is what reading all of them would give."""
    events = [
        b"data: "
        + json.dumps(
            {**HEAD, "choices": [{"index": 0, "delta": {"content": each}, "finish_reason": None}]}, ensure_ascii=escaped
        ).encode()
        + b"\n\n"
        for each in TEXTS * 2
    ]
    stream = b"".join([chunk({"role": "assistant", "content": ""}), *events, chunk({}, "stop"), usage(), DONE])
    out = told(lines_of(), *(stream[at : at + size] for at in range(0, len(stream), size)))
    assert [line["message"]["content"] for line in out[:-1]] == [each for each in TEXTS * 2 if each]
    assert [line["done"] for line in out] == [False] * (len(out) - 1) + [True]


def test_most_of_a_stream_is_not_read() -> None:
    """An event like the one before differs in its text only; whatever else differs has it read."""
    lines = lines_of()
    read: list[bytes] = []
    whole = lines.parse_event
    lines.parse_event = lambda line, *more: read.append(line) or whole(line, *more)  # type: ignore[method-assign, func-returns-value]
    words = [chunk({"content": f"w{number}"}) for number in range(100)]
    out = told(lines, *words[:50], chunk({"content": "x"}, created=2), *words[50:], chunk({}, "stop"), DONE)
    assert len(out) == 102
    assert len(read) < 8


TRAPS = [  # an event, what of it is another thing in the next event, and the texts of both
    (b'{"choices":[{"delta":{"content":"a","content":"b"}}]}', b'"a"', b'"c"', "bb"),
    (b'{"x":{"text":"a"},"choices":[{"delta":{"content":"a"}}]}', b'"text":"a"', b'"text":"c"', "aa"),
    (b'{"x":{"text":"b"},"choices":[{"delta":{"\\u0063ontent":"a"}}]}', b'"b"', b'"c"', "aa"),
    (b'{"choices":[{"delta":{"content":"a"}}]}', b'"a"', b'"b","content":"c"', "ac"),
]


@pytest.mark.parametrize(("event", "old", "new", "texts"), TRAPS)
def test_what_could_be_taken_for_the_text_is_not(event: bytes, old: bytes, new: bytes, texts: str) -> None:
    """Where its place is not certain an event is read, and so is one that has more than a string in that place."""
    out = told(lines_of(), *(b"data: " + each + b"\n\n" for each in (event, event.replace(old, new))))
    assert "".join(line["message"]["content"] for line in out) == texts


def test_a_text_that_comes_with_a_call_is_read_each_time() -> None:
    """The call's crumbs are gathered from every event."""
    crumbs = [chunk({"content": each, "tool_calls": [{"index": 0, "function": {"arguments": "1"}}]}) for each in "ab"]
    out = told(lines_of(), *crumbs, DONE)
    assert [line["message"]["content"] for line in out] == ["a", "b", "11", ""]


def test_the_last_line_has_counts_and_durations() -> None:
    """Nanoseconds by our clock: loaded at 2 s, the first text at 3 s, the end at 4 s."""
    lines = lines_of()
    lines.reply.timing.sent()
    out = told(lines, chunk({"content": "a"}), chunk({"content": "b"}), chunk({}, "length"), usage(), DONE)
    second = 1_000_000_000
    assert out[-1] == {
        **text(""),
        "done": True,
        "done_reason": "length",
        "total_duration": 3 * second,
        "load_duration": second,
        "prompt_eval_duration": second,
        "eval_duration": second,
        "prompt_eval_count": 3,
        "eval_count": 2,
    }


def test_an_engine_that_tells_its_times_is_believed() -> None:
    """llama.cpp measures what we can only guess."""
    timings = {"prompt_ms": 1.5, "predicted_ms": 2.5, "prompt_n": 9, "predicted_n": 8}
    (last,) = told(lines_of(), usage(timings=timings), DONE)
    assert (last["prompt_eval_duration"], last["eval_duration"]) == (1_500_000, 2_500_000)


def test_no_duration_is_nought() -> None:
    """Programs divide tokens by them."""
    assert all(value > 0 for value in Timing(lambda: 5.0).durations({}).values())


def test_thinking_is_shown_apart_or_not_at_all() -> None:
    """Under the name of either engine; a client that wants none gets none, though the model thinks."""
    stream = [chunk({"reasoning_content": "hm"}), chunk({"reasoning": "so"}), chunk({"content": "4"}), DONE]
    shown = told(lines_of(), *stream)
    assert [line["message"] for line in shown[:-1]] == [
        {"role": "assistant", "content": "", "thinking": "hm"},
        {"role": "assistant", "content": "", "thinking": "so"},
        {"role": "assistant", "content": "4"},
    ]
    assert [line["message"]["content"] for line in told(lines_of(thinking=False), *stream)] == ["4", ""]


def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}, **more}]}


def test_calls_of_tools_are_gathered() -> None:
    """They come in crumbs, and are told once they are whole, with objects as arguments."""
    first = {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": ""}}]}
    second = {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "g", "arguments": "{}"}}]}
    out = told(
        lines_of(),
        chunk(first),
        chunk(call(0, '{"x"')),
        chunk(second),
        chunk(call(0, ": 1}")),
        chunk({}, "tool_calls"),
        DONE,
    )
    assert out[0]["message"]["tool_calls"] == [
        {"id": "c1", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}},
        {"id": "c2", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]
    assert (len(out), out[-1]["done_reason"]) == (2, "stop")


def test_a_call_that_was_cut_is_told_as_text() -> None:
    """Arguments that are no object cannot be told as one, and are not lost."""
    first = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"x": "unfin'}}]}
    out = told(lines_of(), chunk(first), chunk({}, "length"), DONE)
    assert out[0]["message"] == {"role": "assistant", "content": '{"x": "unfin'}
    assert out[-1]["done_reason"] == "length"


def test_signs_of_life_are_pieces_without_text() -> None:
    """Comments of the loading, which all of Ollama's clients take for what models send now and then."""
    assert told(lines_of(), b": loading m: weights\n\n", chunk({"content": "a"}), DONE)[:2] == [text(""), text("a")]


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (b'data: {"error":{"message":"out of memory","code":500}}\n\n', "out of memory"),
        (b'data: {"object":"error","message":"too long"}\n\n', "too long"),
        (b'data: {"error":"plain"}\n\n', "plain"),
        (b"data: {not json\n\n", "the engine sent an event that is not JSON"),
    ],
)
def test_an_error_is_the_last_line(event: bytes, why: str) -> None:
    """In Ollama's form, and nothing follows that looks like an end."""
    out = told(lines_of(), chunk({"content": "a"}), event, chunk({"content": "b"}), DONE)
    assert out == [text("a"), {"error": why}]


def test_logprobs_pass_in_both_forms() -> None:
    """Chat's as they are, those of completions in the same form."""
    token = {"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}
    chat = b'data: {"choices":[{"delta":{"content":"a"},"logprobs":{"content":[%b]}}]}\n\n' % json.dumps(token).encode()
    old = {"tokens": ["a"], "token_logprobs": [-0.1], "top_logprobs": [{"a": -0.1, "b": -2.0}]}
    completion = b"data: " + json.dumps({"choices": [{"text": "a", "logprobs": old}]}).encode() + b"\n\n"
    assert told(lines_of(), chat)[0]["logprobs"] == [token]
    assert told(lines_of(generate_piece), completion)[0]["logprobs"] == [
        {
            "token": "a",
            "logprob": -0.1,
            "top_logprobs": [{"token": "a", "logprob": -0.1}, {"token": "b", "logprob": -2.0}],
        }
    ]


def test_completions_and_infill_have_their_own_forms() -> None:
    """vLLM's and OpenAI's ``text``, and llama.cpp's ``content`` without choices, whose last event has a reason."""
    for stream in (
        [
            b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n',
            b'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n',
        ],
        [b'data: {"content":"a","stop":false}\n\n', b'data: {"content":"","stop":true,"stop_type":"limit"}\n\n'],
    ):
        out = told(lines_of(generate_piece), *stream)
        assert [(line["response"], line.get("done_reason")) for line in out] == [("a", None), ("", "length")]


def test_a_completion_gives_its_conversation_back() -> None:
    """Texts that were moved unread are in it, too."""
    lines = lines_of(generate_piece, turns=(("user", "q"),))
    out = told(lines, *(chunk({"content": each}) for each in ("a", '"b"', "\nc")), chunk({}, "stop"), DONE)
    assert decoded(out[-1]["context"]) == [("user", "q"), ("assistant", 'a"b"\nc')]


def test_an_answer_that_is_no_stream() -> None:
    """One object, done."""
    message = {
        "role": "assistant",
        "content": None,
        "reasoning": "hm",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}],
    }
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": USAGE}
    out = json.loads(lines_of().whole(json.dumps(answer).encode()))
    assert out["message"] == {
        "role": "assistant",
        "content": "",
        "thinking": "hm",
        "tool_calls": [{"id": "c", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}}],
    }
    assert (out["done"], out["done_reason"], out["prompt_eval_count"], out["eval_count"]) == (True, "stop", 3, 2)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000])
def test_an_answer_that_is_none_is_the_engines_fault(body: bytes) -> None:
    """And not a defect of ours."""
    with pytest.raises(UpstreamFailed):
        lines_of().whole(body)


def test_an_event_without_end_is_given_up() -> None:
    """What is held until a line is whole has a limit."""
    lines = lines_of()
    for _ in range(MAX_EVENT_BYTES >> 20):
        lines.feed(b"x" * (1 << 20))
    with pytest.raises(UpstreamFailed):
        lines.feed(b"x")


def test_embeddings_are_moved_as_they_are_written() -> None:
    """A batch of them is megabytes of numbers."""
    vectors = [[0.1, -2e-05, 3], [1.0]]
    data = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
    answer = json.dumps({"object": "list", "data": data, "model": "m", "usage": USAGE}).encode()
    out = json.loads(embed_answer(answer, 2, "asked", {"total_duration": 1}))
    assert out == {"model": "asked", "total_duration": 1, "prompt_eval_count": 3, "embeddings": vectors}
    with pytest.raises(UpstreamFailed, match="2 embeddings for 1 texts"):
        embeddings_answer(answer)
    assert json.loads(embeddings_answer(b'{"data":[{"embedding": [1, 2]}]}')) == {"embedding": [1, 2]}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"error": {"message": "m"}}, "m"),
        ({"error": "e"}, "e"),
        ({"message": "vllm"}, "vllm"),
        ({"detail": "d"}, "d"),
        ({"error": {"message": ["x"]}}, "?"),
        ([], "?"),
        (None, "?"),
    ],
)
def test_what_an_error_says(answer: Any, text: str) -> None:
    """Whatever its form."""
    assert error_text(answer, "?") == text


def test_the_time_is_as_ollama_writes_it() -> None:
    """RFC 3339 with fractions, in UTC."""
    from datetime import UTC, datetime

    assert abs((datetime.now(UTC) - datetime.fromisoformat(stamp())).total_seconds()) < 5
