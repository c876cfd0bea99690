"""Values that nobody changes: as frozen dataclasses are, but for what mypy sees alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import field, replace

import pytest

from vllmd.frozen import frozen, sparse


@frozen
class Point:
    """Two numbers, and what does not count."""

    x: int
    y: int = 0
    note: str = field(default="", compare=False, repr=False)
    more: Mapping[str, int] = field(default_factory=dict)


@sparse
class Wide:
    """Mostly as by default."""

    x: int
    y: int = 0
    note: str = field(default="", compare=False, repr=False)
    more: Mapping[str, int] = field(default_factory=dict)


@frozen
class Other:
    """Another class with the same values."""

    x: int
    y: int = 0


@frozen
class Nothing:
    """It says all by its name."""


def test_it_is_compared_by_its_fields() -> None:
    """Those of one class; what is not compared does not count, and what cannot be hashed cannot be."""
    assert Nothing() == Nothing()
    assert len({Nothing(), Nothing()}) == 1
    assert Point(1) == Point(1, 0, "told") != Point(2)
    assert Other(1) != Point(1)
    assert len({Other(1), Other(1), Other(2)}) == 2
    with pytest.raises(TypeError):
        hash(Point(1))


def test_it_is_shown_copied_and_kept_as_a_dataclass_is() -> None:
    """Also by what knows dataclasses by their fields."""
    point = Point(1, note="secret")
    assert repr(point) == "Point(x=1, y=0, more={})"
    assert replace(point, y=3) == Point(1, 3)
    assert pickle.loads(pickle.dumps(point)) == copy.deepcopy(point) == point
    with pytest.raises(AttributeError):
        point.z = 1  # type: ignore[attr-defined]


def test_a_sparse_one_is_as_any_other_and_has_only_what_is_not_the_default() -> None:
    """It is made by place or by name, and refuses what has no place."""
    wide = Wide(1, note="secret")
    assert repr(wide) == "Wide(x=1, y=0, more={})"
    assert wide == Wide(x=1) and {wide.y, wide.note} == {0, "secret"} and wide != Wide(2) and wide != Point(1)
    assert replace(wide, y=3) == Wide(1, 3) and replace(replace(wide, y=3), y=0) == wide
    assert pickle.loads(pickle.dumps(wide)) == copy.deepcopy(wide) == wide
    assert vars(replace(Wide(1, 3), y=0)) == {"x": 1}
    with pytest.raises(TypeError, match="needs x"):
        Wide()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no field 'z'"):
        Wide(1, z=2)  # type: ignore[call-arg]
