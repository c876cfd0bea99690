"""Values that nobody changes: as frozen dataclasses are, but for what mypy sees alone."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, field, fields, replace
from typing import ClassVar

import pytest

import vllmd
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


@frozen
class Base:
    """What others begin with."""

    kind: ClassVar[str] = "base"
    x: int
    y: int = 1


@frozen
class Derived(Base):
    """With a default of its own for what it inherits, one field by name alone and one that nobody gives."""

    y: int = 2
    z: tuple[int, ...] = field(default=(), kw_only=True)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.x + self.y  # type: ignore[misc]


def test_no_signature_is_read_for_what_dataclasses_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class without a docstring gets one by ``dataclass``: for that it tokenizes and parses, and leaves garbage."""

    @frozen
    class Plain:
        x: int

    monkeypatch.delattr(inspect, "signature")
    assert [each.name for each in fields(Plain)] == ["x"]
    assert Plain(1) == Plain(1) != Plain(2)


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
    with pytest.raises(TypeError, match="more values"):
        Wide(1, 2, "", {}, 5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="twice"):
        Wide(1, x=2)  # type: ignore[misc]


def test_what_another_thread_has_made_meanwhile_is_taken() -> None:
    """Two threads may look at once: who finds that the other one was faster made it of the base, or failed."""

    @frozen
    class Small:
        x: int

    @frozen
    class Large(Small):
        y: int

    for name in ("__dataclass_fields__", "_compared", "__signature__"):
        late = vars(Large)[name]
        assert late.__get__(None, Large) is late.__get__(None, Large) is getattr(Large, name)
    assert [each.name for each in fields(Large)] == ["x", "y"]
    assert Large(1, 2) != Large(1, 3)


def test_it_inherits_as_a_dataclass_does() -> None:
    """Fields of bases come first, whichever class has its first value made first."""
    derived = Derived(1, z=(3,))
    assert repr(derived) == "Derived(x=1, y=2, z=(3,), total=3)"
    assert Base(1) == Base(1, 1) != derived
    assert asdict(replace(derived, x=5)) == {"x": 5, "y": 2, "z": (3,), "total": 7}
    assert str(inspect.signature(Derived)) == "(x, y=2, *, z=())"
    assert (Derived.kind, Derived.__match_args__) == ("base", ("x", "y"))
    with pytest.raises(TypeError, match=r"Derived.__init__\(\) missing 1 required positional argument: 'x'"):
        Derived()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Derived(1, 2, (3,))  # type: ignore[call-arg]


@frozen
class Unusual:
    """What no class of ours has yet: names that differ by a line, a default that nobody may give, a hash of its own."""

    _x: list[int] = field(default_factory=list)
    x: list[int] = field(default_factory=lambda: [1])
    state: str = field(init=False, default="new")
    seen: list[int] = field(init=False, default_factory=list)

    def __hash__(self) -> int:
        return len(self.x)


def test_unusual_declarations_mean_what_they_mean_of_a_dataclass() -> None:
    """Who writes one of these does not look here first."""
    assert repr(Unusual([2])) == "Unusual(_x=[2], x=[1], state='new', seen=[])"
    assert Unusual([2]).seen is not Unusual([2]).seen
    assert hash(Unusual()) == 1 and Unusual() == Unusual() != Unusual([2])


def classes(base: type) -> Iterator[type]:
    subclasses: list[type] = type.__subclasses__(base)
    for each in subclasses:
        yield each
        yield from classes(each)


def test_every_class_can_be_made() -> None:
    """What a declaration has wrong (as a default that all values would share) shows at its first use: here, for all."""
    for module in pkgutil.walk_packages(vllmd.__path__, "vllmd."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = {each for each in classes(object) if "_declared" in vars(each) and each.__module__.startswith("vllmd.")}
    assert len(found) > 200
    for each in found:
        with pytest.raises(TypeError):
            each(no_such_field=1)
        assert set(getattr(each, "__match_args__", ())) <= {one.name for one in fields(each)}  # type: ignore[arg-type]
