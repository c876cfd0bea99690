"""Bytes of engines become lines at the price of the bytes, however they are cut and however long a line is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmd.launcher.lines import LONGEST_RECORD, Line, LineReader, Rate, cursor, message, shown
from vllmd.launcher.protocol import MAX_LINE


class Counted(bytes):
    """Bytes that count how many of them are looked at or copied: the work, which no clock can tell."""

    work = 0

    def __add__(self, other: bytes) -> bytes:
        return self._count(bytes(self) + other, len(self) + len(other))

    def __radd__(self, other: bytes) -> bytes:
        return self._count(other + bytes(self), len(self) + len(other))

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return self._count(found, len(found)) if isinstance(found, bytes) else found

    def find(self, part: Any, start: Any = 0, end: Any = None) -> int:
        found = super().find(part, start)
        Counted.work += (found if found >= 0 else len(self)) - start + 1
        return found

    def split(self, *arguments: Any) -> list[bytes]:  # type: ignore[override]
        Counted.work += len(self)
        return [Counted(part) for part in super().split(*arguments)]

    def rpartition(self, *arguments: Any) -> Any:
        Counted.work += len(self)
        return tuple(map(Counted, super().rpartition(*arguments)))

    rstrip = lambda self, *arguments: self._count(super().rstrip(*arguments), len(self))  # noqa: E731
    endswith = lambda self, *arguments: super().endswith(*arguments)  # noqa: E731

    @staticmethod
    def _count(data: bytes, size: int) -> bytes:
        Counted.work += size
        return Counted(data)


def read(data: bytes, size: int, longest: int = 1000) -> tuple[list[Line], int]:
    """The lines of ``data`` in pieces of ``size`` bytes, and the work that it took."""
    reader, lines, Counted.work = LineReader(longest), [], 0
    for start in range(0, len(data), size):
        lines += reader.feed(Counted(data[start : start + size]))
    return lines + list(reader.end()), Counted.work


@pytest.mark.parametrize(
    "data",
    [b"x" * 300_000, b"x" * 300_000 + b"\n" + b"y" * 100, b"ab\n" * 50_000, b"\r" * 200_000, b"50%\r" * 50_000 + b"\n"],
    ids=["endless", "long", "short", "returns", "progress"],
)
def test_the_work_is_that_of_the_bytes(data: bytes) -> None:
    """Byte by byte it is what it is in large pieces: a line is not begun again for each piece of it."""
    whole, work = read(data, 1 << 16)
    pieces, more = read(data, 1)
    assert pieces == whole
    assert work <= 6 * len(data)
    assert more <= 6 * len(data)


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b"bc", b"d" * 30]), max_size=30), st.integers(1, 9))
def test_cuts_change_nothing(parts: list[bytes], size: int) -> None:
    """What comes is what a terminal would show in the end, cut at the longest line."""
    data = b"".join(parts)
    expected = []
    for line in data.split(b"\n"):
        text = line.rstrip(b"\r").rpartition(b"\r")[2]
        expected.append(text[:20])
    lines, _ = read(data, size, longest=20)
    found = [line.kept for line in lines]
    assert found == expected[: len(found)]
    assert not any(expected[len(found) :])


def test_a_long_line_is_its_beginning_and_its_length() -> None:
    """It can be of any length, and takes what its beginning takes."""
    lines, _ = read(b"x" * 1_000_000 + b"\n", 999, longest=4 * MAX_LINE)
    assert shown(lines[0]) == "x" * MAX_LINE + "... [1000000 bytes]"


def test_of_a_progress_bar_its_last_state() -> None:
    """However often it was written over."""
    lines, _ = read(b"".join(b"\rloading %3d%%" % done for done in range(101)) + b"\r\n", 64, longest=4 * MAX_LINE)
    assert [shown(line) for line in lines] == ["loading 100%"]


def record(value: object, size: int = 1 << 16, **more: object) -> Line:
    """One of journalctl's, as the reader gives it."""
    data = json.dumps({"__CURSOR": "s=1;i=2", **more, "MESSAGE": value}, separators=(",", ":")).encode() + b"\n"
    (line,), _ = read(data, size, LONGEST_RECORD)
    return line


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("plain \x1b[31mred", "plain red"),
        (list(b"\x1b[31mbytes\xff\x9b"), "bytes\ufffd\ufffd"),
        (["twice", "given"], "twice"),
        ([list(b"twice"), "given"], "twice"),
        (None, "[a line too long to be shown here; journalctl shows it]"),
        ("", ""),
        ([], ""),
        (["a", 1], "a"),
        ([300], None),
        ([[[]]], ""),
        ({"a": 1}, "{'a': 1}"),
        (1e400, "inf"),
        ("\ud800", "?"),
    ],
)
def test_a_record_holds_a_line(value: object, line: str | None) -> None:
    """Engines may send journald what they like, in its own protocol as well."""
    assert message(record(value)) == line


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b'{"MESSAGE"', b"[" * 5000, b'{"x": 1}', b"\xff"])
def test_no_record_is_no_line(data: bytes) -> None:
    assert message(Line(data, len(data))) is None


@pytest.mark.parametrize("value", ["é\n" * 500_000, list(b"\x01\x02" * 500_000)], ids=["text", "binary"])
def test_a_record_that_is_too_large_to_hold_is_its_beginning(value: Any) -> None:
    """What a journal takes (768 MiB in one field) is not what the launcher can."""
    cut = record(value, 997)
    assert len(cut.kept) == LONGEST_RECORD
    told = message(cut)
    assert told is not None
    assert told.startswith("é\\né\\n" if isinstance(value, str) else "\\x01\\x02\\x01")
    assert told.endswith(f"... [{cut.length} bytes]")
    assert len(told) < MAX_LINE + 100
    assert cursor(cut) == "s=1;i=2"


@pytest.mark.parametrize("end", range(LONGEST_RECORD - 14, LONGEST_RECORD))
def test_a_cut_within_an_escape(end: int) -> None:
    """A record may be cut anywhere."""
    text = b'{"MESSAGE":"' + b"\\u00e9" * 60_000
    assert (message(Line(text[:end], 1 << 30)) or "").startswith("é" * 100)


def test_lines_have_a_rate_and_the_rest_is_counted() -> None:
    """An engine in a loop does not fill the daemon, its files or its memory; nothing is left out unsaid."""
    now = 0.0
    rate = Rate(burst=3, period=30.0, clock=lambda: now)
    assert rate.allow(("a", "b")) == ("a", "b")
    assert rate.allow(("c", "d", "e")) == ("c",)
    assert rate.allow(("f",)) == ()
    now = 30.0
    assert rate.allow(("g",)) == ("[3 lines were left out here: they came too fast]", "g")
    assert rate.allow(("h", "i", "j")) == ("h", "i")
    assert rate.end() == ("[1 lines were left out here: they came too fast]",)
    assert rate.end() == ()
