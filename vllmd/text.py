"""Text that others wrote, made fit to be shown: engines' lines, names, answers of other servers.

A terminal obeys escape sequences: a line of an engine's log could retitle it, clear
it, or make it say what nobody wrote. A line break in a value is a second value in
whatever is read line by line. So what was not written by vllmd itself goes through
``printable`` before it reaches a terminal or a record, and where such text could
never be right (names, orders to the launcher) ``control_character`` refuses it.
"""

from __future__ import annotations

import io
import re
import unicodedata
from typing import TextIO

# The patterns are compiled by ``re`` for the first text that has such: most processes meet none.
# Complete sequences of a terminal: colours and movements (CSI), titles and links (OSC). Each part of the pattern is
# possessive and stops at the next escape character, so that the time is linear in the text.
_SEQUENCES = r"\x1b\[[0-?]*+[ -/]*+[@-~]|\x1b\][^\x07\x1b]*+(?:\x07|\x1b\\)"
# C0 and C1 controls but the tab; characters that reorder what stands around them; line and paragraph separators;
# halves of surrogate pairs, which no encoding can write.
_UNSAFE = "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_CONTROL = "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"


def make_legible(*streams: TextIO) -> None:
    """Have what the encoding of these streams has no character for shown as ``?``, or into a file as ``\\u2019``.

    Names, engines and models speak any language; a terminal of latin-1 must not be the end of whoever tells of them.
    """
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream.isatty() else "backslashreplace")


def printable(line: str) -> str:
    """The line without colours and other complete escape sequences; any other character that a terminal
    would obey is written out, such as ``\\x1b`` or ``\\n``. Linear in its length."""
    if line.isprintable():
        return line
    return re.sub(_UNSAFE, _written_out, re.sub(_SEQUENCES, "", line))


def printable_lines(text: str) -> str:
    """The same for text whose line breaks are meant: a traceback, a reason with the engine's last lines below it."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))


def control_character(text: str) -> str:
    """The first character, written out, that could not stand in a name or path; "" where there is none."""
    found = None if text.isprintable() else re.search(_CONTROL, text)
    return _written_out(found) if found else ""


def _written_out(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def width(text: str) -> int:
    """Columns that the text takes on a terminal: colours and combining marks none, wide characters two."""
    if text.isascii() and "\033" not in text:
        return len(text)
    taken, hidden = 0, False
    for char in text:
        if char == "\033":
            hidden = True
        elif hidden:
            hidden = char != "m"
        else:
            taken += 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return taken


def shortened(text: str, most: int) -> str:
    """The text in at most so many columns, the middle left out: both ends of a name tell it from others."""
    if width(text) <= most:
        return text
    head, tail = list(text), list[str]()
    keep = max(1, most - 2)
    while head and width("".join(tail)) + width(head[-1]) <= keep // 2:
        tail.insert(0, head.pop())
    while head and width("".join(head)) + width("".join(tail)) > keep:
        head.pop()
    return "".join(head) + ".." + "".join(tail)
