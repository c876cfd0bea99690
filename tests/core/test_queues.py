"""Whose turn it is: keys in turns, by share, and those of a higher priority first."""

from __future__ import annotations

from vllmd.core.queues import USUAL, Queue, Rank


def order(*waiting: tuple[str, int, Rank]) -> str:
    """The keys in the order in which they are served, each with so many requests waiting from the start."""
    queue = Queue()
    for key, number, rank in waiting:
        for each in range(number):
            queue.add(f"{key}{each}", key, float(each), rank)
    served = [queue.take() for _ in range(len(queue))]
    assert sorted(request for request, _ in served) == sorted(
        f"{k}{n}" for k, number, _ in waiting for n in range(number)
    )
    assert not queue._keys
    assert not queue._ranks
    assert not queue._turns
    return "".join(key for _, key in served)


def test_keys_take_turns_whoever_has_more() -> None:
    """One caller's flood delays only itself."""
    assert order(("a", 4, USUAL), ("b", 2, USUAL)) == "ababaa"


def test_a_share_is_so_many_turns() -> None:
    """Three to one, as long as both wait."""
    assert order(("a", 6, (0, 3)), ("b", 3, USUAL)) == "aaabaaabb"


def test_a_higher_priority_comes_first() -> None:
    """Always: that of 0 waits until nobody of 5 does."""
    assert order(("a", 2, USUAL), ("b", 3, (5, 1)), ("c", 2, (5, 2))) == "bccbbaa"


def test_a_rank_goes_with_its_last_request() -> None:
    """A key that comes back with another rank has that."""
    queue = Queue()
    queue.add("1", "a", 0.0, (9, 1))
    queue.remove("1")
    queue.add("2", "b", 1.0, (1, 1))
    queue.add("3", "a", 2.0)
    assert [queue.take()[0] for _ in range(2)] == ["2", "3"]
