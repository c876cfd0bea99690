"""Find the ``model`` of a body that is too large to be read in one go while everybody else waits.

Only its structure is read: where strings begin and end, and how deep the brackets are. What stands between them
(and whether it is sound JSON) is the engine's to judge; no sound body means anything else to it.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

from vllmd.errors import BadRequest
from vllmd.proxy.gate import Rules
from vllmd.proxy.peek import KEEP_ALIVE, NO_NAME, SLICE, Asked, T, Turns, model_name, with_rules
from vllmd.proxy.system_prompt import Prompt

LARGE = 1 << 20  # bytes; reading so much takes some ten milliseconds
STEPS = 1000  # strings and brackets between two turns

STRUCTURE = re.compile(rb'["{}\[\]]')
LEAST, BULK = 256, 32 << 10  # bytes of the inside of a value that are looked at as a whole
SHORT = 1 << 10  # bytes in which most strings end
NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
DELTA = tuple(1 if byte in b"{[" else -1 for byte in range(256))
NO_SPACE = re.compile(rb"[^ \t\r\n]")
NAME = re.compile(rb'"(?:[^"\\]|\\.){0,4096}"|null(?=[ \t\r\n,}])')
SMALL = re.compile(rb'"[^"\\\x00-\x1f]{0,64}"|-?[0-9]{1,16}(?:\.[0-9]{1,16})?(?=[ \t\r\n,}])|null|true|false')
DEEPEST = 500  # brackets within brackets; engines' own readers give up at about twice that, not all of them gracefully
LONGEST_KEY = 1024  # bytes; with every letter spelled by number a name has six times its letters
MOST_MEMBERS = 10_000
TOO_DEEP = "the body is not acceptable JSON: nested too deeply"
MOST_STEPS = 3 * MOST_MEMBERS  # strings and brackets of the object itself
QUOTE = 0x22
BETWEEN = b" \t\r\n,"  # what may stand between a member's value and the next key


async def in_turns(work: Turns[T]) -> T:
    """Do the work, letting everybody else have their turn in between."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        await asyncio.sleep(0)


def in_large(body: bytes) -> Turns[Asked]:
    """As ``peek.in_json``. Raises BadRequest if it is no JSON object with at most one ``model``, a string."""
    asked = Asked("", False, body)

    def look(start: int, end: int, value: int) -> None:
        nonlocal asked
        asked = _member(asked, body[start:end], value)

    yield from _walk(body, look)
    return asked


def ruled_large(body: bytes, rules: Rules, prompt: Prompt | None = None) -> Turns[bytes]:
    """As ``peek.ruled``, of a body that ``in_large`` has read. Raises BadRequest if it has too many members."""
    members: list[tuple[int, int, int]] = []

    def note(start: int, end: int, value: int) -> None:
        if len(members) == MOST_MEMBERS:
            raise BadRequest(f"the body has more than {MOST_MEMBERS} members")
        members.append((start, end, value))

    close = yield from _walk(body, note)
    ends = [start for start, _, _ in members[1:]] + [close]
    view, kept = memoryview(body), {}
    for (start, end, value), until in zip(members, ends, strict=False):
        until = yield from _stripped(body, value, until)
        kept[_key(body[start:end])] = view[start:until]
    return with_rules(kept, rules, prompt)


def _walk(body: bytes, member: Callable[[int, int, int], None]) -> Turns[int]:
    """To the object's closing bracket, whose place it returns.

    ``member`` is told of each of its members: where the key starts and ends, and where the value starts.
    """
    start = yield from _past_space(body, 0)
    if body[start : start + 1] != b"{":
        raise BadRequest("the body is not a JSON object")
    depth, pos, steps, found, looked, size = 0, start, 0, 0, 0, LEAST
    while depth or not steps:
        if depth > 1 and pos >= looked:
            depth, pos, size = yield from _inside(body, pos, depth, size)
            looked = pos + LEAST
        steps += depth < 2
        if steps > MOST_STEPS:
            raise BadRequest(f"the body has more than {MOST_MEMBERS} members")
        if steps % STEPS == 0:
            yield
        found = yield from _find(STRUCTURE, body, pos)
        mark, pos = body[found], found + 1
        if mark != QUOTE:
            depth += 1 if mark in b"{[" else -1
            if depth > DEEPEST:
                raise BadRequest(TOO_DEEP)
            continue
        pos = yield from _string_end(body, pos)
        if depth == 1:
            pos = yield from _value(body, found, pos, member)
    if (yield from _past_space(body, pos)) != len(body):
        raise BadRequest(f"the body is not JSON: extra data after the object, at byte {pos}")
    return found


def _value(body: bytes, start: int, end: int, member: Callable[[int, int, int], None]) -> Turns[int]:
    """Behind the key from ``start`` to ``end``: tell ``member``. Returns the place of the value, or a text's end."""
    pos = yield from _past_space(body, end)
    if body[pos : pos + 1] != b":":
        return pos
    pos = yield from _past_space(body, pos + 1)
    member(start, end, pos)
    # A text is no key, whatever is in it.
    return (yield from _string_end(body, pos + 1)) if body[pos : pos + 1] == b'"' else pos


def _inside(body: bytes, pos: int, depth: int, size: int) -> Turns[tuple[int, int, int]]:
    """Go through the inside of a member's value, ``pos`` being in no string, in pieces as large as its end allows.

    What costs a step for each bracket and string elsewhere is done by the interpreter's own loops here: a body of
    nothing but brackets would keep a core busy for a quarter of a minute. ``size``: bytes of a piece that went well the
    last time. Returns the depth, the place and the next such size; the rest, up to the end of the value or into a
    string that is larger than a piece, has to be gone through step by step.
    """
    while pos < len(body):
        piece = _without_escapes(body[pos : pos + size])
        parts = piece.split(b'"')
        end = len(piece) if len(parts) % 2 else piece.rindex(b'"')  # before a string that is cut off
        outside = b"".join(parts[::2]).translate(None, NO_BRACKETS)
        depths = list(accumulate(map(DELTA.__getitem__, outside), initial=depth))
        if end and min(depths) > 1:
            if max(depths) > DEEPEST:
                raise BadRequest(TOO_DEEP)
            pos, depth, size = pos + end, depths[-1], min(2 * size, BULK)
            yield
        elif size > LEAST:
            size //= 4
        else:
            break
    return depth, pos, max(size, LEAST)


def _without_escapes(text: bytes) -> bytes:
    """As long as ``text``, which begins with no second half of one; no quote in it is escaped."""
    return text.replace(b"\\\\", b"..").replace(b'\\"', b"..") if b"\\" in text else text


def _past_space(body: bytes, pos: int) -> Turns[int]:
    """The place of the next byte that is no white space; the body's end if there is none."""
    found = yield from _search(NO_SPACE, body, pos)
    return len(body) if found < 0 else found


def _search(what: re.Pattern[bytes], body: bytes, pos: int) -> Turns[int]:
    """Where ``what`` begins from ``pos`` on, -1 if nowhere; others have their turn after each ``SLICE``."""
    while pos < len(body):
        found = what.search(body, pos, pos + SLICE)
        if found:
            return found.start()
        pos += SLICE
        yield
    return -1


def _stripped(body: bytes, start: int, end: int) -> Turns[int]:
    """Where the value ends that starts at ``start``, without what stands between it and the next key at ``end``."""
    while end > start:
        piece = body[max(start, end - SLICE) : end]
        kept = len(piece.rstrip(BETWEEN))
        if kept:
            return end - len(piece) + kept
        end -= len(piece)
        yield
    return end


def _find(what: re.Pattern[bytes], body: bytes, pos: int) -> Turns[int]:
    """As ``_search``. Raises BadRequest where there is none."""
    found = yield from _search(what, body, pos)
    if found >= 0:
        return found
    raise BadRequest("the body is not JSON: it ends in the middle")


def _string_end(body: bytes, pos: int) -> Turns[int]:
    """The place after the closing quote of the string whose content starts at ``pos``."""
    size = SHORT
    while pos < len(body):
        piece = _without_escapes(body[pos : pos + size])
        end = piece.find(b'"')
        if end >= 0:
            return pos + end + 1
        step = len(piece) - piece.endswith(b"\\")  # half an escape is looked at with its other half
        if not step:
            break
        pos, size = pos + step, SLICE
        yield
    raise BadRequest("the body is not JSON: it ends in the middle")


def _member(asked: Asked, key: bytes, start: int) -> Asked:
    """``asked`` with what the member of the object says whose value starts at ``start``."""
    name = _key(key)
    if name == "stream":
        return replace(asked, stream=asked.body[start : start + 4] == b"true")
    if name == "stream_options":
        return replace(asked, stream_options=(_object(asked.body, start),))
    if name in KEEP_ALIVE:
        return replace(asked, keep_alive=(_small(asked.body, start),))
    if name != "model":
        return asked
    if asked.end:
        raise BadRequest("the body has 'model' twice", param="model")
    value = NAME.match(asked.body, start)
    if value is None:
        raise BadRequest(NO_NAME, param="model")
    model = model_name(None if value[0] == b"null" else _text(value[0]))
    return replace(asked, model=model, start=start, end=value.end(), quoted=True)


def _small(body: bytes, start: int) -> object:
    """The number, string or word that is the value at ``start``; a list for anything else."""
    found = SMALL.match(body, start)
    return json.loads(found[0]) if found else []


def _object(body: bytes, start: int) -> object:
    """The value at ``start`` if it is a small one; else a list, which is what nobody takes for options."""
    try:
        return json.JSONDecoder().raw_decode(body[start : start + LONGEST_KEY].decode("latin-1"))[0]
    except (ValueError, RecursionError):
        return []


def _key(string: bytes) -> str:
    """What a key says; an endless one is none that anybody here knows, and is left as it is spelled."""
    return _text(string) if len(string) <= LONGEST_KEY else string.decode("latin-1")


def _text(string: bytes) -> str:
    try:
        return str(json.loads(string))
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error} in {string[:80]!r}") from None
