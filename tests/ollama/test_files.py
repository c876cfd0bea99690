"""Images of megabytes: taken out before a body is read, and put back where they belong."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from vllmd.errors import TooLarge
from vllmd.ollama.endpoints import openai_body
from vllmd.ollama.files import MOST_TEXT, SLICE_BYTES, Files
from vllmd.ollama.requests import chat
from vllmd.proxy.gate import Target
from vllmd.proxy.peek import T, Turns

RUN = "iVBORw0KGgo" + "Az09+/_-=" * 50_000


def done(work: Turns[T]) -> T:
    """All turns at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


VALUES = [
    {"a": RUN},
    {"a": [RUN, "b", RUN * 3]},
    {RUN: "a key"},
    {"a": "data:image/png;base64," + RUN},
    {"a": f'in text "{RUN}" and \\ on'},
    {"a": json.dumps({"x": [RUN, 'quoted "']})},
    {"a": "x" * 32_767},
    {"a": "word " * 100_000, "b": RUN},
    {"a": RUN[: SLICE_BYTES - 6], "b": "ä€"},
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
@pytest.mark.parametrize("inner", [False, True])
def test_what_is_taken_out_is_put_back(value: dict[str, Any], inner: bool) -> None:
    """Wherever it stands, and however the text around it was written again, as a string within a string as well."""
    files = Files()
    read = json.loads(done(files.take_out(json.dumps(value).encode())))
    sent = json.loads(files.put_back(json.dumps({"x": json.dumps(read) if inner else read}).encode()))["x"]
    assert (json.loads(sent) if inner else sent) == value


def test_only_files_are_taken_out() -> None:
    """A text is read as ever; of a file no more stays than tells its kind."""
    body = json.dumps({"text": "word " * 50_000, "image": RUN}).encode()
    assert len(body) - len(done(Files().take_out(body))) > len(RUN) - 200


def test_a_text_of_many_megabytes_is_refused() -> None:
    """Nobody else waits while it is translated; no model reads as much."""
    with pytest.raises(TooLarge):
        done(Files().take_out(b'"' + b"word " * (MOST_TEXT // 5 + 1) + b'"'))


def test_looking_for_files_takes_time_by_the_bodys_bytes() -> None:
    """Runs that are nearly long enough are looked through once, not once more from each of their bytes: for hours."""
    body = (b"A" * 32_000 + b" ") * 200
    assert done(Files().take_out(body)) == body


def test_a_chat_with_an_image_of_megabytes() -> None:
    """Its type is told by what stays; results and arguments of tools may hold files, too."""
    call = {"function": {"name": "f", "arguments": {"file": RUN}}}
    members = {
        "model": "m",
        "messages": [{"role": "user", "content": "see", "images": [RUN]}, {"role": "assistant", "tool_calls": [call]}],
    }
    files = Files()
    asked = replace(chat(json.loads(done(files.take_out(json.dumps(members).encode())))), files=files)
    sent = json.loads(openai_body(asked, Target("m", "m")).raw)
    assert sent["messages"][0]["content"][1]["image_url"]["url"] == "data:image/png;base64," + RUN
    assert json.loads(sent["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"file": RUN}
