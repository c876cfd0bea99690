"""Arrivals in a compact form: five to eight bytes for each, so that weeks of traffic can be replayed.

A segment is what came between two writes: the names that occur, as JSON on one line, then for each request, in the
order of arrival, five numbers as variable-length integers: milliseconds since the one before, the index of its model
and of its key, tokens of its prompt and of its answer. All of it is compressed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

MOST_BYTES = 64 << 20  # of a segment, unpacked; a larger one is damaged


class Arrival(NamedTuple):
    """One request; ``at`` in Unix milliseconds."""

    at: int
    model: str
    key: str
    prompt: int
    answer: int


new_arrival = Arrival._make  # of the five values in one tuple; half of what the constructor takes


class Damaged(ValueError):
    """The bytes are no segment."""


def packed(arrivals: Iterable[Arrival]) -> tuple[int, bytes]:
    """The Unix milliseconds of the first arrival (0 for none), and the segment."""
    ordered = sorted(arrivals)
    models, keys = _indices(a[1] for a in ordered), _indices(a[2] for a in ordered)
    first = last = ordered[0][0] if ordered else 0
    out = bytearray(json.dumps([list(models), list(keys)], separators=(",", ":")).encode() + b"\n")
    for at, model, key, prompt, answer in ordered:
        numbers = at - last, models[model], keys[key], prompt, answer
        if max(numbers) <= 0x7F:  # the common case: a byte for each
            out += bytes(numbers)
        else:
            for number in numbers:
                while number > 0x7F:
                    out.append(number & 0x7F | 0x80)
                    number >>= 7
                out.append(number)
        last = at
    return first, zlib.compress(out, 1)


def unpacked(first: int, segment: bytes) -> Iterator[Arrival]:
    """The arrivals of a segment. Raises Damaged."""
    try:
        work = zlib.decompressobj()
        data = work.decompress(segment, MOST_BYTES)
        head, _, rest = data.partition(b"\n")
        models, keys = json.loads(head)
        numbers = _numbers(rest)
        at = first
        for delta in numbers:
            at += delta
            model, key = models[next(numbers)], keys[next(numbers)]
            yield Arrival(at, str(model), str(key), next(numbers), next(numbers))
    except (zlib.error, ValueError, IndexError, TypeError, StopIteration, RuntimeError) as error:
        raise Damaged(str(error)) from None


def anonymous(arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """The arrivals with numbers for names, in the order in which these occur, and times since the first arrival."""
    models: dict[str, str] = {}
    keys: dict[str, str] = {}
    first: int | None = None
    for each in arrivals:
        first = each.at if first is None else first
        model = models.setdefault(each.model, f"model{len(models) + 1}")
        key = each.key and keys.setdefault(each.key, f"key{len(keys) + 1}")
        yield Arrival(each.at - first, model, key, each.prompt, each.answer)


def _indices(names: Iterable[str]) -> dict[str, int]:
    return {name: index for index, name in enumerate(dict.fromkeys(names))}


def _numbers(data: Sequence[int]) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
