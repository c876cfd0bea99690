"""Finding the model in a body, and putting another name there."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.proxy.test_large import SteppedThrough
from vllmd.api.names import LONGEST_NAME
from vllmd.errors import BadRequest
from vllmd.proxy import peek
from vllmd.proxy.large import in_turns, parse_large_json_body
from vllmd.proxy.peek import ParsedBody, parse_form_body, parse_json_body

NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4),
    max_leaves=20,
)
KEYS = st.text().filter(lambda key: key not in ("model", "stream"))


@given(st.dictionaries(KEYS, VALUES, max_size=6), NAMES, NAMES, st.booleans(), st.sampled_from([None, 1, 3]))
def test_a_name_is_found_and_replaced_and_nothing_else(
    others: dict[str, object], name: str, other: str, ascii_only: bool, indent: int | None
) -> None:
    """For any JSON object in any layout: the rest of the body stays as it was, byte for byte."""
    items = [*others.items()]
    middle = len(items) // 2
    body = dict([*items[:middle], ("model", name), ("stream", True), *items[middle:]])
    text = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return  # a lone surrogate is no UTF-8
    asked = parse_json_body(text)
    assert (asked.model, asked.stream) == (name, True)
    written = json.dumps(name, ensure_ascii=ascii_only).encode()
    assert text[: asked.name_start] + written + text[asked.name_end :] == text
    assert json.loads(b"".join(asked.with_model(other))) == {**body, "model": other}


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_read_as_the_standard_library_does_or_refused(body: bytes) -> None:
    """No crash, and never another model than json.loads sees."""
    try:
        asked = parse_json_body(body)
    except BadRequest:
        return
    assert (json.loads(body).get("model") or "") == asked.model


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"model":"m",}', "a property name in double quotes is missing at line 1 column 14"),
        (b'{"model" "m"}', "a ':' is missing"),
        (b'{"model":}', "a value is missing at line 1 column 10"),
        (b'{"model":"m" "x":1}', "a ',' or '}' is missing"),
        (b'{\n"x": tru,\n"model":"m"}', "a value is missing at line 2 column 6"),
        (b'{"model":"m\n"}', "Invalid control character"),
        (b'{"model":"m"} x', "extra data"),
        (b'{"model":"m","x":"\xff"}', "not UTF-8: invalid start byte at byte 18"),
        (b"\xef\xbb\xbf{}", "not a JSON object"),
        (b'{"x":' + b"[" * 100_000, "nested too deeply"),
        (b'{"x":' + b"1" * 5000 + b"}", "an integer of thousands of digits"),
        (b'{"model":5}', "must be a string"),
        (b'{"model":["m"]}', "must be a string"),
        (b'{"model":"a\\u0000"}', "characters that no model's name has"),
        (b'{"model":"\\ud800"}', "characters that no model's name has"),
        (b'{"model":"m","mode\\u006c":"m"}', "twice"),
    ],
)
def test_a_refusal_says_what_and_where(body: bytes, says: str) -> None:
    """So that it can be put right."""
    with pytest.raises(BadRequest) as caught:
        parse_json_body(body)
    assert says in caught.value.message


def test_a_body_of_too_many_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Millions of empty lists would take a hundred times their bytes in memory."""
    monkeypatch.setattr(peek, "MAX_ELEMENTS", 1000)
    monkeypatch.setattr(peek, "ELEMENTS_COUNTED_FROM_BYTES", 100)
    assert parse_json_body(b'{"model":"m","x":[' + b"[]," * 300 + b"0]}").model == "m"
    with pytest.raises(BadRequest, match="more than 1000 elements"):
        parse_json_body(b'{"model":"m","x":[' + b"[]," * 600 + b"0]}")


def form(*parts: bytes, boundary: bytes = b"x-y") -> bytes:
    """A form of these parts."""
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--" + boundary + b"--\r\n"


def part(name: bytes, content: bytes, more: bytes = b"") -> bytes:
    """One field."""
    return b'Content-Disposition: form-data; name="%b"%b\r\n\r\n%b' % (name, more, content)


TYPE = "multipart/form-data; boundary=x-y"
_HEAD = b'Content-Disposition: form-data; name="x"'
_MODEL = b'content-disposition: form-data; name="model"\r\n\r\nn'


def in_form(body: bytes, content_type: str) -> ParsedBody:
    """What a form asks for, read in one go."""
    return asyncio.run(in_turns(parse_form_body(body, content_type)))


@given(st.lists(st.binary(max_size=50).filter(lambda data: b"--x-y" not in data), max_size=4), NAMES, NAMES)
def test_a_forms_name_is_found_and_replaced_and_nothing_else(files: list[bytes], name: str, other: str) -> None:
    """Whatever bytes the files have."""
    parts = [part(b"file", file, b'; filename="a\xff"\r\nContent-Type: audio/wav') for file in files]
    asked = in_form(form(*parts, part(b"model", name.encode()), part(b"stream", b"true")), TYPE)
    assert (asked.model, asked.stream) == (name, True)
    assert b"".join(asked.with_model(other)) == form(*parts, part(b"model", other.encode()), part(b"stream", b"true"))


@pytest.mark.parametrize(
    "kind", [TYPE, f"{TYPE}; charset=utf-8", 'multipart/form-data; charset="UTF-8"; boundary=x-y; x=y']
)
def test_forms_as_clients_send_them(kind: str) -> None:
    """curl, httpx, browsers: names in brackets, files with any name, fields of their own."""
    parts = (
        *(part(b"model", b"m"), part(b"timestamp_granularities[]", b"word")),
        part(b"file", b"\n\r\0", b'; filename="a \xc3\xa9 %22b.wav"\r\nContent-Type: audio/wav\r\nX-Own: 1'),
        b"content-disposition:form-data;name=stream\r\nContent-Transfer-Encoding: binary\r\n\r\ntrue",
    )
    asked = in_form(form(*parts), kind)
    assert (asked.model, asked.stream) == ("m", True)


@pytest.mark.parametrize(
    "called",
    [
        b"x; name=model.wav",
        b'x; name=\\"model\\"',
        b"x;name=model;",
        b"name=model",
        b"a; name*=utf-8''model",
        b"C:\\a.wav",
    ],
)
def test_a_file_may_be_called_like_a_field(called: bytes) -> None:
    """What stands in quotes is a name of a file, wherever quotes end."""
    file = b'Content-Disposition: form-data; name="file"; filename="%b"\r\n\r\nx' % called
    assert in_form(form(file, part(b"model", b"m")), TYPE).model == "m"


@pytest.mark.parametrize("value", [b"null", b'""', b'"" '])
def test_a_name_that_is_null_or_empty_names_none(value: bytes) -> None:
    """As vLLM takes it; the engine gets the name of the model that is found then."""
    body = b'{"x":1,"model":%b,"y":2}' % value
    for asked in (parse_json_body(body), SteppedThrough(parse_large_json_body(body)).result):
        assert asked.model == ""
        assert json.loads(b"".join(asked.with_model("m"))) == {"x": 1, "model": "m", "y": 2}


@pytest.mark.parametrize(
    ("content_type", "body", "says"),
    [
        (TYPE, form(b'Content-Disposition: form-data; filename="a; name=model"; name="x"\r\n\r\nm'), "with one name"),
        (TYPE, form(b'Content-Disposition: form-data; filename="a\\"; name="model\\""; name="x"\r\n\r\nm'), "one name"),
        (TYPE, form(b'Content-Disposition: form-data; name="x"; filename="a\\"; name="model"\r\n\r\nm'), "one name"),
        ("multipart/form-data", form(part(b"model", b"m")), "must have one boundary"),
        ("multipart/form-data; xboundary=x-y", form(part(b"model", b"m")), "must have one boundary"),
        (f"{TYPE}; boundary=z", form(part(b"model", b"m")), "must have one boundary"),
        (f"{TYPE}; boundary*=utf-8''z", form(part(b"model", b"m")), "must have one boundary"),
        (TYPE, form(b"Content-Disposition: form-data; name=\"x\"; name*=utf-8''model\r\n\r\nm"), "with one name"),
        (TYPE, b"", "does not start"),
        (TYPE, b"pre--x-y\r\n" + form(part(b"model", b"m")), "does not start"),
        (TYPE, b"x" * 20_000 + b"\r\n" + form(part(b"model", b"m")), "does not start"),
        (TYPE, form(part(b"model", b"m"))[:-6], "ends in the middle"),
        (TYPE, form(part(b"model", b"m"))[:-4] + b"zz\r\n", "does not end"),
        (TYPE, form(part(b"model", b"m"), part(b"model", b"n")), "twice"),
        (TYPE, form(part(b"file", b"\r\n--x-yz\r\n"), part(b"model", b"m")), "does not end"),
        (TYPE, form(b"\r\nno head"), "head of a part"),
        (
            TYPE,
            form(part(b"model", b"m"), _HEAD + b'\ncontent-disposition: form-data; name="model"\r\n\r\nn'),
            "end with CRLF",
        ),
        (
            TYPE,
            form(part(b"model", b"m"), _HEAD + b'\rcontent-disposition: form-data; name="model"\r\n\r\nn'),
            "end with CRLF",
        ),
        (TYPE, form(part(b"model", b"m"), _HEAD + b'\r\n ;name="model"\r\n\r\nn'), "end with CRLF"),
        (TYPE, form(part(b"model", b"m"), _HEAD + b"\0\r\n\r\nn"), "end with CRLF"),
        (TYPE, form(b'Content-Disposition : form-data; name="model"\r\n\r\nm'), "head of a part"),
        (TYPE, form(b'Content-Disposition: attachment; name="model"\r\n\r\nm'), "of form-data"),
        (TYPE, form(part(b"mo\\del", b"m")), "printable ASCII"),
        (TYPE, form(part(b"%6dodel", b"m")), "printable ASCII"),
        (TYPE, form(part("mödel".encode(), b"m")), "printable ASCII"),
        (TYPE, form(part(b"model", b"bQ==", b"\r\nContent-Transfer-Encoding: base64")), "as they are"),
        (f"{TYPE}; charset=utf-7", form(part(b"+AG0-odel", b"m")), "must be in UTF-8"),
        ("multipart/form-data; charset*=utf-7''x; boundary=x-y", form(part(b"model", b"m")), "must be in UTF-8"),
        (TYPE, form(b'Content-Disposition: form-data; name="model"; name="x"\r\n\r\nm'), "with one name"),
        (TYPE, form(part(b"model", b"m\r\nX")), "no model's name"),
        (TYPE, form(part(b"model", b"\xff")), "not UTF-8"),
    ],
)
def test_a_form_that_two_readers_could_read_differently_is_refused(content_type: str, body: bytes, says: str) -> None:
    """Its model would be a guess."""
    with pytest.raises(BadRequest) as caught:
        in_form(body, content_type)
    assert says in caught.value.message


def test_a_large_form_is_read_in_turns() -> None:
    """A part of megabytes is searched a slice at a time, and nobody waits for the rest."""
    found = SteppedThrough(
        parse_form_body(form(part(b"file", b"x" * (20 * peek.SLICE_BYTES)), part(b"model", b"m")), TYPE)
    )
    assert found.result.model == "m"
    assert found.turns >= 19


def test_a_form_of_nothing_but_parts_is_refused() -> None:
    """Each costs more than its bytes."""
    with pytest.raises(BadRequest, match="more than 1000 parts"):
        in_form(form(*[part(b"x", b"")] * 1001), TYPE)


@pytest.mark.parametrize("length", [LONGEST_NAME, LONGEST_NAME + 1, 1 << 20])
def test_a_name_has_a_length(length: int) -> None:
    """A name of a megabyte would be compared with every model's, letter by letter, while everybody waits."""
    bodies = [
        lambda: parse_json_body(b'{"model":"%b"}' % (b"a" * length)),
        lambda: parse_json_body(b'{"mod\\u0065l":"%b"}' % (b"a" * length)),
        lambda: in_form(form(part(b"model", b"a" * length)), TYPE),
    ]
    for read in bodies:
        if length <= LONGEST_NAME:
            assert read().model == "a" * length
        else:
            with pytest.raises(BadRequest, match="at most 256 characters"):
                read()


def test_a_preamble_is_dropped() -> None:
    """It means nothing, and the engine does not get it: there is nothing in it that another reader could find."""
    sent = form(part(b"model", b"m"))
    for preamble in (b"\r\n", b"This is a message in MIME format.\r\n"):
        asked = in_form(preamble + sent, TYPE)
        assert (asked.model, asked.raw) == ("m", sent)
