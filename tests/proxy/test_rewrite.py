"""A name put right in a stream: the same whatever the pieces, and nothing held that need not be."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.proxy.rewrite import Rewriter

SERVED, ASKED = 'org/näme"1', "alias"
PARTS = st.lists(
    st.sampled_from(
        [
            b'"model":' + json.dumps(SERVED).encode(),
            b'"model" : ' + json.dumps(SERVED, ensure_ascii=False).encode(),
            b'\\"model\\":\\"x\\"',
            b'"model":',
            b'"model"',
            b'"mod',
            b'"',
            b"\\",
            b'"model":"other"',
            b"\n",
            b", ",
        ]
    ),
    max_size=12,
).map(b"".join)


@given(PARTS, st.lists(st.integers(0, 200), max_size=8))
def test_pieces_make_no_difference(data: bytes, cuts: list[int]) -> None:
    """Wherever it is cut."""
    whole = Rewriter(SERVED, ASKED)
    expected = whole.renamed(data)
    rewriter, out, last = Rewriter(SERVED, ASKED), b"", 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        out += rewriter.feed(data[last:cut])
        last = cut
    assert out + rewriter.rest() == expected


@pytest.mark.parametrize(
    ("data", "held"),
    [
        (b'data: {"a":"' + b"x" * 1000, b""),
        (b'{"id":1,"model"', b'"model"'),
        (b'{"id":1,"model": "org', b'"model": "org'),
        (b'{"id":1,"model": "other', b'"'[:0]),
        (b'{"id":1,"m', b'"m'),
        (b'{"model":1}\n\n', b""),
    ],
)
def test_nothing_but_the_beginning_of_a_name_is_held(data: bytes, held: bytes) -> None:
    """A client sees each piece as soon as it has come."""
    assert Rewriter(SERVED, ASKED).feed(data) == data.removesuffix(held)
