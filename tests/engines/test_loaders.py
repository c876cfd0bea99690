"""Which loader a start gets: what is installed, what fits the files, and what earlier starts have taken."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from vllmd.config.types import ModelConfig
from vllmd.engines import loaders
from vllmd.engines.loaders import LOADERS, CanLoadFast, Files, LoaderBook, filesystem, fitting, look, place, there
from vllmd.engines.vllm import Vllm
from vllmd.engines.weight_files import WeightFile
from vllmd.sizes import GiB

RUNAI, FAST, DIRECT = "runai_streamer", "fastsafetensors", "instanttensor"
MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:44 / /srv/models rw,relatime shared:1 - nfs4 server:/models rw
31 22 0:45 / /srv/models\\040old rw - xfs /dev/sdb1 rw
nonsense
"""


def environment(folder: Path, *modules: str) -> str:
    """An environment with these files of packages; returns its Python."""
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin/python3"
    python.touch(mode=0o755)
    for module in modules:
        file = folder / "lib/python3.11/site-packages" / module
        file.parent.mkdir(parents=True)
        file.touch()
    return str(python)


def test_what_an_environment_has(tmp_path: Path) -> None:
    """By its files alone; what needs a GPU of NVIDIA's is none elsewhere. What is installed later is seen then."""
    python = environment(tmp_path / "e", *(each.module for each in LOADERS))
    assert [each.format for each in there(python, nvidia=True)] == [DIRECT, FAST, RUNAI]
    assert [each.format for each in there(python, nvidia=False)] == [RUNAI]
    bare = environment(tmp_path / "f", "torch/__init__.py")
    assert not there(bare, nvidia=True)
    (tmp_path / "f/lib/python3.11/site-packages/runai_model_streamer").mkdir()
    (tmp_path / "f/lib/python3.11/site-packages/runai_model_streamer/__init__.py").touch()
    os.utime(tmp_path / "f/lib/python3.11/site-packages", (2e9, 2e9))
    assert [each.format for each in there(bare, nvidia=True)] == [RUNAI]
    assert not there("", nvidia=True)


@pytest.mark.parametrize(
    "said",
    [
        ("--load-format", "auto"),
        ("--load-format=safetensors",),
        ("--safetensors-load-strategy", "eager"),
        ("--model-loader-extra-config", "{}"),
        ("--config", "args.yaml"),
        ("--speculative_config", "{}"),
        ("--quantization", "bitsandbytes"),
    ],
)
def test_what_the_user_says_of_loading_holds(tmp_path: Path, said: tuple[str, ...]) -> None:
    """Whatever it is: nothing is added to it."""
    python = environment(tmp_path, "runai_model_streamer/__init__.py")
    engine, argv = Vllm(lambda: False), (python, "-m", "vllm", "--model", "m")
    assert isinstance(engine, CanLoadFast)
    assert [each.format for each in engine.loaders(ModelConfig("m"), argv)] == [RUNAI]
    assert engine.load_with(argv, RUNAI) == (*argv, "--load-format", RUNAI)
    assert not engine.loaders(ModelConfig("m", extra_args=said), argv)
    assert not engine.loaders(ModelConfig("m"), ("/bin/sh", "-c", "ray start"))


def test_a_look_at_the_files(tmp_path: Path) -> None:
    """How large, how much of it is cached, where, and whether others are beside them."""
    sizes = {"model-1.safetensors": 64 << 10, "model-2.safetensors": 16 << 10}
    for name, length in sizes.items():
        (tmp_path / name).write_bytes(bytes(length))
    files = [WeightFile(tmp_path / name, tmp_path) for name in sizes]
    found = look(files, lambda fd, at, length: at < 8 << 10, MOUNTS)
    assert found == Files(80 << 10, 64 << 10, (2 + 8) / 32, "ext4 /dev/sda1", alone=True)
    (tmp_path / "consolidated.safetensors").touch()
    assert not look(files, lambda fd, at, length: True, MOUNTS).alone
    assert look(files, lambda fd, at, length: True, MOUNTS).cached == 1.0
    assert look([WeightFile(tmp_path / "model.gguf")], lambda fd, at, length: True, MOUNTS) == Files()
    assert look([], lambda fd, at, length: True, MOUNTS) == Files()


def test_the_file_system_by_its_longest_mount_point() -> None:
    """Not by a name that only begins alike."""
    assert filesystem("/srv/models/a/b", MOUNTS) == "nfs4 server:/models"
    assert filesystem("/srv/models old/a", MOUNTS) == "xfs /dev/sdb1"
    assert filesystem("/srv/modelsx", MOUNTS) == "ext4 /dev/sda1"
    assert filesystem("/srv", "") == ""


def test_what_can_read_these_files() -> None:
    """Whole files need room on the device, and other files beside them would be read by one that reads all."""
    files = Files(8 * GiB, 4 * GiB, 0.0, "ext4 /dev/sda1")
    assert fitting(LOADERS, files, 8 * GiB) == [DIRECT, FAST, RUNAI]
    assert fitting(LOADERS, files, 8 * GiB - 1) == [DIRECT, RUNAI]
    assert fitting(LOADERS, files, -GiB) == [DIRECT, RUNAI]
    assert fitting(LOADERS, replace(files, alone=False), 8 * GiB) == [DIRECT, FAST]


def test_only_like_starts_are_compared() -> None:
    """Of one environment and file system, with the files in the page cache or not; half of them there is neither."""
    files = Files(GiB, GiB, 0.0, "ext4 /dev/sda1")
    cold, warm = place("/e/1/bin/python", files), place("/e/1/bin/python", replace(files, cached=1.0))
    assert (cold, warm) == ("/e/1 | ext4 /dev/sda1 | disk", "/e/1 | ext4 /dev/sda1 | page cache")
    assert place("/e/2/bin/python", files) not in ("", cold)
    assert place("/e/1/bin/python", replace(files, cached=0.5)) == ""
    assert place("/e/1/bin/python", replace(files, filesystem="")) == ""


def test_each_is_tried_once_and_the_fastest_stays() -> None:
    """The engine's own way comes first; another one must be clearly faster than it."""
    book, size = LoaderBook(), 10 * GiB

    def start(seconds: float) -> str:
        chosen = book.choose("p", "m", [FAST, RUNAI], size)
        book.measured("p", chosen, seconds, size)
        return chosen

    assert [start(seconds) for seconds in (20.0, 8.0, 9.0, 8.0)] == ["", FAST, RUNAI, FAST]
    assert start(30.0) == FAST  # a bad day counts half
    assert start(9.0) == RUNAI
    assert book.choose("elsewhere", "m", [FAST], size) == ""
    book.measured("q", "", 20.0, size)
    book.measured("q", FAST, 18.5, size)
    assert book.choose("q", "m", [FAST], size) == ""


def test_where_nothing_is_to_be_gained_nothing_is_tried() -> None:
    """A start whose weights take a moment, and one with so few that it tells nothing."""
    book = LoaderBook()
    book.measured("p", "", 0.1, loaders.SMALLEST - 1)
    assert book.plain() == {}
    book.measured("p", "", 4.0, 8 * GiB)
    assert book.choose("p", "m", [FAST], 3 * GiB) == ""
    assert book.choose("p", "m", [FAST], 4 * GiB) == FAST
    book.measured("p", FAST, 0.0, 8 * GiB)  # its phases were not seen
    assert book.choose("p", "m", [FAST], 4 * GiB) == FAST


def test_what_fails_is_remembered() -> None:
    """For its model at once, for all after the second; what failed without it as well was not its fault."""
    book = LoaderBook()
    book.measured("p", "", 20.0, 10 * GiB)
    choose = lambda model: book.choose("p", model, [FAST], 10 * GiB)  # noqa: E731
    book.failed("p", FAST, "a")
    assert (choose("a"), choose("b")) == ("", FAST)
    book.failed("p", FAST, "b")
    assert (choose("a"), choose("b"), choose("c")) == ("", "", "")
    book.excused("p", FAST, "b")
    assert (choose("a"), choose("b"), choose("c")) == ("", FAST, FAST)


def test_the_book_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON, and no more of it than a few places; what is none raises."""
    monkeypatch.setattr(loaders, "PLACES", 2)
    book = LoaderBook()
    for name in ("a", "b", "c"):
        book.measured(name, "", 20.0, 10 * GiB)
    book.failed("c", FAST, "m")
    assert book.plain() == {
        "b": {"per_gib": {"": 2.0}, "failed": {}},
        "c": {"per_gib": {"": 2.0}, "failed": {FAST: ["m"]}},
    }
    assert LoaderBook(book.plain()).plain() == book.plain()
    for odd in ({"a": 1}, {"a": {}}, {"a": {"per_gib": {"": "x"}, "failed": {}}}, []):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            LoaderBook(odd if odd else [1])  # type: ignore[arg-type]
