"""Memory for bodies: never more than the limit, and never all of it for one."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.config.types import ServerConfig
from vllmd.proxy.body_memory import BodyMemory, place_of
from vllmd.proxy.http import Peer
from vllmd.proxy.limits import Limits
from vllmd.proxy.reader import RequestReader


def fill(memory: BodyMemory, place: str, step: int = 1) -> int:
    """Have a holder take as much as it gets."""
    taken = 0
    while memory.try_charge((place, ""), step):
        taken += step
    return taken


def test_whoever_comes_next_finds_as_much_as_the_greediest_holds() -> None:
    """One alone gets half; the next one a half of the rest, and so on: nobody finds nothing."""
    memory = BodyMemory(1024)
    assert [fill(memory, place) for place in "abcd"] == [512, 256, 128, 64]


def test_two_who_take_turns_get_the_same() -> None:
    """A third each, and a third is left for others."""
    memory = BodyMemory(900)
    taken = {"a": 0, "b": 0}
    going = True
    while going:
        going = False
        for place in taken:
            if memory.try_charge((place, ""), 1):
                taken[place], going = taken[place] + 1, True
    assert taken == {"a": 300, "b": 300}


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 400), st.booleans()), max_size=60))
def test_the_account_is_right_whatever_happens(steps: list[tuple[str, int, bool]]) -> None:
    """The sum of all holders is what is held, at most the limit, and nothing is left when all was given back."""
    memory = BodyMemory(1000)
    taken: list[tuple[str, int]] = []
    for place, size, back in steps:
        if back and taken:
            whose, much = taken.pop()
            memory.uncharge((whose, ""), much)
        elif memory.has_room((place, ""), size):
            assert memory.try_charge((place, ""), size)
            taken.append((place, size))
        else:
            assert not memory.try_charge((place, ""), size)
        assert memory.held == sum(size for _, size in taken) <= 1000
    for whose, much in taken:
        memory.uncharge((whose, ""), much)
    assert memory.held == 0
    assert memory.has_room(("a", ""), 500)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Peer("127.0.0.1", 1), Peer("127.1.2.3", 2)),
        (Peer("127.0.0.1", 1), Peer("::1", 2)),
        (Peer("10.0.0.1", 1), Peer("::ffff:10.0.0.1", 2)),
        (Peer("2001:db8::1", 1), Peer("2001:db8::ffff:0:1", 2)),
        (Peer("fe80::1%eth0", 1), Peer("fe80::2%eth0", 2)),
        (Peer(pid=1, uid=7, gid=7), Peer(pid=2, uid=7, gid=8)),
    ],
)
def test_addresses_that_one_person_has_in_any_number_are_one_place(one: Peer, other: Peer) -> None:
    """Else the rule would be got round by whoever opens a second connection."""
    assert place_of(one) == place_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Peer("10.0.0.1", 1), Peer("10.0.0.2", 1)),
        (Peer("2001:db8::1", 1), Peer("2001:db8:0:1::1", 1)),
        (Peer(pid=1, uid=7, gid=7), Peer(pid=1, uid=8, gid=7)),
        (Peer("127.0.0.1", 1), Peer(pid=1, uid=0, gid=0)),
    ],
)
def test_others_are_others(one: Peer, other: Peer) -> None:
    """Neighbours do not share."""
    assert place_of(one) != place_of(other)


HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
SIZE = 128 << 10


@pytest.mark.parametrize("piece", [2, 64 << 10])
@pytest.mark.parametrize(
    "sent",
    [
        HEAD + b"Content-Length: %d\r\n\r\n" % (SIZE + 1) + b"x" * SIZE,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"8\r\n01234567\r\n" * (SIZE // 8),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (SIZE + 1) + b"x" * SIZE,
    ],
    ids=["by its length", "in small chunks", "in one chunk"],
)
def test_a_body_takes_the_memory_that_it_brings(sent: bytes, piece: int) -> None:
    """However small its pieces: as a list of them, two bytes would take fifty."""
    reader = RequestReader(Limits(ServerConfig()))
    pieces = [sent[at : at + piece] for at in range(0, len(sent), piece)]
    has_head = False
    tracemalloc.start(1)
    try:
        for data in pieces:
            reader.feed(data)
            has_head = has_head or reader.head() is not None
            if has_head:
                assert reader.body() is None
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert reader.received == SIZE
    assert taken <= 1.3 * SIZE + (32 << 10)  # and the head, with what was worked out from it
