"""Arrivals in a compact form: five to eight bytes for each, so that weeks of traffic can be replayed.

A segment is what came between two writes: the names that occur, as JSON on one line, then for each request, in the
order of arrival, five numbers as variable-length integers: milliseconds since the one before, the index of its model
and of its key, tokens of its prompt and of its answer. All of it is compressed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from math import floor
from operator import itemgetter, sub
from typing import Any, NamedTuple

MOST_BYTES = 64 << 20  # of a segment, unpacked; a larger one is damaged


class Arrival(NamedTuple):
    """One request; ``at`` in Unix milliseconds."""

    at: int
    model: str
    key: str
    prompt: int
    answer: int


class Damaged(ValueError):
    """The bytes are no segment."""


def packed(arrivals: Iterable[tuple[Any, ...]]) -> tuple[int, bytes]:
    """The Unix milliseconds of the first arrival (0 for none), and the segment.

    Each begins with the values of an ``Arrival``; fractions of its milliseconds are dropped.
    """
    # By columns, without a line of Python for each arrival: a busy daemon has thousands in a second.
    ordered = sorted(arrivals, key=itemgetter(0))
    moments, models, keys, prompts, answers = list(zip(*ordered, strict=True))[:5] if ordered else [()] * 5
    times, written = list(map(floor, moments)), Written()
    first = times[0] if times else 0
    of_models, of_keys = ({name: written[index] for index, name in enumerate(dict.fromkeys(c))} for c in (models, keys))
    rows = zip(
        map(written.__getitem__, map(sub, times, (first, *times))),
        map(of_models.__getitem__, models),
        map(of_keys.__getitem__, keys),
        map(written.__getitem__, prompts),
        map(written.__getitem__, answers),
        strict=True,
    )
    names = json.dumps([list(of_models), list(of_keys)], separators=(",", ":")).encode()
    return first, zlib.compress(b"%b\n%b" % (names, b"".join(chain.from_iterable(rows))), 1)


class Written(dict[int, bytes]):
    """Numbers as they are written, seven bits in each byte; each is put together once, for most of them recur."""

    def __missing__(self, number: int) -> bytes:
        out, left = bytearray(), number
        while left > 0x7F:
            out.append(left & 0x7F | 0x80)
            left >>= 7
        out.append(left)
        self[number] = found = bytes(out)
        return found


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


def _numbers(data: Sequence[int]) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
