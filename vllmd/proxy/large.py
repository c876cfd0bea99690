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

from vllmd.errors import BadRequest
from vllmd.proxy.gate import Rules
from vllmd.proxy.peek import KEEP_ALIVE, SLICE, Asked, T, Turns, model_name, with_rules
from vllmd.proxy.system_prompt import Prompt

LARGE = 1 << 20  # bytes; reading so much takes some ten milliseconds
STEPS = 1000  # strings, escapes and brackets between two turns

STRUCTURE = re.compile(rb'["{}\[\]]')
IN_STRING = re.compile(rb'["\\]')
NO_SPACE = re.compile(rb"[^ \t\r\n]")
NAME = re.compile(rb'"(?:[^"\\]|\\.){1,4096}"')
SMALL = re.compile(rb'"[^"\\\x00-\x1f]{0,64}"|-?[0-9]{1,16}(?:\.[0-9]{1,16})?(?=[ \t\r\n,}])|null|true|false')
DEEPEST = 500  # brackets within brackets; engines' own readers give up at about twice that, not all of them gracefully
LONGEST_KEY = 1024  # bytes; with every letter spelled by number a name has six times its letters
MOST_MEMBERS = 10_000
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
    depth, pos, steps, found = 0, start, 0, 0
    while depth or not steps:
        steps += 1
        if steps % STEPS == 0:
            yield
        found = yield from _find(STRUCTURE, body, pos)
        mark, pos = body[found], found + 1
        if mark != QUOTE:
            depth += 1 if mark in b"{[" else -1
            if depth > DEEPEST:
                raise BadRequest("the body is not acceptable JSON: nested too deeply")
            continue
        pos = yield from _string_end(body, pos)
        end = pos
        if depth == 1:
            pos = yield from _past_space(body, pos)
            if body[pos : pos + 1] == b":":
                pos = yield from _past_space(body, pos + 1)
                member(found, end, pos)
                if body[pos : pos + 1] == b'"':  # a value: whatever is in it, it is no key
                    pos = yield from _string_end(body, pos + 1)
    if (yield from _past_space(body, pos)) != len(body):
        raise BadRequest(f"the body is not JSON: extra data after the object, at byte {pos}")
    return found


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
    steps = 0
    while body[found := (yield from _find(IN_STRING, body, pos))] != QUOTE:
        pos = found + 2
        steps += 1
        if steps % STEPS == 0:
            yield
    return found + 1


def _member(asked: Asked, key: bytes, start: int) -> Asked:
    """``asked`` with what the member of the object says whose value starts at ``start``."""
    name = _key(key)
    if name == "stream":
        return replace(asked, stream=asked.body[start : start + 4] == b"true")
    if name in KEEP_ALIVE:
        return replace(asked, keep_alive=(_small(asked.body, start),))
    if name != "model":
        return asked
    if asked.end:
        raise BadRequest("the body has 'model' twice", param="model")
    value = NAME.match(asked.body, start)
    model = model_name(_text(value[0]) if value else None)
    return replace(asked, model=model, start=start, end=value.end() if value else start, quoted=True)


def _small(body: bytes, start: int) -> object:
    """The number, string or word that is the value at ``start``; a list for anything else."""
    found = SMALL.match(body, start)
    return json.loads(found[0]) if found else []


def _key(string: bytes) -> str:
    """What a key says; an endless one is none that anybody here knows, and is left as it is spelled."""
    return _text(string) if len(string) <= LONGEST_KEY else string.decode("latin-1")


def _text(string: bytes) -> str:
    try:
        return str(json.loads(string))
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error} in {string[:80]!r}") from None
