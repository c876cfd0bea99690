"""Files of who is next in line: read while others make room, and never at anybody's cost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vllmd.config.types import ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import Placement
from vllmd.daemon import read_ahead
from vllmd.daemon.read_ahead import PIECE, RESERVE, ReadAhead, is_cached, read_piece
from vllmd.engines.weight_files import WeightFile, weight_files
from vllmd.place import free_memory

GiB = 1 << 30
LIMIT = 60.0  # seconds
PLENTY = RESERVE + 100 * GiB


class Disk:
    """Stands in for the disk and the page cache: what is read is noted, nothing is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[tuple[str, int]] = []
        self.cached: set[str] = set()
        self.on_read: Callable[[], None] = lambda: None
        monkeypatch.setattr(read_ahead, "is_cached", lambda fd, start, length: _name(fd) in self.cached)
        monkeypatch.setattr(read_ahead, "read_piece", self._piece)

    def _piece(self, fd: int, start: int, length: int) -> int:
        self.read.append((_name(fd), start))
        self.on_read()
        return length


def _name(fd: int) -> str:
    return Path(os.readlink(f"/proc/self/fd/{fd}")).name


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """No disk."""
    return Disk(monkeypatch)


def files(folder: Path, *names: str, size: int = 2 * PIECE) -> list[WeightFile]:
    """Sparse ones."""
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return [WeightFile(folder / name) for name in names]


def finished(ahead: ReadAhead) -> None:
    """Whatever was begun is through."""
    deadline = time.monotonic() + LIMIT
    while ahead._busy.locked():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends when it has nothing to do."""
    monkeypatch.setattr(read_ahead, "LINGER", 0.0)


def test_files_are_read_in_order_and_what_is_cached_is_passed_over(tmp_path: Path, disk: Disk) -> None:
    """Once: the start that follows finds it under way, or done."""
    there = files(tmp_path, "a", "b", "c")
    disk.cached.add("b")
    ahead = ReadAhead(lambda replica: there if replica == "m" else [], free=lambda: PLENTY)
    ahead.begin(commands.ReadAhead("m", 0))
    finished(ahead)
    assert disk.read == [("a", 0), ("a", PIECE), ("c", 0), ("c", PIECE)]
    ahead.starting(commands.StartEngine("m", Placement((0,)), 0))
    finished(ahead)
    assert len(disk.read) == 4
    ahead.on_event(events.EngineReady("m"))
    ahead.starting(commands.StartEngine("m", Placement((0,)), 0))
    finished(ahead)
    assert len(disk.read) == 8


def test_no_more_is_read_than_memory_is_free_for(tmp_path: Path, disk: Disk) -> None:
    """What falls asleep meanwhile needs its share, and a reserve is nobody's."""
    there = files(tmp_path, "a", size=4 * PIECE)
    ahead = ReadAhead(lambda replica: there, free=lambda: RESERVE + GiB + 2 * PIECE)
    ahead.begin(commands.ReadAhead("m", GiB))
    finished(ahead)
    assert disk.read == [("a", 0), ("a", PIECE)]


@pytest.mark.parametrize("how", ["stop", "exited", "close"])
def test_it_is_called_off_when_the_plan_changes(tmp_path: Path, disk: Disk, how: str) -> None:
    """In the middle of a file."""
    there = files(tmp_path, "a", size=8 * PIECE)
    ahead = ReadAhead(lambda replica: there, free=lambda: PLENTY)
    ends = {"stop": lambda: ahead.stop(commands.StopReadAhead("m")), "close": ahead.close,
            "exited": lambda: ahead.on_event(events.EngineExited("m", "x"))}  # fmt: skip
    disk.on_read = ends[how]
    ahead.begin(commands.ReadAhead("m", 0))
    finished(ahead)
    assert disk.read == [("a", 0)]


def test_it_can_be_switched_off_and_a_wake_from_host_memory_reads_nothing(tmp_path: Path, disk: Disk) -> None:
    """At level 2 the weights come from the disk again."""
    there, wanted = files(tmp_path, "a", size=PIECE), False
    ahead = ReadAhead(lambda replica: there, lambda: wanted, free=lambda: PLENTY)
    ahead.begin(commands.ReadAhead("m", 0))
    wanted = True
    ahead.starting(commands.WakeEngine("m", 1))
    finished(ahead)
    assert disk.read == []
    ahead.starting(commands.WakeEngine("m", 2))
    finished(ahead)
    assert disk.read == [("a", 0)]


def test_a_file_that_is_none_costs_nothing_but_itself(tmp_path: Path, disk: Disk) -> None:
    """A FIFO would be waited for until somebody writes; a link may not lead out of the cache."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "out").symlink_to("/etc/passwd")
    there = [WeightFile(tmp_path / "gone"), WeightFile(tmp_path / "fifo"), WeightFile(tmp_path / "out", tmp_path),
             *files(tmp_path, "a", size=1)]  # fmt: skip
    ahead = ReadAhead(lambda replica: there, free=lambda: PLENTY)
    ahead.begin(commands.ReadAhead("m", 0))
    finished(ahead)
    assert disk.read == [("a", 0)]


def test_a_file_that_has_become_shorter_ends_there(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is its owner's, who may have it say any length: a thread that asked for each piece would hold the others."""
    asked: list[int] = []
    monkeypatch.setattr(read_ahead, "read_piece", lambda fd, start, length: asked.append(start) or 0)
    found = files(tmp_path, "a", size=100 * PIECE)
    ahead = ReadAhead(lambda replica: found, free=lambda: PLENTY)
    ahead.begin(commands.ReadAhead("next", 0))
    finished(ahead)
    assert asked == [0]


def test_what_was_read_is_in_the_page_cache(tmp_path: Path) -> None:
    """With a real file."""
    path = tmp_path / "real"
    path.write_bytes(os.urandom(1 << 20) * 4)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert read_piece(file.fileno(), 0, 4 << 20) == 4 << 20
        assert is_cached(file.fileno(), 0, 4 << 20)


def test_the_memory_that_is_free_is_the_least_that_anybody_says(tmp_path: Path) -> None:
    """The machine, and the limits of our own group; its pages of files do not count as held."""
    group = tmp_path / "sys/fs/cgroup/system.slice/vllmd.service"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 4000000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/system.slice/vllmd.service\n")
    assert free_memory(tmp_path) == 4000000 << 10
    (group / "memory.max").write_text("max\n")
    (group / "memory.high").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000\nactive_file 300000\n")
    assert free_memory(tmp_path) == 900_000
    assert free_memory(tmp_path / "nowhere") == 0


def test_the_files_are_those_that_the_engine_reads_in_its_order(tmp_path: Path) -> None:
    """Shards by number, of an index those that it names; the parts of a split GGUF; of a repository what is here."""
    shards, hub = tmp_path / "shards", tmp_path / "hub"
    snapshot = hub / "models--org--m" / "snapshots" / ("a" * 40)
    for folder in (shards, snapshot, hub / "models--org--m" / "refs"):
        folder.mkdir(parents=True)
    files(shards, "m-10.safetensors", "m-2.safetensors", "stray.safetensors", size=1)
    names = {"weight_map": {"x": "m-10.safetensors", "y": "m-2.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(names))
    files(tmp_path, "q-00002-of-00002.gguf", "q-00001-of-00002.gguf", "other.gguf", size=1)
    files(snapshot, "model.safetensors", size=1)
    (hub / "models--org--m/refs/main").write_text("a" * 40)

    def found(source: str, **settings: object) -> list[str]:
        model = ModelConfig("m", model=source, **settings)  # type: ignore[arg-type]
        return [file.path.name for file in weight_files(model, hub)]

    assert found(str(shards)) == ["m-2.safetensors", "m-10.safetensors"]
    split = ["q-00001-of-00002.gguf", "q-00002-of-00002.gguf"]
    assert found(str(tmp_path / split[0]), engine="llama.cpp") == split
    assert found(str(tmp_path / "other.gguf"), engine="llama.cpp") == ["other.gguf"]
    assert found("org/m") == ["model.safetensors"]
    assert found("org/gone") == found(str(tmp_path / "gone")) == found("org/m", engine="remote") == []
    assert found("org/m", extra_args=("--load-format", "dummy")) == []
