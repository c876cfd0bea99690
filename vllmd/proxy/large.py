"""Find the ``model`` of a JSON body of megabytes, in turns of the event loop.

``json.loads`` of such a body would hold the loop, and every stream with it, for tens of milliseconds. So only its
structure is read: where strings begin and end, and how deep the brackets are. Whether the values between them are
sound JSON is left to the engine. A body that an engine can read has the same ``model`` for both readers.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

from vllmd.config.types import RequestRules
from vllmd.errors import BadRequest
from vllmd.proxy.peek import KEEP_ALIVE, NO_NAME, SLICE_BYTES, ParsedBody, T, Turns, model_name, object_after_rules
from vllmd.proxy.system_prompt import Prompt

LARGE_BYTES = 1 << 20  # reading so much in one go takes some ten milliseconds
STEPS_PER_TURN = 1000  # strings and brackets

STRUCTURE = re.compile(rb'["{}\[\]]')
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 256, 32 << 10  # of the inside of a value, read as a whole
SHORT_STRING_BYTES = 1 << 10  # most strings are shorter
NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
DELTA = tuple(1 if byte in b"{[" else -1 for byte in range(256))
NO_SPACE = re.compile(rb"[^ \t\r\n]")
NAME = re.compile(rb'"(?:[^"\\]|\\.){0,4096}"|null(?=[ \t\r\n,}])')
SMALL = re.compile(rb'"[^"\\\x00-\x1f]{0,64}"|-?[0-9]{1,16}(?:\.[0-9]{1,16})?(?=[ \t\r\n,}])|null|true|false')
MAX_DEPTH = 500  # brackets within brackets; engines' own readers give up at about twice that, some of them by crashing
MAX_KEY_BYTES = 1024  # a name whose letters are all escaped (\u006d) takes six bytes for each
MAX_MEMBERS = 10_000
TOO_DEEP = "the body is not acceptable JSON: nested too deeply"
MAX_STEPS = 3 * MAX_MEMBERS  # strings and brackets of the object itself
QUOTE = 0x22
BETWEEN = b" \t\r\n,"  # what may stand between a member's value and the next key


async def in_turns(work: Turns[T]) -> T:
    """Do the work. At each ``yield`` of it the event loop serves others."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        await asyncio.sleep(0)


def parse_large_json_body(body: bytes) -> Turns[ParsedBody]:
    """As ``peek.parse_json_body``. Raises BadRequest if it is no JSON object with at most one ``model``, a string."""
    parsed = ParsedBody("", False, body)

    def read_member(start: int, end: int, value: int) -> None:
        nonlocal parsed
        parsed = _with_member(parsed, body[start:end], value)

    yield from _walk(body, read_member)
    return parsed


def apply_rules_large(body: bytes, rules: RequestRules, prompt: Prompt | None = None) -> Turns[bytes]:
    """As ``peek.apply_rules``, for a body that ``parse_large_json_body`` has read. Raises BadRequest."""
    members: list[tuple[int, int, int]] = []

    def note(start: int, end: int, value: int) -> None:
        if len(members) == MAX_MEMBERS:
            raise BadRequest(f"the body has more than {MAX_MEMBERS} members")
        members.append((start, end, value))

    close = yield from _walk(body, note)
    ends = [start for start, _, _ in members[1:]] + [close]
    view, kept = memoryview(body), {}
    for (start, end, value), until in zip(members, ends, strict=False):
        until = yield from _value_end(body, value, until)
        key = body[start:end]
        kept[_text(key) if len(key) <= MAX_KEY_BYTES else key.decode("latin-1")] = view[start:until]
    return object_after_rules(kept, rules, prompt)


def _walk(body: bytes, member: Callable[[int, int, int], None]) -> Turns[int]:
    """Walk to the object's closing bracket, and return its place.

    ``member`` is called for each of its members: where the key starts and ends, and where the value starts.
    """
    start = yield from _skip_space(body, 0)
    if body[start : start + 1] != b"{":
        raise BadRequest("the body is not a JSON object")
    depth, pos, steps, mark_pos, next_skip, size = 0, start, 0, 0, 0, MIN_PIECE_BYTES
    while depth or not steps:
        # 1. The inside of a member's value is passed over in pieces; what is left of it, step by step.
        if depth > 1 and pos >= next_skip:
            depth, pos, size = yield from _skip_inside(body, pos, depth, size)
            next_skip = pos + MIN_PIECE_BYTES
        steps += depth < 2
        if steps > MAX_STEPS:
            raise BadRequest(f"the body has more than {MAX_MEMBERS} members")
        if steps % STEPS_PER_TURN == 0:
            yield
        # 2. The next quote or bracket.
        mark_pos = yield from _find(STRUCTURE, body, pos)
        mark, pos = body[mark_pos], mark_pos + 1
        if mark != QUOTE:
            depth += 1 if mark in b"{[" else -1
            if depth > MAX_DEPTH:
                raise BadRequest(TOO_DEEP)
            continue
        # 3. A string. In the object itself it is a key, for a value that is a string is passed over with its key.
        pos = yield from _string_end(body, pos)
        if depth == 1:
            pos = yield from _pass_member(body, mark_pos, pos, member)
    if (yield from _skip_space(body, pos)) != len(body):
        raise BadRequest(f"the body is not JSON: extra data after the object, at byte {pos}")
    return mark_pos


def _pass_member(body: bytes, start: int, end: int, member: Callable[[int, int, int], None]) -> Turns[int]:
    """Call ``member`` for the key from ``start`` to ``end``. Returns its value's start, or, if a string, its end."""
    pos = yield from _skip_space(body, end)
    if body[pos : pos + 1] != b":":
        return pos
    pos = yield from _skip_space(body, pos + 1)
    member(start, end, pos)
    return (yield from _string_end(body, pos + 1)) if body[pos : pos + 1] == b'"' else pos


def _skip_inside(body: bytes, pos: int, depth: int, size: int) -> Turns[tuple[int, int, int]]:
    """Pass over the inside of a member's value, from a ``pos`` outside of strings, in pieces.

    One Python step for each bracket would keep a core busy for a quarter of a minute, if a body has nothing but
    brackets. Here the interpreter's own loops (``split``, ``translate``, ``accumulate``) do it for a whole piece.
    ``size``: bytes of the piece that went well the last time. Returns the depth, the place and the next such size. It
    stops where a piece would go beyond the value, or into a string that is larger than a piece.
    """
    while pos < len(body):
        piece = _mask_escapes(body[pos : pos + size])
        parts = piece.split(b'"')  # every second part is inside a string
        end = len(piece) if len(parts) % 2 else piece.rindex(b'"')  # before a string that is cut off
        outside = b"".join(parts[::2]).translate(None, NO_BRACKETS)
        depths = list(accumulate(map(DELTA.__getitem__, outside), initial=depth))
        if end and min(depths) > 1:
            if max(depths) > MAX_DEPTH:
                raise BadRequest(TOO_DEEP)
            pos, depth, size = pos + end, depths[-1], min(2 * size, MAX_PIECE_BYTES)
            yield
        elif size > MIN_PIECE_BYTES:
            size //= 4
        else:
            break
    return depth, pos, max(size, MIN_PIECE_BYTES)


def _mask_escapes(text: bytes) -> bytes:
    """``text`` with escaped backslashes and quotes masked, byte for byte. It must not begin within an escape."""
    return text.replace(b"\\\\", b"..").replace(b'\\"', b"..") if b"\\" in text else text


def _skip_space(body: bytes, pos: int) -> Turns[int]:
    """The place of the next byte that is no white space; the body's end if there is none."""
    found = yield from _search(NO_SPACE, body, pos)
    return len(body) if found < 0 else found


def _search(pattern: re.Pattern[bytes], body: bytes, pos: int) -> Turns[int]:
    """Where ``pattern`` first matches from ``pos`` on, -1 if nowhere; the loop serves others after each slice."""
    while pos < len(body):
        match = pattern.search(body, pos, pos + SLICE_BYTES)
        if match:
            return match.start()
        pos += SLICE_BYTES
        yield
    return -1


def _value_end(body: bytes, start: int, end: int) -> Turns[int]:
    """The end of the value from ``start``, which is followed at ``end`` by the next key or the closing bracket."""
    while end > start:
        piece = body[max(start, end - SLICE_BYTES) : end]
        kept = len(piece.rstrip(BETWEEN))
        if kept:
            return end - len(piece) + kept
        end -= len(piece)
        yield
    return end


def _find(pattern: re.Pattern[bytes], body: bytes, pos: int) -> Turns[int]:
    """As ``_search``. Raises BadRequest where there is no match."""
    found = yield from _search(pattern, body, pos)
    if found >= 0:
        return found
    raise BadRequest("the body is not JSON: it ends in the middle")


def _string_end(body: bytes, pos: int) -> Turns[int]:
    """The place after the closing quote of the string whose content starts at ``pos``."""
    size = SHORT_STRING_BYTES
    while pos < len(body):
        piece = _mask_escapes(body[pos : pos + size])
        end = piece.find(b'"')
        if end >= 0:
            return pos + end + 1
        step = len(piece) - piece.endswith(b"\\")  # a backslash stays with the character that it escapes
        if not step:
            break
        pos, size = pos + step, SLICE_BYTES
        yield
    raise BadRequest("the body is not JSON: it ends in the middle")


def _with_member(parsed: ParsedBody, key: bytes, start: int) -> ParsedBody:
    """``parsed`` with the object's member ``key``, whose value starts at ``start``."""
    # A key beyond the limit is none of those below, and stays as it is spelled.
    name, body = _text(key) if len(key) <= MAX_KEY_BYTES else "", parsed.raw
    if name == "stream":
        return replace(parsed, stream=body[start : start + 4] == b"true")
    if name == "stream_options":
        try:
            options = json.JSONDecoder().raw_decode(body[start : start + MAX_KEY_BYTES].decode("latin-1"))[0]
        except (ValueError, RecursionError):
            options = []  # too large for options: a value that is refused like any that is no object
        return replace(parsed, stream_options=(options,))
    if name in KEEP_ALIVE:
        small = SMALL.match(body, start)
        return replace(parsed, keep_alive=(json.loads(small[0]) if small else [],))
    if name != "model":
        return parsed
    if parsed.name_end:
        raise BadRequest("the body has 'model' twice", param="model")
    value = NAME.match(body, start)
    if value is None:
        raise BadRequest(NO_NAME, param="model")
    model = model_name(None if value[0] == b"null" else _text(value[0]))
    return replace(parsed, model=model, name_start=start, name_end=value.end(), quoted=True)


def _text(string: bytes) -> str:
    try:
        return str(json.loads(string))
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error} in {string[:80]!r}") from None
