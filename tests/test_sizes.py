"""Amounts of memory: one way to write them, one to read them."""

from __future__ import annotations

import pytest

from vllmd.sizes import GiB, in_words, parse


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 * GiB),
        ("8G", 8 * GiB),  # as systemd has it
        ("8GB", 8 * 10**9),
        (" 1.5 mib ", 3 << 19),
        ("512", 512),
        ("GiB", None),
        ("-1GiB", None),
        ("1Gi iB", None),
        ("9" * 400 + "GiB", None),  # more than a number can be
        ("9" * 305 + "TiB", None),
    ],
)
def test_sizes_are_read(text: str, size: int | None) -> None:
    """A unit without iB is a power of 1024, with B alone of 1000; whatever is no size is None."""
    assert parse(text) == size


@pytest.mark.parametrize(
    ("amount", "words"),
    [(0, "0 B"), (1023, "1023 B"), (3 << 9, "1.5 KiB"), (80 * GiB, "80 GiB"), (-GiB, "-1 GiB"), (1 << 50, "1024 TiB")],
)
def test_sizes_are_written(amount: float, words: str) -> None:
    """In the largest unit that the amount fills, without zeros behind the point."""
    assert in_words(amount) == words
