"""Recorded bodies: how much of them is kept, and what is cut out of them first."""

from __future__ import annotations

import pytest

from vllmd.records.bodies import Bodies, KeptBodies, cleaned


def bodies(size: int) -> Bodies:
    return Bodies(b"x" * size, b"", size, False)


def test_the_oldest_bodies_go_where_all_together_are_too_many() -> None:
    """And those of requests that are not kept any more; what is too large for all of the memory is not kept at all."""
    kept = KeptBodies(100)
    for number in (1, 2, 3):
        kept.keep(number, bodies(40))
    assert [kept.of(number) is not None for number in (1, 2, 3)] == [False, True, True]
    assert (len(kept), kept.size) == (2, 80)
    kept.forget_before(3)
    assert (len(kept), kept.size, kept.of(2)) == (1, 40, None)
    kept.keep(4, bodies(101))
    assert (len(kept), kept.size) == (0, 0)
    kept.keep(5, bodies(10))
    kept.clear()
    assert (len(kept), kept.size) == (0, 0)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (b'{"messages":[]}', b'{"messages":[]}'),
        (b'{"x":"data:image/png;base64,' + b"A" * 300 + b'"}', b'{"x":"data:image/png;base64,(300 bytes cut)"}'),
        (b'{"b64_json" : "' + b"A" * 200 + b'"}', b'{"b64_json" : "(200 bytes cut)"}'),
        (b'{"API_Key":"abc","n":1}', b'{"API_Key":"(cut)","n":1}'),
        (b'{"client_secret":"a\\"b","n":1}', b'{"client_secret":"(cut)","n":1}'),
        (b'{"authToken":"abc"}', b'{"authToken":"(cut)"}'),
        (b"my key is sk-0123456789abcdef0 ok", b"my key is (cut) ok"),
        (b"ghs_0123456789012345678901", b"(cut)"),
        (b"Authorization: Bearer abcdefghijkl", b"Authorization: (cut)"),
        (b"AKIAABCDEFGHIJKLMNOP xoxb-0123456789a", b"(cut) (cut)"),
        (b"a -----BEGIN RSA PRIVATE KEY-----abc-----END RSA PRIVATE KEY----- b", b"a (cut) b"),
        (b"eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.sig", b"(cut)"),
    ],
)
def test_files_and_secrets_are_cut(body: bytes, left: bytes) -> None:
    """Whatever the pattern, in any case and with any spacing."""
    assert cleaned(body) == left
