"""Find the ``model`` of a request's body, and replace it without touching any other byte.

JSON is walked member by member at the top level with the standard library's own scanner: a value is skipped
at C speed, the whole body is known to be sound JSON, and the place of the name is known. A body in which two readers
could find two different models (a repeated ``model``) is refused. That is a matter of permission: the daemon checks the
model that it finds, and the engine must not find another one.

Bodies of megabytes are read in turns of the event loop by ``large``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import TypeVar

from vllmd.api.names import LONGEST_NAME, TOO_LONG_A_NAME
from vllmd.config.types import RequestRules
from vllmd.errors import BadRequest
from vllmd.frozen import frozen
from vllmd.proxy.system_prompt import Prompt

# Parsing costs memory and time by the number of values, not of bytes, so brackets and commas are limited.
MAX_ELEMENTS = 4_000_000
ELEMENTS_COUNTED_FROM_BYTES = 1 << 20  # a smaller body cannot have too many

SLICE_BYTES = 256 << 10  # searched between two turns of the loop
MAX_PARTS = 1000  # of a form; Python's servers commonly take as many
MAX_PART_HEAD_BYTES = 16 << 10  # the fields before a part's content
MAX_PREAMBLE_BYTES = 16 << 10  # before a form's first part
KEEP_ALIVE = ("keep_alive", "ttl")  # two names of one member that is the daemon's, see ``proxy.keep_alive``
NO_NAME = "'model' must be a string that names a model"
MAX_FLAG_BYTES = 64  # of a field that says true or false

WHITESPACE = re.compile(r"[ \t\n\r]*")
MODEL_KEY = re.compile(r'"model"[ \t\n\r]*:[ \t\n\r]*(?=")')

# Patterns of forms, which few clients send: ``re`` compiles them, and keeps them, at the first one.
BOUNDARY = r'(?i);[ \t]*boundary=(?:"([^"\\]{1,70})"|([A-Za-z0-9\'()+_,./:=?-]{1,70}))\s*(?:;|$)'
# A part's head, as every reader understands it: no line end but CRLF, nothing before the colon, no folded line.
PART_HEAD = rb"(?:\r\n[A-Za-z0-9-]+:[\t\x20-\x7e\x80-\xff]*)+\r\n"
DISPOSITION = rb"(?i)\r\ncontent-disposition:[ \t]*form-data[ \t]*(;[^\r\n]*)"
DISPOSITIONS = rb"(?i)\r\ncontent-disposition:"
ENCODED = rb"(?i)\r\ncontent-transfer-encoding:(?![ \t]*(?:7bit|8bit|binary)[ \t]*\r\n)"
FIELD_NAME = rb"[ !#$&-\[\]-~]+"  # without '%' and '\\', which some readers unescape
CHARSET = r"(?i);[ \t]*charset\*?=(?!\"?(?:utf-?8|us-ascii)\"?[ \t]*(?:;|$))"
EXTENDED_NAME = rb"(?i)[; \t]name\*"  # RFC 8187's; forms do not have it (RFC 7578, 4.2)
FIELD_OF_DISPOSITION = rb'(?i)[; \t]name[ \t]*=[ \t]*(?:"([^"]*)"|([^"; \t]+))'
# Quoted text, for the two kinds of reader: a backslash escapes a quote, or (WHATWG) it does not. Text without a closing
# quote matches to the end of the line: otherwise each quote in it would start another search of the whole rest.
QUOTED = (rb'"(?:[^"\\]|\\.)*("|\\?\Z)', rb'"[^"]*("|\Z)')

T = TypeVar("T")
Turns = Generator[None, None, T]  # work that yields where the event loop may serve others, see ``large.in_turns``
Parts = tuple[bytes | memoryview, ...]  # of one body, in their order

_scan_once = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


@frozen
class ParsedBody:
    """The members of a request's body that decide how it is relayed, and the body itself, ``raw``.

    ``model``: "" if it names none. The name stands in ``raw`` from byte ``name_start`` to ``name_end`` (0: nowhere);
    ``quoted``: as a JSON string. ``keep_alive`` and ``stream_options``: the member's value, of any type, as a tuple of
    one; () where there is no such member.
    """

    model: str
    stream: bool
    raw: bytes
    name_start: int = 0
    name_end: int = 0
    quoted: bool = False
    keep_alive: tuple[object, ...] = ()
    stream_options: tuple[object, ...] = ()

    def with_model(self, name: str) -> Parts:
        """The body with ``name`` in the place of the model's; a body without one is left alone.

        As parts that follow each other, so that a body of 64 MiB is not copied for the sake of a name.
        """
        if name == self.model or not self.name_end:
            return (self.raw,)
        view = memoryview(self.raw)
        return view[: self.name_start], (json.dumps(name) if self.quoted else name).encode(), view[self.name_end :]


def parse_json_body(body: bytes) -> ParsedBody:
    """Read a JSON body. Raises BadRequest if it is no sound JSON object with at most one ``model``, a string."""
    counted = len(body) > ELEMENTS_COUNTED_FROM_BYTES
    if counted and body.count(b"[") + body.count(b"{") + body.count(b",") > MAX_ELEMENTS:
        raise BadRequest(f"the body has more than {MAX_ELEMENTS} elements")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    return _parse_at_once(body, text) or _parse_by_member(body, text)


def _parse_at_once(body: bytes, text: str) -> ParsedBody | None:
    """Read the common case in one go: ``"model"`` stands there once, and no key can spell it with escapes (\\u006d).

    None in any other case and for any error: ``_parse_by_member`` can say what is wrong, and where.
    """
    if text.count('"model"') != 1 or "\\u00" in text:
        return None
    try:
        members, end = _scan_once(text, 0)
    except (StopIteration, ValueError, RecursionError):
        return None
    if end != len(text) or not isinstance(members, dict) or not isinstance(name := members.get("model"), str):
        return None
    key = MODEL_KEY.search(text)
    if key is None:
        return None
    start = key.end()
    stop = scanstring(text, start + 1, True)[1]
    if len(text) != len(body):
        start, stop = len(text[:start].encode()), len(text[:stop].encode())
    keep_alive: tuple[object, ...] = ()
    if "keep_alive" in members or "ttl" in members:
        keep_alive = tuple(members[name] for name in KEEP_ALIVE if name in members)
    stream = members.get("stream") is True
    options = (members["stream_options"],) if stream and "stream_options" in members else ()
    return ParsedBody(model_name(name), stream, body, start, stop, True, keep_alive, options)


def _parse_by_member(body: bytes, text: str) -> ParsedBody:
    model: tuple[str, int, int] | None = None  # the name, and where it starts and ends in ``text``
    stream, keep_alive = False, dict[str, object]()
    options: tuple[object, ...] = ()
    for key, value, start, end in _members(text):
        if key == "model":
            if model is not None:
                raise BadRequest("the body has 'model' twice", param="model")
            model = (model_name(value), start, end)
        elif key == "stream":
            stream = value is True
        elif key == "stream_options":
            options = (value,)
        elif key in KEEP_ALIVE:
            keep_alive[key] = value
    keep = tuple(keep_alive[key] for key in KEEP_ALIVE if key in keep_alive)
    if model is None:
        return ParsedBody("", stream, body, keep_alive=keep, stream_options=options)
    name, start, end = model
    return ParsedBody(name, stream, body, len(text[:start].encode()), len(text[:end].encode()), True, keep, options)


def apply_rules(body: bytes, rules: RequestRules, prompt: Prompt | None = None) -> bytes:
    """A sound JSON body after ``rules``; every member that they do not name keeps its bytes."""
    text = body.decode("utf-8")
    members = {key: f"{json.dumps(key)}:{text[start:end]}".encode() for key, _, start, end in _members(text)}
    return object_after_rules(members, rules, prompt)


def object_after_rules(
    members: Mapping[str, bytes | memoryview], rules: RequestRules, prompt: Prompt | None = None
) -> bytes:
    """The JSON object of ``members`` (key -> ``"key": value``) after ``rules``, and with the ``prompt`` put first."""
    kept = {key: member for key, member in members.items() if key not in rules.strip}
    if prompt is not None:
        kept = prompt.before(kept)
    pieces: list[bytes | memoryview] = []
    for key, member in kept.items():
        if key not in rules.set:
            pieces.extend((b",", member))
    absent = {key: value for key, value in rules.default.items() if key not in kept}
    for key, value in {**absent, **rules.set}.items():
        pieces.extend((b",", f"{json.dumps(key)}:{json.dumps(value)}".encode()))
    return b"".join((b"{", *pieces[1:], b"}"))  # one copy, whatever the size


def model_name(value: object) -> str:
    """``value`` if it can be a model's name; "" if it is null or empty. Raises BadRequest."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRequest(NO_NAME, param="model")
    if len(value) > LONGEST_NAME:
        raise BadRequest(TOO_LONG_A_NAME, param="model")
    if not value.isprintable():
        raise BadRequest("'model' has characters that no model's name has", param="model")
    return value


def _members(text: str) -> Iterator[tuple[str, object, int, int]]:
    """Yield each member of the object ``text``: key, value, where the value starts and ends. Raises BadRequest."""
    pos = _skip_space(text, 0)
    if text[pos : pos + 1] != "{":
        raise BadRequest("the body is not a JSON object")
    pos = _skip_space(text, pos + 1)
    more = text[pos : pos + 1] != "}"
    pos += not more
    try:
        while more:
            key, pos = _key(text, pos)
            start = _skip_space(text, pos)
            value, pos = _scan_once(text, start)
            yield key, value, start, pos
            pos = _skip_space(text, pos)
            mark = text[pos : pos + 1]
            if mark not in (",", "}"):
                raise _unsound("a ',' or '}' is missing", text, pos)
            more = mark == ","
            pos = _skip_space(text, pos + 1) if more else pos + 1
    except StopIteration as error:
        raise _unsound("a value is missing", text, error.value) from None
    except json.JSONDecodeError as error:
        raise _unsound(error.msg, text, error.pos) from None
    except RecursionError:
        raise BadRequest("the body is not acceptable JSON: nested too deeply") from None
    except ValueError:  # Python's own message tells its programmer what to do
        raise BadRequest("the body is not acceptable JSON: an integer of thousands of digits") from None
    if _skip_space(text, pos) != len(text):
        raise _unsound("extra data after the object", text, pos)


def _key(text: str, pos: int) -> tuple[str, int]:
    """The key that begins at ``pos``, and the place behind its colon. Raises BadRequest."""
    if text[pos : pos + 1] != '"':
        raise _unsound("a property name in double quotes is missing", text, pos)
    key, pos = scanstring(text, pos + 1, True)
    pos = _skip_space(text, pos)
    if text[pos : pos + 1] != ":":
        raise _unsound("a ':' is missing", text, pos)
    return key, pos + 1


def _skip_space(text: str, pos: int) -> int:
    match = WHITESPACE.match(text, pos)
    return match.end() if match else 0


def _unsound(problem: str, text: str, pos: int) -> BadRequest:
    line = text.count("\n", 0, pos) + 1
    return BadRequest(f"the body is not JSON: {problem} at line {line} column {pos - text.rfind(chr(10), 0, pos)}")


def parse_form_body(body: bytes, content_type: str) -> Turns[ParsedBody]:
    """Read a multipart/form-data body. Raises BadRequest unless its parts are sound and ``model`` is there once."""
    mark = _boundary(content_type)
    place: tuple[int, int] | None = None
    stream = False
    if not body.startswith(mark + b"\r\n"):
        start = body.find(b"\r\n" + mark + b"\r\n", 0, MAX_PREAMBLE_BYTES)
        if start < 0 or mark in body[:start]:
            raise BadRequest("the form does not start with its boundary")
        body = body[start + 2 :]  # a preamble has no meaning (RFC 2046, 5.1.1); the engine does not get it
    pos, parts = len(mark), 0
    while body[pos : pos + 2] == b"\r\n":
        parts += 1
        if parts > MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts")
        name, start, end = yield from _part(body, mark, pos)
        pos = end + 2 + len(mark)
        if name == b"model":
            if place is not None:
                raise BadRequest("the form has 'model' twice", param="model")
            place = (start, max(end, start))
        elif name == b"stream":
            stream = end - start < MAX_FLAG_BYTES and body[start:end].strip().lower() in (b"true", b"1")
    if body[pos : pos + 2] != b"--":
        raise BadRequest("the form does not end with its boundary")
    if place is None:
        return ParsedBody("", stream, body)
    return ParsedBody(_form_name(body, *place), stream, body, *place)


def _form_name(body: bytes, start: int, end: int) -> str:
    if end - start > 4 * LONGEST_NAME:  # UTF-8 takes at most four bytes for a character
        raise BadRequest(TOO_LONG_A_NAME, param="model")
    try:
        return model_name(body[start:end].decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("'model' is not UTF-8", param="model") from None


def _part(body: bytes, mark: bytes, pos: int) -> Turns[tuple[bytes, int, int]]:
    """The part whose head begins at ``pos``: its field's name, and where the content starts and ends."""
    head_end = body.find(b"\r\n\r\n", pos, pos + MAX_PART_HEAD_BYTES)
    if head_end < 0:
        raise BadRequest("the form ends in the middle of a part, or a part's head is too long")
    end = yield from _find_in_turns(body, b"\r\n" + mark, head_end + 2)
    return _field_name(body[pos : head_end + 2]), head_end + 4, end


def _boundary(content_type: str) -> bytes:
    """The delimiter between the parts, with its two hyphens. Raises BadRequest."""
    boundary = re.search(BOUNDARY, content_type)
    if boundary is None or len(re.findall(r"boundary\*?=", content_type, re.IGNORECASE)) != 1:
        raise BadRequest("the Content-Type of a multipart body must have one boundary")
    if re.search(CHARSET, content_type):  # the names, too, are read in it
        raise BadRequest("the form must be in UTF-8")
    return b"--" + (boundary[1] or boundary[2]).encode("latin-1")


def _find_in_turns(body: bytes, sought: bytes, pos: int) -> Turns[int]:
    """Where ``sought`` begins in ``body`` from ``pos`` on; the loop serves others after each ``SLICE_BYTES``."""
    while (found := body.find(sought, pos, pos + SLICE_BYTES + len(sought))) < 0:
        pos += SLICE_BYTES
        if pos >= len(body):
            raise BadRequest("the form ends in the middle of a part")
        yield
    return found


def has_one_name(disposition: bytes, quoted: bytes) -> bool:
    """Whether a disposition has one name, and its first ``name=`` is that: a file may be called ``a; name=model``."""
    inside = [match.span() for match in re.finditer(quoted, disposition) if match[1] == b'"']
    masked = bytearray(disposition)
    for start, end in inside:
        masked[start + 1 : end - 1] = b"x" * (end - start - 2)
    if re.search(EXTENDED_NAME, masked):
        return False
    names, first = re.findall(FIELD_OF_DISPOSITION, masked), re.search(FIELD_OF_DISPOSITION, disposition)
    return len(names) == 1 and first is not None and not any(start < first.start() < end for start, end in inside)


def _field_name(head: bytes) -> bytes:
    """The name in a part's head. Raises BadRequest for a head that another reader could read in another way."""
    if re.fullmatch(PART_HEAD, head) is None:
        raise BadRequest("the head of a part of the form is malformed: lines end with CRLF, fields are NAME: VALUE")
    lines = re.findall(DISPOSITION, head)
    names = re.findall(FIELD_OF_DISPOSITION, lines[0]) if len(re.findall(DISPOSITIONS, head)) == len(lines) == 1 else []
    if not names or not all(has_one_name(lines[0], quoted) for quoted in QUOTED):
        raise BadRequest("a part of the form must have one Content-Disposition, of form-data, with one name")
    name = bytes(names[0][0] or names[0][1])
    if re.fullmatch(FIELD_NAME, name) is None:
        raise BadRequest("a field's name in the form must be printable ASCII without quotes, % and backslashes")
    if re.search(ENCODED, head):
        raise BadRequest("the parts of the form must be sent as they are, not with a Content-Transfer-Encoding")
    return name
