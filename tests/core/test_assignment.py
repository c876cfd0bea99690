"""Places for all models that are being used: found where they exist, with few moves."""

from __future__ import annotations

import random

from vllmd.core.assignment import Item, assign


def item(name: str, need: int, *at: int, devices: tuple[int, ...] = (0, 1), span: int = 1) -> Item:
    return Item(name, need, devices, span, at)


def test_who_fits_where_he_is_stays() -> None:
    """No move is better than the prettiest assignment."""
    assert assign((item("a", 30, 1), item("b", 40, 0)), ((0, 80), (1, 80))) == {"a": (1,), "b": (0,)}


def test_the_small_one_leaves_the_large_device() -> None:
    """35 on the card of 80 beside an empty one of 40, and then comes one of 70."""
    assert assign((item("small", 35, 0), item("large", 70)), ((0, 80), (1, 40))) == {"small": (1,), "large": (0,)}


def test_two_moves_where_one_is_not_enough() -> None:
    """50 and 30, 40 and 40 is the only way."""
    items = (item("a", 40, 0), item("b", 30, 0), item("c", 50, 1), item("d", 40))
    places = assign(items, ((0, 80), (1, 80)))
    assert places is not None
    assert places["b"] == places["c"] and places["a"] == places["d"]


def test_what_cannot_be_is_said() -> None:
    """By the sum, and where only the pieces do not fit."""
    assert assign((item("a", 50), item("b", 50), item("c", 70)), ((0, 80), (1, 80))) is None
    assert assign((item("a", 50), item("b", 50), item("c", 50)), ((0, 80), (1, 80))) is None


def test_over_two_devices() -> None:
    """A model that takes two devices, beside one on each."""
    items = (item("wide", 50, span=2), item("a", 30, 0), item("b", 30, 0))
    places = assign(items, ((0, 80), (1, 80)))
    assert places is not None
    assert places["wide"] == (0, 1) and places["a"] != places["b"]


def full(rng: random.Random, devices: int) -> tuple[tuple[Item, ...], tuple[tuple[int, int], ...]]:
    """A machine cut into models so that they surely fit, and nine tenths of it are taken; they are anywhere now."""
    sizes, items = [], []
    for device in range(devices):
        size = rng.choice((24, 40, 48, 80, 80))
        sizes.append((device, size))
        left = round(size * 0.9)
        while left > 3:
            need = min(left, rng.randint(4, 40))
            at = rng.choice([(), (rng.randrange(devices),)])
            items.append(Item(f"m{len(items)}", need, tuple(range(devices)), 1, at))
            left -= need
    return tuple(items), tuple(sizes)


def test_small_machines_are_searched_to_the_end_and_large_ones_mostly() -> None:
    """What exists is found: always on one and two devices, in nine cases of ten on four and on eight."""
    for devices, least in ((1, 1.0), (2, 1.0), (4, 0.9), (8, 0.9)):
        rng = random.Random(devices)
        cases = [full(rng, devices) for _ in range(60)]
        found = sum(check(*case) for case in cases) / len(cases)
        print(f"{devices} devices, nine tenths full: {found:.0%} found")
        assert found >= least


def check(items: tuple[Item, ...], sizes: tuple[tuple[int, int], ...]) -> bool:
    """Whether something was found; if so it must be true."""
    places = assign(items, sizes)
    if places is None:
        return False
    left = dict(sizes)
    for each in items:
        for device in places[each.name]:
            left[device] -= each.need
    assert min(left.values()) >= 0
    return True
