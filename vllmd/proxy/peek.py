"""Find the ``model`` of a request's body, and put another name there without touching any other byte.

JSON is walked member by member at the top level with the standard library's own scanner, so a value is skipped
at C speed, the whole body is known to be sound JSON, and the place of the name is known. What two readers could
take for two different models (a repeated ``model``) is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import TypeVar

from vllmd.api.names import LONGEST_NAME, TOO_LONG_A_NAME
from vllmd.errors import BadRequest
from vllmd.frozen import frozen
from vllmd.proxy.gate import Rules
from vllmd.proxy.system_prompt import Prompt

# A body costs memory and time by its pieces, not its bytes: so many brackets and commas are taken, no more.
MAX_PIECES = 4_000_000
PIECES_CHECKED_FROM = 1 << 20  # bytes; a smaller body cannot have too many

SLICE = 256 << 10  # bytes looked at between two turns of the loop
MOST_PARTS = 1000  # of a form; servers of Python's commonly take as many
LONGEST_PART_HEAD = 16 << 10  # bytes of the fields before a part's content
LONGEST_PREAMBLE = 16 << 10  # bytes before a form's first part
KEEP_ALIVE = ("keep_alive", "ttl")  # two names of one member that is ours, see ``proxy.keep_alive``
NO_NAME = "'model' must be a string that names a model"
LONGEST_FLAG = 64  # bytes of a field that says true or false

WHITESPACE = re.compile(r"[ \t\n\r]*")
MODEL_KEY = re.compile(r'"model"[ \t\n\r]*:[ \t\n\r]*(?=")')
BOUNDARY = re.compile(r';[ \t]*boundary=(?:"([^"\\]{1,70})"|([A-Za-z0-9\'()+_,./:=?-]{1,70}))\s*(?:;|$)', re.IGNORECASE)
# A part's head, as every reader understands it: no line end but CRLF, nothing before the colon, no folded line.
PART_HEAD = re.compile(rb"(?:\r\n[A-Za-z0-9-]+:[\t\x20-\x7e\x80-\xff]*)+\r\n")
DISPOSITION = re.compile(rb"\r\ncontent-disposition:[ \t]*form-data[ \t]*(;[^\r\n]*)", re.IGNORECASE)
DISPOSITIONS = re.compile(rb"\r\ncontent-disposition:", re.IGNORECASE)
ENCODED = re.compile(rb"\r\ncontent-transfer-encoding:(?![ \t]*(?:7bit|8bit|binary)[ \t]*\r\n)", re.IGNORECASE)
FIELD_NAME = re.compile(rb"[ !#$&-\[\]-~]+")  # what some reader would unescape ('%', '\\'), or spell otherwise, is none
CHARSET = re.compile(r";[ \t]*charset\*?=(?!\"?(?:utf-?8|us-ascii)\"?[ \t]*(?:;|$))", re.IGNORECASE)
EXTENDED_NAME = re.compile(rb"[; \t]name\*", re.IGNORECASE)  # RFC 8187's; forms do not have it (RFC 7578, 4.2)
FIELD_OF_DISPOSITION = re.compile(rb'[; \t]name[ \t]*=[ \t]*(?:"([^"]*)"|([^"; \t]+))', re.IGNORECASE)
# What stands in quotes, as the two kinds of reader see its end: a backslash escapes a quote, or it does not (WHATWG).
# What has no end is found to the end of the line, lest each quote in it is the beginning of one more look.
QUOTED = (re.compile(rb'"(?:[^"\\]|\\.)*("|\\?\Z)'), re.compile(rb'"[^"]*("|\Z)'))

T = TypeVar("T")
Turns = Generator[None, None, T]  # yields where others may have their turn
Parts = tuple[bytes | memoryview, ...]  # of one body, in their order

_scan_once = json.JSONDecoder().scan_once  # type: ignore[attr-defined]


@frozen
class Asked:
    """What a body asks for: ``model`` ("" if it names none) and whether the answer shall be streamed.

    ``body`` has the name, if at all, from byte ``start`` to ``end``; ``quoted``: as a JSON string. ``keep_alive`` and
    ``stream_options``: what it says of that, whatever it is; () if it says nothing.
    """

    model: str
    stream: bool
    body: bytes
    start: int = 0
    end: int = 0
    quoted: bool = False
    keep_alive: tuple[object, ...] = ()
    stream_options: tuple[object, ...] = ()

    def renamed(self, name: str) -> Parts:
        """The body with ``name`` in the place of the model's; a body without one is left alone.

        As parts that follow each other: a body of 64 MiB is not copied for the sake of a name.
        """
        if name == self.model or not self.end:
            return (self.body,)
        view = memoryview(self.body)
        return view[: self.start], (json.dumps(name) if self.quoted else name).encode(), view[self.end :]


def in_json(body: bytes) -> Asked:
    """Read a JSON body. Raises BadRequest if it is no sound JSON object with at most one ``model``, a string."""
    if len(body) > PIECES_CHECKED_FROM:
        _refuse_too_many_pieces(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    return _spelled_once(body, text) or _walked(body, text)


def _spelled_once(body: bytes, text: str) -> Asked | None:
    """The common case: ``"model"`` stands there once, and no letter is spelled by number, so no other key is that.

    The standard library reads it in one go then. None if it is not that case, and also if anything is wrong: whoever
    walks it can say what and where.
    """
    if text.count('"model"') != 1 or "\\u00" in text:
        return None
    try:
        members, end = _scan_once(text, 0)
    except (StopIteration, ValueError, RecursionError):
        return None
    if end != len(text) or not isinstance(members, dict) or not isinstance(members.get("model"), str):
        return None
    key = MODEL_KEY.search(text)
    if key is None:
        return None
    start, stop = key.end(), scanstring(text, key.end() + 1, True)[1]
    if len(text) != len(body):
        start, stop = len(text[:start].encode()), len(text[:stop].encode())
    keep = ()
    if "keep_alive" in members or "ttl" in members:
        keep = tuple(members[name] for name in KEEP_ALIVE if name in members)
    stream = members.get("stream") is True
    options = (members["stream_options"],) if stream and "stream_options" in members else ()
    return Asked(model_name(members["model"]), stream, body, start, stop, True, keep, options)


def _walked(body: bytes, text: str) -> Asked:
    found: tuple[str, int, int] | None = None
    stream, keep = False, dict[str, object]()
    options: tuple[object, ...] = ()
    for key, value, start, end in _members(text):
        if key == "model":
            if found is not None:
                raise BadRequest("the body has 'model' twice", param="model")
            found = (model_name(value), start, end)
        elif key == "stream":
            stream = value is True
        elif key == "stream_options":
            options = (value,)
        elif key in KEEP_ALIVE:
            keep[key] = value
    told = tuple(keep[key] for key in KEEP_ALIVE if key in keep)
    if found is None:
        return Asked("", stream, body, keep_alive=told, stream_options=options)
    name, start, end = found
    return Asked(name, stream, body, len(text[:start].encode()), len(text[:end].encode()), True, told, options)


def ruled(body: bytes, rules: Rules, prompt: Prompt | None = None) -> bytes:
    """A sound JSON body after ``rules``; every member that they do not name keeps its bytes."""
    text = body.decode("utf-8")
    kept = {key: f"{json.dumps(key)}:{text[start:end]}".encode() for key, _, start, end in _members(text)}
    return with_rules(kept, rules, prompt)


def with_rules(members: Mapping[str, bytes | memoryview], rules: Rules, prompt: Prompt | None = None) -> bytes:
    """The object of these members, each whole, after ``rules``, and with the ``prompt`` that they ask for."""
    left = {key: member for key, member in members.items() if key not in rules.strip}
    if prompt is not None:
        left = prompt.before(left)
    kept: list[bytes | memoryview] = []
    for key, member in left.items():
        if key not in rules.set:
            kept.extend((b",", member))
    absent = {key: value for key, value in rules.default.items() if key not in left}
    for key, value in {**absent, **rules.set}.items():
        kept.extend((b",", f"{json.dumps(key)}:{json.dumps(value)}".encode()))
    return b"".join((b"{", *kept[1:], b"}"))  # one copy, whatever the size


def _refuse_too_many_pieces(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") + body.count(b",") > MAX_PIECES:
        raise BadRequest(f"the body has more than {MAX_PIECES} elements")


def model_name(value: object) -> str:
    """``value`` if it can be a model's name, "" if it is null or empty: that names none. Raises BadRequest."""
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
    """The members of the object that ``text`` is: key, value, and where the value starts and ends."""
    skip = WHITESPACE.match
    pos = _end(skip(text, 0))
    if text[pos : pos + 1] != "{":
        raise BadRequest("the body is not a JSON object")
    pos = _end(skip(text, pos + 1))
    if text[pos : pos + 1] == "}":
        pos, more = pos + 1, False
    else:
        more = True
    try:
        while more:
            key, pos = _key(text, pos)
            start = _end(skip(text, pos))
            value, pos = _scan_once(text, start)
            yield key, value, start, pos
            pos = _end(skip(text, pos))
            more = _comma(text, pos)
            pos = _end(skip(text, pos + 1)) if more else pos + 1
    except StopIteration as error:
        raise _unsound("a value is missing", text, error.value) from None
    except json.JSONDecodeError as error:
        raise _unsound(error.msg, text, error.pos) from None
    except RecursionError:
        raise BadRequest("the body is not acceptable JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadRequest(f"the body is not acceptable JSON: {error}") from None
    if _end(skip(text, pos)) != len(text):
        raise _unsound("extra data after the object", text, pos)


def _end(match: re.Match[str] | None) -> int:
    return match.end() if match else 0


def _key(text: str, pos: int) -> tuple[str, int]:
    if text[pos : pos + 1] != '"':
        raise _unsound("a property name in double quotes is missing", text, pos)
    key, pos = scanstring(text, pos + 1, True)
    pos = _end(WHITESPACE.match(text, pos))
    if text[pos : pos + 1] != ":":
        raise _unsound("a ':' is missing", text, pos)
    return key, pos + 1


def _comma(text: str, pos: int) -> bool:
    mark = text[pos : pos + 1]
    if mark not in (",", "}"):
        raise _unsound("a ',' or '}' is missing", text, pos)
    return mark == ","


def _unsound(what: str, text: str, pos: int) -> BadRequest:
    line = text.count("\n", 0, pos) + 1
    return BadRequest(f"the body is not JSON: {what} at line {line} column {pos - text.rfind(chr(10), 0, pos)}")


def in_multipart(body: bytes, content_type: str) -> Turns[Asked]:
    """Read a multipart/form-data body. Raises BadRequest unless its parts are sound and ``model`` is there once."""
    mark = _boundary(content_type)
    place: tuple[int, int] | None = None
    stream = False
    if not body.startswith(mark + b"\r\n"):
        start = body.find(b"\r\n" + mark + b"\r\n", 0, LONGEST_PREAMBLE)
        if start < 0 or mark in body[:start]:
            raise BadRequest("the form does not start with its boundary")
        body = body[start + 2 :]  # a preamble means nothing (RFC 2046, 5.1.1); the engine does not get it
    pos, parts = len(mark), 0
    while body[pos : pos + 2] == b"\r\n":
        parts += 1
        if parts > MOST_PARTS:
            raise BadRequest(f"the form has more than {MOST_PARTS} parts")
        name, start, end = yield from _part(body, mark, pos)
        pos = end + 2 + len(mark)
        if name == b"model":
            if place is not None:
                raise BadRequest("the form has 'model' twice", param="model")
            place = (start, max(end, start))
        elif name == b"stream":
            stream = end - start < LONGEST_FLAG and body[start:end].strip().lower() in (b"true", b"1")
    if body[pos : pos + 2] != b"--":
        raise BadRequest("the form does not end with its boundary")
    if place is None:
        return Asked("", stream, body)
    return Asked(_form_name(body, *place), stream, body, *place)


def _boundary(content_type: str) -> bytes:
    """What stands between the parts, with its hyphens."""
    boundary = BOUNDARY.search(content_type)
    if boundary is None or len(re.findall(r"boundary\*?=", content_type, re.IGNORECASE)) != 1:
        raise BadRequest("the Content-Type of a multipart body must have one boundary")
    if CHARSET.search(content_type):  # the names, too, are read in it
        raise BadRequest("the form must be in UTF-8")
    return b"--" + (boundary[1] or boundary[2]).encode("latin-1")


def _part(body: bytes, mark: bytes, pos: int) -> Turns[tuple[bytes, int, int]]:
    """The part whose head begins at ``pos``: its field's name, and where the content starts and ends."""
    head_end = body.find(b"\r\n\r\n", pos, pos + LONGEST_PART_HEAD)
    if head_end < 0:
        raise BadRequest("the form ends in the middle of a part, or a part's head is endless")
    end = yield from _find_in_turns(body, b"\r\n" + mark, head_end + 2)
    return _field(body[pos : head_end + 2]), head_end + 4, end


def _form_name(body: bytes, start: int, end: int) -> str:
    if end - start > 4 * LONGEST_NAME:  # UTF-8 takes at most four bytes for a character
        raise BadRequest(TOO_LONG_A_NAME, param="model")
    try:
        return model_name(body[start:end].decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("'model' is not UTF-8", param="model") from None


def _find_in_turns(body: bytes, what: bytes, pos: int) -> Turns[int]:
    """Where ``what`` begins in ``body`` from ``pos`` on; others have their turn after each ``SLICE``."""
    while (found := body.find(what, pos, pos + SLICE + len(what))) < 0:
        pos += SLICE
        if pos >= len(body):
            raise BadRequest("the form ends in the middle of a part")
        yield
    return found


def _is_first_name(line: bytes, quoted: re.Pattern[bytes]) -> bool:
    """Whether a disposition has one name and its first ``name=`` is that: a file may be called ``a; name=model``."""
    inside = [found.span() for found in quoted.finditer(line) if found[1] == b'"']
    veiled = bytearray(line)
    for start, end in inside:
        veiled[start + 1 : end - 1] = b"x" * (end - start - 2)
    if EXTENDED_NAME.search(veiled):
        return False
    bare, first = FIELD_OF_DISPOSITION.findall(veiled), FIELD_OF_DISPOSITION.search(line)
    return len(bare) == 1 and first is not None and not any(start < first.start() < end for start, end in inside)


def _field(head: bytes) -> bytes:
    """The name in a part's head. Raises BadRequest for a head that another reader could read in another way."""
    if PART_HEAD.fullmatch(head) is None:
        raise BadRequest("the head of a part of the form is malformed: lines end with CRLF, fields are NAME: VALUE")
    lines = DISPOSITION.findall(head)
    names = FIELD_OF_DISPOSITION.findall(lines[0]) if len(DISPOSITIONS.findall(head)) == len(lines) == 1 else []
    if not names or any(not _is_first_name(lines[0], quoted) for quoted in QUOTED):
        raise BadRequest("a part of the form must have one Content-Disposition, of form-data, with one name")
    name = bytes(names[0][0] or names[0][1])
    if FIELD_NAME.fullmatch(name) is None:
        raise BadRequest("a field's name in the form must be printable ASCII without quotes, % and backslashes")
    if ENCODED.search(head):
        raise BadRequest("the parts of the form must be sent as they are, not with a Content-Transfer-Encoding")
    return name
