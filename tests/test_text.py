"""What others wrote is fit for a terminal and for a record."""

from __future__ import annotations

import pytest

from vllmd.text import control_character, printable, printable_lines


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("INFO a\tb · 日本\u00a0語 👩‍🚀", "INFO a\tb · 日本\u00a0語 👩‍🚀"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b", "ab"),
        ("\x1b[31", "\\x1b[31"),  # the rest might come with the next line
        ("a\x1bPq\x9b1m\x07\x00\x7f", "a\\x1bPq\\x9b1m\\x07\\x00\\x7f"),
        ("a\nroot: b\r\v\x85\u2028c", "a\\nroot: b\\r\\x0b\\x85\\u2028c"),
        ("abc\u202etxt", "abc\\u202etxt"),
        ("\ud800", "\\ud800"),
    ],
)
def test_a_terminal_obeys_nothing_of_it(line: str, shown: str) -> None:
    """Colours go, and what a terminal would obey is written out; letters of all languages stay."""
    assert printable(line) == shown
    assert printable(shown) == shown


def test_line_breaks_stay_where_they_are_meant() -> None:
    """In a traceback, or a reason with the engine's last lines below it."""
    assert printable_lines("a\x1b[1mb\n\x1bc\r\n") == "ab\n\\x1bc\\r\n"


@pytest.mark.parametrize("name", ["", "Qwen/Qwen3-0.6B", "modèle 日本", "a\u00a0b"])
def test_names_have_no_control_characters(name: str) -> None:
    assert control_character(name) == ""


@pytest.mark.parametrize(
    ("name", "found"), [("a\nOnSuccess=x", "\\n"), ("a\0", "\\x00"), ("\x9b", "\\x9b"), ("\ud800", "\\ud800")]
)
def test_a_control_character_is_named(name: str, found: str) -> None:
    assert control_character(name) == found
